"""torch.compile of a quantized UNet: one program for each step group, and none for a timestep."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DModel
from test_triton_fused import quantized
from torch._dynamo.testing import CompileCounterWithBackend

from questlib import convert
from questlib.integer.triton import runtime
from questlib.quantization.model import freeze

needs_triton = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)


@pytest.fixture(scope="module")
def fake():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(16,),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return quantized(unet, 8)


@pytest.fixture(autouse=True)
def fresh():
    """What other tests have compiled is forgotten."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_engine(fake, engine: str) -> torch.nn.Module:
    if engine == "fake":
        return freeze(copy.deepcopy(fake))
    name, _, fused = engine.partition(" ")
    return convert(fake, name, fuse=True) if fused else convert(fake, name)


@pytest.mark.parametrize(
    ("engine", "backend"),
    [
        ("fake", "aot_eager"),
        ("cpu", "eager"),
        pytest.param("triton fused", "eager", marks=needs_triton),
        pytest.param("fake", "inductor", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_timesteps_share_a_program(fake, engine, backend):
    unet = of_engine(fake, engine)
    x = torch.randn(2, 3, 4, 4)
    expected = [unet(x, t).sample for t in range(4)]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(unet, backend=counter)
    counts = []
    for t in (0, 3, 1, 2):  # both step groups, and then two new timesteps
        found = compiled(x, torch.tensor(t)).sample
        torch.testing.assert_close(found, expected[t], rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[1] == counts[3]
    if engine != "cpu":  # whose layers are compiled already, and stand between the programs
        assert counts == [1, 2, 2, 2]


@torch.no_grad()
def test_a_batch_of_several_timesteps(fake):
    """They are of one step group; the time path is not tabulated for them."""
    unet = convert(fake, "cpu")
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    expected = unet(x, t).sample
    compiled = torch.compile(unet, backend="eager")
    assert torch.equal(compiled(x, t).sample, expected)
