"""Blocks that the Triton engine fuses, in its interpreter: the plain blocks' outputs, up to codes
that flip."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from questlib import QuantConfig, convert
from questlib.errors import EngineError
from questlib.integer.form import integer_form
from questlib.integer.synthetic import random_grids, random_layer
from questlib.integer.triton import runtime
from questlib.integer.triton.fused_attention import FusedAttnProcessor
from questlib.integer.triton.fused_transformers import FusedTransformer, FusedTransformerBlock
from questlib.integer.triton.layers import Codes, TritonLayer
from questlib.integer.triton.products import integer_attention
from questlib.quantization.preparation import prepare

pytestmark = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).item()


def quantized(unet: nn.Module, bits: int) -> nn.Module:
    """A UNet with norms as training leaves them, and plausible grids."""
    for norm in unet.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)
    config = QuantConfig.preset("quest", 4, bits, weight_range="minmax", step_groups=2)
    fake = prepare(unet.eval(), config, torch.arange(4))
    random_grids(fake)
    return fake.requires_grad_(False)


def conditional(linear: bool) -> nn.Module:
    """A UNet with a transformer as Stable Diffusion has them."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(16,),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        use_linear_projection=linear,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )


@pytest.mark.parametrize(("linear", "bits"), [(False, 4), (True, 8)])
@torch.no_grad()
def test_a_transformer(linear, bits):
    fake = quantized(conditional(linear), bits)
    plain, fused = convert(fake, "triton"), convert(fake, "triton", fuse=True)
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(FusedTransformer) == kinds.count(FusedTransformerBlock) == 1
    assert sum(isinstance(m, FusedAttnProcessor) for m in fused.modules()) == 2
    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)
    found, expected = (m(x, 1, encoder_hidden_states=text).sample for m in (fused, plain))
    # A code of 4 bits that flips is a large part of so small a model.
    assert error(found, expected) < (3e-3 if bits == 4 else 1e-5)
    with pytest.raises(EngineError, match="no cross_attention_kwargs, found ip"):
        fused(x, 1, text, cross_attention_kwargs={"ip": 0.5})


@torch.no_grad()
def test_an_attention_on_pixels():
    """Its GroupNorm and its residual, as LDM's UNets have them."""
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
    fake = quantized(unet, 8)
    plain, fused = convert(fake, "triton"), convert(fake, "triton", fuse=True)
    attentions = [m for m in fused.modules() if isinstance(m, Attention)]
    assert attentions and all(isinstance(m.processor, FusedAttnProcessor) for m in attentions)
    x = torch.randn(2, 3, 4, 4)
    assert error(fused(x, 1).sample, plain(x, 1).sample) < 1e-5


@torch.no_grad()
def test_a_geglu_before_the_layer_and_what_is_added_after_it():
    layer, steps = random_layer(nn.Linear(40, 24), 8, 8)
    steps.select_group(0)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    x, shift, residual = torch.randn(2, 9, 80), torch.randn(2, 24), torch.randn(2, 9, 24)
    values, gates = x.chunk(2, dim=-1)
    expected = engine(values * F.gelu(gates)) + shift[:, None] + residual
    found = engine(x, gated=True, shift=shift, residual=residual)
    assert error(found, expected) < 1e-6
    # One row for the whole batch, as a table of timesteps gives it.
    found = engine(x, gated=True, shift=shift[:1].expand(2, -1), residual=residual)
    assert error(found, expected - shift[:, None] + shift[0]) < 1e-6
    with pytest.raises(EngineError, match="layer: expected 40 input channels, found 20"):
        engine(values, gated=True)


@torch.no_grad()
def test_codes_are_those_of_the_layers_outputs():
    layer, steps = random_layer(nn.Linear(40, 24), 8, 8)
    steps.select_group(1)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    x = torch.randn(2, 9, 40)
    inverse = torch.rand(24) * 4 + 1
    table = torch.stack([inverse, torch.full((24,), -100.0), torch.ones(24), torch.zeros(24)])
    expected = (engine(x) * inverse).clamp(-100, 100).round().to(torch.int8)
    assert torch.equal(engine(x, codes=Codes(table, 200, False))[..., :24], expected)
    turned = engine(x, codes=Codes(table, 200, True))
    assert turned.shape == (2, 24, 16)
    assert torch.equal(turned[..., :9].transpose(1, 2), expected)


def test_what_lies_behind_the_last_key_does_not_count():
    q, k = torch.randint(-7, 8, (2, 2, 9, 64), dtype=torch.int8)
    v = torch.randint(-7, 8, (2, 32, 16), dtype=torch.int8)
    other = v.clone()
    other[..., 9:] = 99
    scale = torch.ones(32)
    found = [
        integer_attention(q, k, x, scale, 2, [0, 3], 0.01, 2000.0, 255, torch.float32)
        for x in (v, other)
    ]
    assert torch.equal(*found) and found[0].unique().numel() > 10


class Counted(TorchDispatchMode):
    """Counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.questlib.integer_gemm.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_keys_and_values_of_a_context_are_computed_once():
    fake = quantized(conditional(False), 8)
    fused = convert(fake, "triton", fuse=True)

    def step(unet: nn.Module, text: torch.Tensor) -> tuple[torch.Tensor, int]:
        with Counted() as counted:
            out = unet(x, 1, encoder_hidden_states=text).sample
        return out, counted.products

    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)
    step(fused, text)  # the tables of the timestep
    (first, many), (second, few) = step(fused, text.clone()), step(fused, text)
    assert many == few and torch.equal(first, second)
    again, fewer = step(fused, text)
    assert fewer == few - 2 and torch.equal(again, second)
    text.mul_(-1)
    changed, most = step(fused, text)
    assert most == many and not torch.equal(changed, second)
    assert torch.equal(step(copy.deepcopy(fused), text)[0], changed)
