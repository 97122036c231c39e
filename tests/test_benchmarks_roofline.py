"""benchmarks/roofline.py: launches are those of the code, and the arithmetic is as it says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import roofline  # noqa: E402
from roofline_launches import Models, Operator, converted, events_of  # noqa: E402

from questlib.integer.time_table import TimeTable  # noqa: E402
from questlib.integer.triton.attention import TritonAttnProcessor  # noqa: E402
from questlib.integer.triton.layers import TritonLayer  # noqa: E402

GPU = SimpleNamespace(
    multi_processor_count=132, shared_memory_per_block_optin=227 << 10, major=9, minor=0
)


def unet(*widths: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def models() -> Models:
    with torch.device("meta"):
        full = unet(160, 320)
    return Models(full, unet(16, 32), (3, 16, 16), None)


@pytest.fixture(scope="module")
def steps(models):
    """(events in half precision, the converted UNet, its events)"""
    plain = models.full.eval().requires_grad_(False).half()
    base = events_of(plain, models, 2, GPU, roofline.seconds_of)
    mine = converted(models)
    return base, mine, events_of(mine, models, 2, GPU, roofline.seconds_of)


def test_every_layer_of_a_step_is_launched_once(steps):
    _, mine, events = steps
    once = [m.layer for m in mine.modules() if isinstance(m, TimeTable)]
    tabulated = {layer for module in once for layer in module.modules()}
    layers = [m for m in mine.modules() if isinstance(m, TritonLayer) and m not in tabulated]
    attentions = [m for m in mine.modules() if isinstance(m, TritonAttnProcessor)]
    assert layers and attentions and tabulated
    kernels = [event.kernel for event in events if isinstance(event, roofline.Launch)]
    parts = sum(len(layer.parts) for layer in layers)
    assert kernels.count("gemm") == parts > len(layers)  # some inputs are split
    # The operands of attention are codes as the projections write them.
    assert kernels.count("quantize") == parts - 3 * len(attentions)
    assert kernels.count("quantize_rows") == len(attentions)
    assert kernels.count("attention") == len(attentions)
    products = [e for e in events if isinstance(e, Operator) and e.product]
    assert not products  # nothing is left in floating point
    first = next(e.arguments for e in events if getattr(e, "kernel", "") == "gemm")
    assert (first["M"], first["N"]) == (2 * 16 * 16, 160)


def test_operations_of_the_float_unet_are_counted(steps, models):
    base, _, _ = steps
    products = [e.product for e in base if isinstance(e, Operator) and e.product]
    assert (2 * 16 * 16, 160, 27) in products  # the first convolution
    attentions = sum(getattr(e, "kernel", "") == "sdpa" for e in base)
    assert attentions == sum("to_q" in name for name, _ in unet(16, 32).named_modules())


def test_fused_operators_are_fewer_kernels_and_less_time(steps):
    base, _, _ = steps
    eager, compiled = roofline.estimate(base), roofline.estimate(base, compiled=True)
    assert compiled.count < eager.count and compiled.total < eager.total
    assert compiled.seconds["gemm"] == pytest.approx(eager.seconds["gemm"])
    assert eager.total == pytest.approx(sum(eager.seconds.values()))


def test_a_run_of_operators_moves_what_goes_in_and_comes_out():
    size = 430_000_000
    one = Operator("mul", {1: size}, {2: size}, None)
    two = Operator("add", {2: size, 3: size}, {4: size}, None)
    expected = 3 * size / roofline.GPU.memory + 1.2e-6
    assert roofline.estimate([one, two], compiled=True).total == pytest.approx(expected)
    small = Operator("mul", {1: 8}, {2: 8}, None)
    assert roofline.estimate([small]).total == roofline.GPU.floor


def test_keys_are_loaded_by_as_much_as_is_aligned():
    assert [roofline.key_width({"dim": dim}) for dim in (40, 80, 160, 20)] == [8, 16, 16, 4]
