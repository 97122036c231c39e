"""The paper's larger models at full size, with random weights, through the whole of quantization in 20 GB."""

import importlib.util
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from torch import device

FILE = Path(__file__).parent.parent / "benchmarks" / "full_size.py"
SPEC = importlib.util.spec_from_file_location("full_size", FILE)
full_size = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(full_size)

PARAMETERS = {"sd14": 859_520_964, "ldm4-imagenet": 400_920_579}  # the paper's size column: 3278.8 and 1529.4 MiB in float32


@pytest.mark.parametrize("model", PARAMETERS)
def test_sizes_are_the_papers(model):
    with device("meta"):
        unet = UNet2DConditionModel(**full_size.MODELS[model][0])
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[model]


def test_estimate_for_a_gpu():
    """Two of 1 GB and what is trained: 0.5 GB, its gradient and moments; the rest of the rise is one sample's."""
    estimate = full_size.on_gpu(1_000, 500, 4_000)
    assert estimate["fixed_bytes"] == 2 * 1_000 + (1_000 - 500) + 3 * 500
    assert estimate["bytes_per_sample"] == 4_000 - 2 * 500
    assert estimate["largest_batch_in_48_gb"] == (46 * 10**9 - 4_000) // 3_000


@pytest.mark.slow
@pytest.mark.parametrize("model", PARAMETERS)
def test_full_size_goes_through_in_20_gb(model):
    found = full_size.run(model)
    assert found["parameters"] == PARAMETERS[model]
    assert found["peak_bytes"] < 20e9
    assert found["checkpoint_bytes"] < 0.145 * found["fp32_bytes"]
    assert [entry[0] for entry in found["loss"]] == ["tla", "tla", "cma", "cma"]
    assert found["finetune_on_gpu"]["largest_batch_in_48_gb"] >= 4  # the batch of the release
