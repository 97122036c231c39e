"""What benchmarks/gpu.py checks and times: layer shapes of SD v1.4 and LDM-4; random layers, attention and UNets."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Shape(NamedTuple):
    """A layer with `pixels` outputs for each picture: taps 1 is a linear, taps 3 a 3 x 3 convolution on a square."""

    model: str
    inputs: int
    outputs: int
    pixels: int
    taps: int = 1
    stride: int = 1

    def operations(self, batch: int) -> int:
        return 2 * batch * self.pixels * self.inputs * self.outputs * self.taps**2

    def bytes(self, batch: int, act: float, weight: float, out: float = 2.0) -> float:
        """Each operand once, at `act`, `weight` and `out` bytes an element."""
        read = (
            batch * self.pixels * self.stride**2 * self.inputs * act
            + self.inputs * self.outputs * self.taps**2 * weight
        )
        return read + batch * self.pixels * self.outputs * out

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
ATTENTIONS = [
    (4096, 4096, 40),
    (1024, 1024, 80),
    (256, 256, 160),
    (4096, 77, 40),
]  # queries, keys, channels a head; 8 heads
BATCHES = (2, 8, 1)  # 2 first: one picture with classifier-free guidance
FORMATS = (
    ("W4A4 packed", 4, 4, "packed", False),
    ("W4A4 packed, block shifts", 4, 4, "packed", True),
    ("W4A4 int8", 4, 4, "int8", False),
    ("W8A8", 8, 8, "int8", False),
)


def load_engine() -> tuple:
    """(triton_engine, form, reference); where diffusers is missing, past the package's __init__, which needs it."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("diffusers") is None:
        for name, folder in (
            ("questlib", ROOT / "questlib"),
            ("questlib.integer", ROOT / "questlib/integer"),
        ):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder)]
        attention = types.ModuleType("diffusers.models.attention_processor")
        attention.Attention = object  # named by questlib.quantization.layers in annotations only
        sys.modules |= {n: types.ModuleType(n) for n in ("diffusers", "diffusers.models")} | {
            attention.__name__: attention
        }
    from questlib.integer import form, oracle
    from questlib.integer.triton import layers

    return layers, form, oracle


def random_layer(module, w_bits: int, a_bits: int, **choices):
    """(layer, steps) as synthetic.random_layer makes them; activations of up to 4 bits in the carrier format."""
    from questlib.integer import synthetic

    return synthetic.random_layer(module, w_bits, a_bits, carrier=a_bits <= 4, **choices)


def module_of(shape: Shape):
    from torch import nn

    if shape.taps == 1:
        return nn.Linear(shape.inputs, shape.outputs)
    return nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)


def input_of(shape: Shape, batch: int, device: str, dtype):
    import torch

    side = round(shape.pixels**0.5) * shape.stride
    size = (
        (batch, shape.inputs, side, side)
        if shape.taps == 3
        else (batch, shape.pixels, shape.inputs)
    )
    x = torch.randn(size, device=device, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if shape.taps == 3 else x


def attention_parts(engine, form, bits: int, heads: int, dim: int, device: str):
    """(TritonAttention, the four ActQuantizers)"""
    import torch

    from questlib.quantization.act_quantizer import ActQuantizer
    from questlib.quantization.step_groups import StepGroups

    steps, width = StepGroups(torch.arange(1), torch.zeros(1, dtype=torch.int64)), heads * dim
    acts = [
        ActQuantizer(
            x, bits, steps, width, -1, torch.zeros(width, dtype=torch.int64), carrier=bits <= 4
        )
        for x in "qkv"
    ]
    acts.append(
        ActQuantizer("probs", 8, steps, 1, -1, torch.zeros(1, dtype=torch.int64), unsigned=True)
    )
    for act in acts[:3]:
        ratio = torch.randint(1, 9, (width,)).float() if bits <= 4 else None
        act.set_group(
            0,
            torch.full((1,), (0.15 if bits <= 4 else 4.0) / 2**bits),
            torch.full((width,), 2.0 ** (bits - 1)),
            ratio,
        )
    acts[3].set_group(0, torch.full((1,), 0.1 / 255), torch.zeros(1))
    for act in acts:
        act.calibrated.fill_(True)
    tables = [form.act_grids(a, torch.zeros(len(a.index), dtype=torch.int64), a.name) for a in acts]
    grids = [tuple(of[0] for of in group) for group in zip(*(t for t, _ in tables), strict=True)]
    return engine.TritonAttention(f"attention A{bits}", grids, tables[2][1], steps).to(device), acts


def random_unet(name: str, bits: int = 32, device: str = "cuda", **size):
    """SD v1.4's UNet, random weights, quantized with grids that were never calibrated: for speed and memory only."""
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
