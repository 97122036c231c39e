"""convert(unet) -> the same diffusers class, its quantized layers run in integers. engine_report(unet): how, layer by layer."""

from __future__ import annotations

import copy

import pandas as pd
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.errors import ConfigError, EngineError
from questlib.integer import triton_engine
from questlib.integer.cpu import CpuLayer, saturates
from questlib.integer.cpu_attention import CpuAttnProcessor
from questlib.integer.form import IntegerForm, integer_form, packed_size
from questlib.integer.triton_attention import TritonAttnProcessor
from questlib.integer.triton_fused import fuse as fuse_blocks
from questlib.layers import QuantAttnProcessor, QuantLayer
from questlib.model import quant_layers, step_groups
from questlib.quantizers import ActQuantizer
from questlib.timesteps import StepGroups

ENGINES = ("cpu", "reference", "triton")
CPU_ENGINES = ENGINES[:2]  # need the model on the CPU
WEIGHTS = ("packed", "int8")
LAYERS = (CpuLayer, triton_engine.TritonLayer)
ATTENTION = (CpuAttnProcessor, TritonAttnProcessor)


def choose_engine(engine: str) -> str:
    """`engine`, or for "auto" the one of this machine. ConfigError for an unknown name, EngineError when it cannot run here."""
    if engine not in (*ENGINES, "auto"):
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, auto, found {engine!r}")
    if engine == "auto":
        engine = "triton" if torch.cuda.is_available() else "cpu"
    if engine == "cpu":
        saturates()  # raises where the kernels are missing or inexact
    elif engine == "triton":
        triton_engine.require_engine()
    return engine


def make_layer(engine: str, form: IntegerForm, steps: StepGroups, weights: str) -> nn.Module:
    if engine == "triton":
        return triton_engine.TritonLayer(form, steps, weights)
    return CpuLayer(form, steps, exact=engine == "reference")


def make_attention(engine: str, processor: QuantAttnProcessor, name: str, heads: int) -> QuantAttnProcessor:
    if engine == "triton":
        return TritonAttnProcessor(processor, name, heads)
    return CpuAttnProcessor(processor, name, exact=engine == "reference")


def convert(
    unet: nn.Module,
    engine: str = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    weights: str = "packed",
    fuse: bool = False,
    fallback: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Run a quantized UNet's layers in integers, exactly as fake quantization simulates them.

    engine: "cpu" (oneDNN int8), "triton" (NVIDIA GPUs), "reference" (the same integers in float64, slow) or "auto".
    dtype: of all that stays in floating point (norms, softmax input, residuals).
    weights: of the Triton engine in memory: "packed", two 4-bit codes a byte, or "int8", twice as large and nothing to unpack.
    fuse: of the Triton engine: norm, SiLU and quantization of a ResNet block's input in one kernel (`triton_fused`). Float
    rounding then differs from the simulation's before the codes are taken. Off by default: not yet measured on a GPU.
    fallback: layers without integer form stay simulated, and `engine_report` says so; otherwise they raise EngineError.
    inplace: reuse `unet`, layer by layer, instead of a copy: half the memory.
    Time-embedding layers are computed once for each timestep, bit-identically (`TimeTable`).
    """
    engine = choose_engine(engine)
    step_groups(unet)  # ConfigError for a plain UNet
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    if (fuse or weights != WEIGHTS[0]) and engine != "triton":
        raise ConfigError(f"weights and fuse are choices of engine triton, found weights {weights!r}, fuse {fuse} for {engine}")
    if engine in CPU_ENGINES and unet.device.type != "cpu":
        raise EngineError(f"engine {engine} needs the model on the CPU, found {unet.device}")
    unet = unet if inplace else copy.deepcopy(unet)
    unet.requires_grad_(False).eval()
    for name, layer in quant_layers(unet).items():
        if layer.wq is None or not layer.weights_on or not layer.act.enabled:
            continue  # asked for in the config: it runs in floating point
        try:
            form = integer_form(layer, name)
            new = make_layer(engine, form, unet.quest_steps, weights)
            new.register_buffer("digest", form.digest())
        except EngineError:
            if not fallback:
                raise
            continue
        unet.set_submodule(name, new)
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and isinstance(module.processor, QuantAttnProcessor) and module.processor.q.enabled:
            try:
                module.processor = make_attention(engine, module.processor, name, module.heads)
            except EngineError:
                if not fallback:
                    raise
    if dtype != torch.float32:
        _cast(unet, dtype)
    _tabulate_time(unet)
    if fuse:
        fuse_blocks(unet)
    if engine == "triton":  # kernels raise flags: a look after each call, not a wait in each layer
        unet.register_forward_hook(lambda module, args, out: triton_engine.check_finite(module))
    return unet


def _cast(unet: nn.Module, dtype: torch.dtype) -> None:
    """What stays in floating point, in `dtype`. Simulated layers need float32: their grids would change."""
    for name, module in unet.named_modules():
        if isinstance(module, QuantLayer) or isinstance(module, QuantAttnProcessor) and not isinstance(module, ATTENTION):
            raise ConfigError(f"{name} stays simulated and needs dtype float32, found {dtype}")
    for module in unet.modules():
        if isinstance(module, (ActQuantizer, *LAYERS, triton_engine.TritonAttention)):
            continue  # their tables stay as they are; an attention's quantizers are read off already
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


# ---- time-embedding layers: their output depends on the timestep alone ----


class TimeTable(nn.Module):
    """Stands in for a layer of the time path: computes each timestep's row once and repeats it, for every batch and every run.

    Bit-identical to the layer itself: integer sums do not depend on the batch, and their rescaling is element by element.
    """

    def __init__(self, layer: nn.Module, steps: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.rows: dict[float, torch.Tensor] = {}
        self.__dict__["steps"] = steps

    def _apply(self, *args, **kwargs):
        self.rows.clear()  # of another device, or in another precision
        return super()._apply(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        t = self.steps.timestep
        if t is None:  # a batch of several timesteps
            return self.layer(x, *args)
        if t not in self.rows:
            self.rows[t] = self.layer(x[:1], *args)
        return self.rows[t].expand(x.shape[0], -1)


def depends_on_time_alone(unet: nn.Module) -> bool:
    """Whether nothing but the timestep enters the embedding (no labels, no added conditions)."""
    keys = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim")
    return all(unet.config.get(key) is None for key in keys)


def _tabulate_time(unet: nn.Module) -> None:
    if not depends_on_time_alone(unet):
        return
    unet.time_embedding = TimeTable(unet.time_embedding, unet.quest_steps)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            module.time_emb_proj = TimeTable(module.time_emb_proj, unet.quest_steps)


# ---- report ----


def engine_report(unet: nn.Module) -> pd.DataFrame:
    """One row a layer: name, engine that really runs it, format, bytes of its weights in the checkpoint and in memory."""
    rows = []
    for name, module in unet.named_modules():
        if isinstance(module, LAYERS):
            rows.append((name, module.engine, module.format, module.packed_bytes, module.resident_bytes))
        elif isinstance(module, ATTENTION):
            rows.append((name.removesuffix(".processor"), module.engine, module.format, 0, 0))
        elif isinstance(module, QuantLayer | nn.Linear | nn.Conv2d):
            quantized = isinstance(module, QuantLayer) and (module.wq is not None or module.act.enabled)
            simulated = quantized and (module.act.enabled or module.weights_on)
            engine = "fake" if simulated else str(module.weight.dtype).removeprefix("torch.")
            size = module.weight.numel() * module.weight.element_size()
            packed = packed_size(module.weight.numel(), module.wq.bits) if simulated and module.wq is not None else size
            rows.append((name, engine, "simulated" if simulated else "not quantized", packed, size))
        elif isinstance(module, QuantAttnProcessor):
            rows.append((name.removesuffix(".processor"), "fake", "simulated", 0, 0))
    return pd.DataFrame(rows, columns=["layer", "engine", "format", "checkpoint bytes", "resident bytes"])
