"""What benchmarks/gpu.py checks and times.

Layer shapes of SD v1.4 and LDM-4; random layers, attention and UNets. torch is imported inside the
functions: the interpreter is chosen before.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A layer with `pixels` outputs for each picture.

    taps 1 is a linear layer, taps 3 a 3 x 3 convolution on a square.
    """

    model: str
    inputs: int
    outputs: int
    pixels: int
    taps: int = 1
    stride: int = 1

    def operations(self, batch: int) -> int:
        """Multiplications and additions."""
        return 2 * batch * self.pixels * self.inputs * self.outputs * self.taps**2

    def bytes(self, batch: int, act: float, weight: float, out: float = 2.0) -> float:
        """Each operand once, at `act`, `weight` and `out` bytes an element."""
        pixels = batch * self.pixels
        acts = pixels * self.stride**2 * self.inputs
        weights = self.inputs * self.outputs * self.taps**2
        return acts * act + weights * weight + pixels * self.outputs * out

    def __str__(self) -> str:
        kind = f"conv3x3/{self.stride}" if self.taps == 3 else "linear"
        return f"{self.model} {kind} {self.inputs}->{self.outputs} at {self.pixels}"


SHAPES = [
    Shape("sd14", 320, 320, 4096, 3),
    Shape("sd14", 960, 320, 4096, 3),
    Shape("sd14", 640, 640, 1024, 3),
    Shape("sd14", 1920, 640, 1024, 3),
    Shape("sd14", 1280, 1280, 256, 3),
    Shape("sd14", 2560, 1280, 256, 3),
    Shape("sd14", 1280, 1280, 64, 3),
    Shape("sd14", 320, 320, 1024, 3, 2),
    Shape("sd14", 320, 320, 4096),
    Shape("sd14", 320, 2560, 4096),
    Shape("sd14", 1280, 320, 4096),
    Shape("sd14", 640, 5120, 1024),
    Shape("sd14", 2560, 640, 1024),
    Shape("sd14", 1280, 1280, 256),
    Shape("sd14", 1280, 10240, 256),
    Shape("sd14", 5120, 1280, 256),
    Shape("sd14", 768, 1280, 77),
    Shape("ldm4", 224, 224, 4096, 3),
    Shape("ldm4", 448, 448, 1024, 3),
    Shape("ldm4", 672, 672, 256, 3),
    Shape("ldm4", 896, 896, 64, 3),
    Shape("ldm4", 448, 448, 1024),
    Shape("ldm4", 672, 672, 256),
]
# queries, keys, channels a head; 8 heads
ATTENTIONS = [(4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40)]
BATCHES = (2, 8, 1)  # 2 first: one picture with classifier-free guidance
# name, bits of weights and activations, kind of weights, whether with block shifts
FORMATS = (
    ("W4A4 packed", 4, 4, "packed", False),
    ("W4A4 packed, block shifts", 4, 4, "packed", True),
    ("W4A4 int8", 4, 4, "int8", False),
    ("W8A8", 8, 8, "int8", False),
)
# How a quantized UNet is converted, by what is said of it.
FORMS: dict[str, dict[str, Any]] = {
    "": dict(fuse=True),
    ", attention auto": dict(fuse=True, attention="auto"),
    ", not fused": dict(fuse=False),
}


def load_engine() -> SimpleNamespace:
    """The parts of the engine by name, also where diffusers is missing."""
    if importlib.util.find_spec("diffusers") is None:
        attention: Any = ModuleType("diffusers.models.attention_processor")
        attention.Attention = object  # named in annotations only
        packages = ("diffusers", "diffusers.models")
        sys.modules |= {name: ModuleType(name) for name in packages}
        sys.modules[attention.__name__] = attention
    from questlib.integer.attention_form import attention_form
    from questlib.integer.form import integer_form
    from questlib.integer.oracle import layer_forward
    from questlib.integer.triton import runtime, tiles
    from questlib.integer.triton.attention import TritonAttention
    from questlib.integer.triton.flags import check_finite
    from questlib.integer.triton.layers import TritonLayer

    return SimpleNamespace(
        TritonAttention=TritonAttention,
        TritonLayer=TritonLayer,
        attention_form=attention_form,
        check_finite=check_finite,
        integer_form=integer_form,
        layer_forward=layer_forward,
        runtime=runtime,
        tiles=tiles,
    )


def random_layer(module: Any, w_bits: int, a_bits: int, **choices: Any) -> tuple[Any, Any]:
    """(layer, steps) as synthetic.random_layer makes them.

    Activations of up to 4 bits are in the carrier format.
    """
    from questlib.integer import synthetic

    return synthetic.random_layer(module, w_bits, a_bits, carrier=a_bits <= 4, **choices)


def triton_layer(
    engine: SimpleNamespace, shape: Shape, w_bits: int, a_bits: int, kind: str, shift: bool
) -> Any:
    """A random TritonLayer on the GPU."""
    layer, steps = random_layer(module_of(shape).to("cuda"), w_bits, a_bits, shift=shift)
    return engine.TritonLayer(engine.integer_form(layer, str(shape)), steps, kind)


def module_of(shape: Shape) -> Any:
    """A layer of this shape in floating point."""
    from torch import nn

    if shape.taps == 1:
        return nn.Linear(shape.inputs, shape.outputs)
    return nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)


def input_of(shape: Shape, batch: int, device: str, dtype: Any) -> Any:
    """A random input of a layer; a convolution's is channels_last."""
    import torch

    if shape.taps == 1:
        return torch.randn(batch, shape.pixels, shape.inputs, device=device, dtype=dtype)
    side = round(shape.pixels**0.5) * shape.stride
    x = torch.randn(batch, shape.inputs, side, side, device=device, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def attention_parts(
    engine: SimpleNamespace, bits: int, heads: int, dim: int, device: str
) -> tuple[Any, list[Any]]:
    """(TritonAttention, the four ActQuantizers)"""
    import torch

    from questlib.quantization.act_quantizer import ActQuantizer
    from questlib.quantization.attention import QuantAttnProcessor
    from questlib.quantization.step_groups import StepGroups

    steps = StepGroups(torch.arange(1), torch.zeros(1, dtype=torch.int64))
    width = heads * dim
    carrier = bits <= 4
    kind = "carrier" if carrier else "tensor"
    acts = [ActQuantizer(x, bits, steps, width, -1, kind) for x in "qkv"]
    for act in acts:
        ratio = torch.randint(1, 9, (width,)).float() if carrier else None
        scale = torch.full((1,), (0.15 if carrier else 4.0) / 2**bits)
        act.set_group(0, scale, torch.full((width,), 2.0 ** (bits - 1)), ratio)
    probs = ActQuantizer("probs", 8, steps, 1, -1, unsigned=True)
    probs.set_group(0, torch.full((1,), 0.1 / 255), torch.zeros(1))
    acts.append(probs)
    for act in acts:
        act.calibrated.fill_(True)
    form = engine.attention_form(QuantAttnProcessor(*acts), f"attention A{bits}")
    return engine.TritonAttention(form.name, form.grids, form.v_shift, steps).to(device), acts


def random_unet(name: str, bits: int = 32, device: str = "cuda", **size: Any) -> Any:
    """SD v1.4's UNet with random weights.

    Args:
        name: "float", or a preset. Its grids were never calibrated: for speed and memory only.
        bits: of weights and activations.
        device: of the UNet.
        size: what is not as in SD v1.4.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from questlib import QuantConfig
    from questlib.integer.synthetic import random_grids
    from questlib.quantization.preparation import prepare

    size = (
        dict(sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))
        | size
    )
    with torch.device(device):
        unet = UNet2DConditionModel(attention_head_dim=8, **size)
    if name == "float":
        return unet.eval().requires_grad_(False)
    config = QuantConfig.preset(name, bits, bits, weight_range="minmax", step_groups=2)
    unet = prepare(unet, config, torch.arange(0, 1000, 20)).to(device)
    random_grids(unet)
    return unet
