"""The paper's larger models at full size, with random weights, go through in 20 GB."""

import contextlib
import sys
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from torch import device

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import finetune_memory  # noqa: E402
import full_size  # noqa: E402

# The paper's size column: 3278.8 and 1529.4 MiB in float32.
PARAMETERS = {"sd14": 859_520_964, "ldm4-imagenet": 400_920_579}


@pytest.mark.parametrize("model", PARAMETERS)
def test_sizes_are_the_papers(model):
    with device("meta"):
        unet = UNet2DConditionModel(**full_size.MODELS[model].unet)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[model]


def test_memory_counted_on_fake_tensors_is_that_of_real_ones(monkeypatch):
    """A tiny model: the same count with values as without.

    Checkpointing lowers it, and it grows with the batch.
    """
    tiny = dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    monkeypatch.setitem(
        finetune_memory.MODELS, "tiny", full_size.FullSize(tiny, None, (3, 12), 2.0)
    )
    plain, saving, larger = (
        finetune_memory.count("tiny", *how) for how in ((4, False), (4, True), (8, True))
    )
    assert saving < plain and saving < larger < 2 * saving

    def with_values(module, mode, living):
        for value in (*module.parameters(), *module.buffers()):
            living.add(value)

    monkeypatch.setattr(finetune_memory, "FakeTensorMode", contextlib.nullcontext)
    monkeypatch.setattr(finetune_memory, "without_values", with_values)
    assert finetune_memory.count("tiny", 4, True) == pytest.approx(saving, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("model", PARAMETERS)
def test_full_size_goes_through_in_20_gb(model):
    found = full_size.run(model)
    assert found["parameters"] == PARAMETERS[model]
    assert found["peak_bytes"] < 20e9
    assert found["checkpoint_bytes"] < 0.145 * found["fp32_bytes"]
    assert [entry[0] for entry in found["loss"]] == ["tla", "tla", "cma", "cma"]
