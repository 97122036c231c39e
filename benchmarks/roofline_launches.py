"""The kernels that one step of a UNet launches, without a GPU and without the work.

A UNet of full size lies on torch's "meta" device: shapes without values. Which layers run in
integers, and how, is what questlib decides for the same UNet with narrow layers; the operators are
questlib's own, and only Triton's kernels are replaced by a note of their launch. All other
operators are noted as torch dispatches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from questlib import QuantConfig
from questlib.integer import synthetic
from questlib.integer.float_attention import faster_in_float
from questlib.integer.form import integer_form
from questlib.integer.time_table import tabulate_time
from questlib.integer.triton import (
    attention,
    fused,
    layers,
    products,
    quantizing,
    runtime,
    tiles,
    together,
)
from questlib.integer.triton.attention import TritonAttnProcessor
from questlib.integer.triton.layers import TritonLayer
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import FloatAttnProcessor, QuantAttnProcessor
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import quant_layers
from questlib.quantization.preparation import prepare
from questlib.quantization.step_groups import StepGroups

OUTPUTS = 7  # of a layer while it is made; no other size of its tables
# Our kernels, and the module of `runtime` that has them.
KERNELS = {
    "gemm": "gemm_kernels",
    "quantize": "quantize_kernels",
    "quantize_rows": "quantize_kernels",
    "moments": "norm_kernels",
    "group_affine": "norm_kernels",
    "attention": "attention_kernels",
}


class Launch(NamedTuple):
    """A launch of one of our kernels: its arguments by name; a tensor stands for its shape."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Operator(NamedTuple):
    """Another operator that launches a kernel. Tensors are known by id and number of bytes."""

    name: str
    inputs: dict[int, int]
    outputs: dict[int, int]
    product: tuple[int, int, int] | None  # m, n, k of a matrix product
    taps: int = 1


Event = Launch | Operator


class Models(NamedTuple):
    """A UNet at full width and narrow, with what a step takes besides the sample."""

    full: nn.Module
    narrow: nn.Module
    sample: tuple[int, int, int]
    context: tuple[int, int] | None


def sd14() -> Models:
    """Stable Diffusion v1.4"""

    def make(*widths: int) -> nn.Module:
        return UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=widths,
        )

    with torch.device("meta"):
        full = make(320, 640, 1280, 1280)
    return Models(full, make(32, 64, 128, 128), (4, 64, 64), (77, 768))


def ldm4() -> Models:
    """LDM-4 of LSUN-Bedrooms"""

    def make(*widths: int) -> nn.Module:
        return UNet2DModel(
            sample_size=64,
            attention_head_dim=32,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        )

    with torch.device("meta"):
        full = make(224, 448, 672, 896)
    return Models(full, make(32, 64, 96, 128), (3, 64, 64), None)


# ---- the UNet in integers ----


def converted(
    models: Models,
    preset: str = "quest",
    bits: int = 4,
    weights: str = "packed",
    attention: str = "quantized",
    fuse: bool = True,
) -> nn.Module:
    """The full UNet as `questlib.convert(..., "triton", dtype=float16)` makes it."""
    in_float = [
        name
        for name, module in models.full.named_modules()
        if isinstance(module, Attention)
        and attention == "auto"
        and faster_in_float(module.to_q.out_features // module.heads)
    ]
    config = QuantConfig.preset(
        preset, bits, bits, weight_range="minmax", step_groups=2, float_attention=in_float
    )
    narrow = prepare(models.narrow, config, torch.arange(0, 1000, 20))
    steps = narrow.quest_steps
    unet = models.full.eval().requires_grad_(False).half()
    for name, of in quant_layers(narrow).items():
        plain = unet.get_submodule(name)
        unet.set_submodule(name, _layer(plain, of, name, steps, weights))
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            of = narrow.get_submodule(name).processor
            if isinstance(of, FloatAttnProcessor):
                module.processor = FloatAttnProcessor()
            else:
                module.processor = _attention(module, of, name, steps)
    steps.select(torch.tensor(500))
    unet.quest_steps = steps
    tabulate_time(unet)
    if fuse:
        fused.fuse(unet)
    return unet


def _layer(
    plain: nn.Module, of: QuantLayer, name: str, steps: StepGroups, weights: str
) -> nn.Module:
    """The layer in integers, on "meta"; `of` is the same layer of the narrow UNet."""
    linear = isinstance(plain, nn.Linear)
    inputs = plain.in_features if linear else plain.in_channels
    outputs = plain.out_features if linear else plain.out_channels
    bias = plain.bias is not None
    if linear:
        small: nn.Linear | nn.Conv2d = nn.Linear(inputs, OUTPUTS, bias)
    else:
        geometry = (plain.kernel_size, plain.stride, plain.padding)
        small = nn.Conv2d(inputs, OUTPUTS, *geometry, bias=bias)
    act = of.input_quantizer
    split = None
    if int(act.index.max()) > 0:
        # Where the second part starts, in the same proportion.
        split = int((act.index == 0).sum()) * inputs // len(act.index)
    layer, _ = synthetic.random_layer(
        small,
        of.weight_quantizer.bits,
        act.bits,
        split=split,
        carrier=act.carrier,
        token=act.token,
    )
    layer.input_quantizer.shifts = act.shifts
    synthetic.random_grids(layer)
    made = TritonLayer(integer_form(layer, name), steps, weights).to("meta")
    made.outputs = outputs
    for module in made.modules():
        for key, table in module.named_buffers(recurse=False):
            if OUTPUTS in table.shape:
                wide = [outputs if n == OUTPUTS else n for n in table.shape]
                setattr(module, key, table.new_empty(wide))
    return made


def _attention(
    plain: Attention, of: QuantAttnProcessor, name: str, steps: StepGroups
) -> TritonAttnProcessor:
    """The attention's processor in integers, on "meta"."""
    width = plain.to_q.outputs
    kinds = ["carrier" if act.carrier else "tensor" for act in (of.q, of.k, of.v)]
    acts = [
        ActQuantizer(act.name, act.bits, steps, width, -1, kind, shifts=act.shifts)
        for act, kind in zip((of.q, of.k, of.v), kinds, strict=True)
    ]
    probs = ActQuantizer(of.probs.name, of.probs.bits, steps, 1, -1, unsigned=True)
    processor = QuantAttnProcessor(*acts, probs)
    synthetic.random_grids(processor)
    return TritonAttnProcessor(processor, name, plain.heads).to("meta")


# ---- one step ----


def kernel_of(name: str) -> Any:
    """The Triton kernel of this name."""
    return getattr(getattr(runtime, KERNELS[name]), name)


class _Kernel:
    """In place of a Triton kernel: notes its launches."""

    def __init__(self, name: str, kernel: Any, events: list[Event]) -> None:
        self.name = name
        self.names = kernel.arg_names
        self.events = events

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **named: Any) -> None:
            arguments = dict(zip(self.names, values, strict=False)) | named
            self.events.append(Launch(self.name, grid, arguments))

        return launch


class _Noted(TorchDispatchMode):
    """Notes the operators that launch a kernel."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.events = events
        self.alive: list[torch.Tensor] = []  # an id stands for one tensor only

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            written = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.alive += [*read, *written]
            sizes = _product(name, args, out)
            self.events.append(Operator(name, _bytes(read), _bytes(written), *sizes))
        return out


def _bytes(tensors: list[torch.Tensor]) -> dict[int, int]:
    """By id of what holds their values: views of one tensor are one."""
    return {
        x.untyped_storage()._cdata: x.numel() * x.element_size() for x in tensors if x.dim() > 0
    }


def _product(name: str, args: Any, out: Any) -> tuple[tuple[int, int, int] | None, int]:
    """(m, n, k) and the number of taps of a product, as the operator's arguments tell."""
    if name == "convolution":
        taps = args[1][0, 0].numel()
        return (out.numel() // out.shape[1], out.shape[1], args[1][0].numel()), taps
    if name in ("addmm", "mm"):
        left, right = args[-2:]
        return (left.shape[0], right.shape[1], left.shape[1]), 1
    return None, 1


def events_of(
    unet: nn.Module,
    models: Models,
    batch: int,
    gpu: Any,
    seconds: Callable[[list[Event]], float],
) -> list[Event]:
    """What one step launches, in its order.

    Args:
        unet: `models.full`, or `converted(models)`.
        models: what the step takes.
        batch: of the step.
        gpu: as torch.cuda.get_device_properties tells of the GPU.
        seconds: the estimated time of some events, by which tiles are chosen.
    """
    events: list[Event] = []

    def choose(key: str, candidates: Callable, run: Callable) -> tiles.Config:
        """The best of the tiles that would be timed; what is noted for a trial is taken back."""

        def trial(config: tiles.Config) -> float:
            before = len(events)
            run(config)
            tried = events[before:]
            del events[before:]
            return seconds(tried)

        return min(candidates(), key=trial)

    with _noted_kernels(events, gpu, choose), _Noted(events):
        _step(unet, models, batch)
        # Rows of the time tables are there from now on.
        events.clear()
        _step(unet, models, batch)
    return events


def all_launches(
    unet: nn.Module, models: Models, batch: int, gpu: Any, tuned: bool
) -> list[Launch]:
    """What the first step and those after it launch of our kernels.

    Args:
        unet: `converted(models)`.
        models: what the step takes.
        batch: of the step.
        gpu: as torch.cuda.get_device_properties tells of the GPU.
        tuned: whether each tile that tuning would time is launched, or the first of them alone.
    """
    events: list[Event] = []

    def choose(key: str, candidates: Callable, run: Callable) -> tiles.Config:
        found = candidates()
        for config in found if tuned else ():
            run(config)
        return found[0]

    with _noted_kernels(events, gpu, choose):
        for _ in range(2):
            _step(unet, models, batch)
    return [event for event in events if isinstance(event, Launch) and event.kernel in KERNELS]


@torch.no_grad()
def _step(unet: nn.Module, models: Models, batch: int) -> None:
    """A step in half precision, on "meta"."""
    with torch.device("meta"):
        x = torch.empty(batch, *models.sample, dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last)
        inputs = {}
        if models.context is not None:
            context = torch.empty(batch, *models.context, dtype=torch.float16)
            inputs["encoder_hidden_states"] = context
        unet(x, torch.empty(batch), **inputs)


@contextmanager
def _noted_kernels(events: list[Event], gpu: Any, choose: Callable) -> Iterator[None]:
    """Operators run their own code on "meta", their kernels are noted, and `choose` takes tiles."""
    patches: list[tuple[Any, str, Any]] = [
        (runtime, "INTERPRET", False),
        (tiles, "CACHE", SimpleNamespace(choose=choose)),
        (torch.cuda, "get_device_properties", lambda *_: gpu),
        (layers, "check_input", lambda *_: None),
        (attention, "check_input", lambda *_: None),
        (layers, "quantize", quantizing.quantize._init_fn),
        (attention, "quantize", quantizing.quantize._init_fn),
        (together, "check_input", lambda *_: None),
        (together, "quantize_rows", quantizing.quantize_rows._init_fn),
        (layers, "integer_gemm", products.integer_gemm._init_fn),
        (attention, "integer_attention", products.integer_attention._init_fn),
        (quantizing, "group_norm_affine", quantizing.group_norm_affine._init_fn),
        (F, "scaled_dot_product_attention", _sdpa(events)),
    ]
    for module in dict.fromkeys(KERNELS.values()):
        own = {
            name: _Kernel(name, kernel_of(name), events)
            for name, of in KERNELS.items()
            if of == module
        }
        patches.append((runtime, module, SimpleNamespace(**own)))
    before = [(of, name, getattr(of, name)) for of, name, _ in patches]
    try:
        for of, name, value in patches:
            setattr(of, name, value)
        yield
    finally:
        for of, name, value in before:
            setattr(of, name, value)


def _sdpa(events: list[Event]) -> Any:
    """In place of F.scaled_dot_product_attention: one kernel."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> Any:
        batch, heads, n, dim = query.shape
        arguments = dict(queries=n, keys=key.shape[2], heads=heads, dim=dim)
        events.append(Launch("sdpa", (batch,), arguments))
        return torch.empty_like(query)

    return attend
