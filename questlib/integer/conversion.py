"""convert(unet) -> the same diffusers class, its quantized layers run in integers. engine_report(unet): how, layer by layer."""

from __future__ import annotations

import copy

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.errors import ConfigError, EngineError
from questlib.integer.engines import (
    ATTENTION,
    CPU_ENGINES,
    LAYERS,
    WEIGHTS,
    choose_engine,
    make_attention,
    make_layer,
)
from questlib.integer.form import integer_form
from questlib.integer.time_table import _tabulate_time
from questlib.integer.triton import layers
from questlib.integer.triton.fused import fuse as fuse_blocks
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import quant_layers, step_groups


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
        raise ConfigError(
            f"weights and fuse are choices of engine triton, found weights {weights!r}, fuse {fuse} for {engine}"
        )
    if engine in CPU_ENGINES and unet.device.type != "cpu":
        raise EngineError(f"engine {engine} needs the model on the CPU, found {unet.device}")
    unet = unet if inplace else copy.deepcopy(unet)
    unet.requires_grad_(False).eval()
    for name, layer in quant_layers(unet).items():
        if (
            layer.weight_quantizer is None
            or not layer.weights_on
            or not layer.input_quantizer.enabled
        ):
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
        if (
            isinstance(module, Attention)
            and isinstance(module.processor, QuantAttnProcessor)
            and module.processor.q.enabled
        ):
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
        unet.register_forward_hook(lambda module, args, out: layers.check_finite(module))
    return unet


def _cast(unet: nn.Module, dtype: torch.dtype) -> None:
    """What stays in floating point, in `dtype`. Simulated layers need float32: their grids would change."""
    for name, module in unet.named_modules():
        if (
            isinstance(module, QuantLayer)
            or isinstance(module, QuantAttnProcessor)
            and not isinstance(module, ATTENTION)
        ):
            raise ConfigError(f"{name} stays simulated and needs dtype float32, found {dtype}")
    for module in unet.modules():
        if isinstance(module, (ActQuantizer, *LAYERS, layers.TritonAttention)):
            continue  # their tables stay as they are; an attention's quantizers are read off already
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
