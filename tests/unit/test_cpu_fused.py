"""Blocks that the CPU engine fuses: torch's norms and activations up to single codes, and the plain
blocks' outputs up to codes that flip."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import questlib
from questlib import QuantConfig, convert
from questlib.errors import EngineError
from questlib.integer.cpu.fused import (
    FusedResnetBlock,
    FusedTransformer,
    FusedTransformerBlock,
    FusedUpsample,
)
from questlib.integer.cpu.layers import CpuLayer
from questlib.integer.cpu.prepared import (
    affine_of,
    after_geglu,
    after_group_norm,
    after_layer_norm,
)
from questlib.integer.form import integer_form
from questlib.integer.synthetic import random_grids, random_layer
from questlib.kernels import library
from questlib.quantization.preparation import prepare

pytestmark = pytest.mark.skipif(
    library.kernels().library is None, reason=f"no kernels: {library.kernels().reason}"
)
GRIDS = {
    "tensor": dict(),
    "carrier": dict(carrier=True, shift=True),
    "split": dict(carrier=True, split=True),
    "token": dict(token=True, carrier=True, shift=True),
}


def make(layer: nn.Module, grids: str, bits: int = 4) -> CpuLayer:
    layer, steps = random_layer(layer, 4, bits, **GRIDS[grids])
    steps.select_group(0)
    return CpuLayer(integer_form(layer, "middle"), steps)


def random_norm(norm: nn.Module) -> nn.Module:
    """A norm as training leaves it."""
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias, 0.0, 0.2)
    return norm.requires_grad_(False)


def assert_same_codes(layer: CpuLayer, found, x: torch.Tensor) -> None:
    """What a fused kernel sends is what the layer makes of torch's values, but for single codes
    that lie at a boundary: at most 1 of 1000, each by one step."""
    for one, other in zip(found.of[layer.name], layer.send(x), strict=True):
        assert one.bytes.shape == other.bytes.shape
        apart = (one.bytes.int() - other.bytes.int()).abs()
        multiplier = max(1, *(int(s.grid.max_abs) for s in layer.own_senders()))
        assert apart.max() <= multiplier
        assert (apart > 0).float().mean() < 1e-3
        if other.scale is not None:
            assert torch.allclose(one.scale, other.scale, rtol=1e-5)


# ---- the kernels ----


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("layout", ["channels_last", "planes"])
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (3, 40, 16, 16), (1, 16, 1, 1)], ids=str)
def test_a_group_norm_with_silu(shape, layout, grids):
    torch.manual_seed(1)
    norm = random_norm(nn.GroupNorm(8, shape[1]))
    layer = make(nn.Conv2d(shape[1], 5, 3, padding=1), grids)
    x = 2 * torch.randn(shape) + 7
    added = torch.randn(shape[:2])
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    found = after_group_norm(layer, x, affine_of(x, norm, added), silu=True)
    assert_same_codes(layer, found, F.silu(norm(x + added[:, :, None, None])))
    plain = after_group_norm(layer, x, affine_of(x, norm))
    assert_same_codes(layer, plain, norm(x))


def test_a_mean_far_from_zero_costs_no_precision():
    """E[x^2] - E[x]^2 would lose the variance here."""
    norm = nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 30, 30, dtype=torch.float64) * 0.1 + 3000
    scale, shift = affine_of(x.float(), norm)
    expected = norm.double()(x.float().double())
    found = x.float().double() * scale[..., None, None].double() + shift[..., None, None].double()
    # a shift of 3e4 in float32 is exact to 2e-3
    assert (found - expected).abs().max() < 4e-3


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_norm_and_a_geglu(dtype, grids):
    torch.manual_seed(1)
    norm = random_norm(nn.LayerNorm(72))
    layer = make(nn.Linear(72, 5), grids)
    x = (2 * torch.randn(2, 33, 72) + 1).to(dtype)
    found = after_layer_norm([layer], x, norm)
    assert found.shape == x.shape and found.dtype == dtype
    assert_same_codes(layer, found, norm(x.float()))
    wide = torch.cat([x, 3 * torch.randn(2, 33, 72).to(dtype)], -1)
    values, gates = wide.float().chunk(2, -1)
    found = after_geglu(layer, wide)
    assert found.shape == x.shape
    assert_same_codes(layer, found, values * F.gelu(gates))


def test_large_gates_and_values():
    """Where exponentials overflow, SiLU and GELU are 0 or the value itself."""
    layer = make(nn.Linear(8, 5), "tensor", bits=8)
    gates = torch.tensor([[-1e30, -200.0, -88.0, 88.0, 200.0, 1e30, 0.0, -0.0]])
    values = torch.full_like(gates, 0.01)
    found = after_geglu(layer, torch.cat([values, gates], -1))
    assert_same_codes(layer, found, values * F.gelu(gates))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    linear, conv = make(nn.Linear(8, 5), "carrier"), make(nn.Conv2d(8, 5, 1), "carrier")
    x = torch.zeros(2, 3, 8)
    x[1, 2, 3] = bad
    pixels = x.transpose(1, 2).unsqueeze(-1)
    norm = nn.GroupNorm(2, 8)
    refused = pytest.raises(EngineError, match="middle: the input has NaN or infinite")
    with refused:
        after_layer_norm([linear], x, nn.LayerNorm(8))
    with refused:
        after_geglu(linear, torch.cat([x, torch.ones_like(x)], -1))
    with refused:
        after_group_norm(conv, pixels, affine_of(pixels, norm), silu=True)


# ---- blocks and UNets ----


def quantized(unet: nn.Module, bits: int = 8) -> nn.Module:
    for norm in unet.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            random_norm(norm)
    config = QuantConfig.preset("quest", 4, bits, weight_range="minmax", step_groups=2)
    fake = prepare(unet.eval(), config, torch.arange(4))
    random_grids(fake)
    return fake.requires_grad_(False)


def conditional(**choices) -> nn.Module:
    """A small UNet as Stable Diffusion's."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **choices,
    )


def call(unet: nn.Module, x: torch.Tensor) -> torch.Tensor:
    text = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return unet(x, 1, encoder_hidden_states=text.expand(len(x), -1, -1)).sample


def noise(batch: int = 2, channels: int = 4) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(2))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).item()


@pytest.mark.parametrize(
    "choices",
    [
        dict(),
        dict(use_linear_projection=True, resnet_time_scale_shift="scale_shift"),
        dict(only_cross_attention=True, mid_block_scale_factor=1.5),
    ],
    ids=["sd", "linear", "cross"],
)
@torch.no_grad()
def test_a_conditional_unet(choices):
    fake = quantized(conditional(**choices))
    plain, fused = convert(fake, "cpu"), convert(fake, "cpu", fuse=True)
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(FusedResnetBlock) == sum(
        isinstance(m, ResnetBlock2D) for m in fake.modules()
    )
    assert kinds.count(FusedTransformer) == kinds.count(FusedTransformerBlock) == 4
    assert kinds.count(FusedUpsample) == 1
    x = noise()
    found = call(fused, x)
    assert error(found, call(plain, x)) < 1e-4
    assert questlib.engine_report(fused).engines() == questlib.engine_report(plain).engines()


@torch.no_grad()
def test_an_unconditional_unet_and_its_bits():
    """The same bits whatever the batch, the number of threads, and the run."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 64),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    fake = quantized(unet)
    plain, fused = convert(fake, "cpu"), convert(fake, "cpu", fuse=True)
    x = torch.cat([noise(3, 3)] * 4, -1)
    found = fused(x, 1).sample
    assert error(found, plain(x, 1).sample) < 1e-4
    assert torch.equal(fused(x, 1).sample, found)
    assert torch.equal(torch.cat([fused(one[None], 1).sample for one in x]), found)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(fused(x, 1).sample, found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    fake = quantized(conditional())
    expected = call(convert(fake, "cpu"), noise())
    found = call(convert(fake, "cpu", fuse=True, dtype=dtype), noise().to(dtype))
    assert found.dtype == dtype
    assert error(found.float(), expected) < 1e-2


@pytest.mark.parametrize("batch", [2, 70])
@torch.no_grad()
def test_repeated_bytes_are_those_of_repeated_pixels(batch):
    """An upsampling block is equal, whatever the batch; diffusers copies those of 64 and more."""
    fake = quantized(conditional(), bits=4)
    plain, fused = convert(fake, "cpu"), convert(fake, "cpu", fuse=True)
    (name,) = [name for name, m in fused.named_modules() if isinstance(m, FusedUpsample)]
    x = torch.randn(batch, 32, 4, 6)
    for unet in (plain, fused):
        unet.quest_steps.select_group(0)
    one, other = (unet.get_submodule(name) for unet in (fused, plain))
    assert torch.equal(one(x), other(x))
    assert torch.equal(one(x, output_size=(7, 11)), other(x, output_size=(7, 11)))


@torch.no_grad()
def test_blocks_that_resample_stay_as_they_are():
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False,
    )
    fake = quantized(unet)
    plain, fused = convert(fake, "cpu"), convert(fake, "cpu", fuse=True)
    blocks = [m for m in fused.modules() if isinstance(m, ResnetBlock2D)]
    resampling = [b for b in blocks if b.upsample is not None or b.downsample is not None]
    assert len(resampling) == 2 and not any(isinstance(b, FusedResnetBlock) for b in resampling)
    assert all(isinstance(b, FusedResnetBlock) for b in blocks if b not in resampling)
    assert error(fused(noise(2, 3), 1).sample, plain(noise(2, 3), 1).sample) < 1e-4


def test_without_kernels_fusing_is_refused(monkeypatch):
    fake = quantized(conditional())
    monkeypatch.setenv(library.SWITCH, "1")
    with pytest.raises(EngineError, match=r"fuse=True needs the compiled CPU kernels.*is set"):
        convert(fake, "cpu", fuse=True)
    convert(fake, "cpu")
