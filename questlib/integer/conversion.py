"""`convert`: the same diffusers class, with its quantized layers run in integers."""

from __future__ import annotations

import copy

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.errors import EngineError
from questlib.integer.engines import choose_engine
from questlib.integer.float_attention import apply_attention, check_attention
from questlib.integer.form import integer_form
from questlib.integer.modules import TransformedLayer
from questlib.integer.time_table import tabulate_time
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import quant_layers, step_groups
from questlib.quantization.precision import cast
from questlib.quantization.seal import check_whole, seal


def convert(
    unet: nn.Module,
    engine: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    weights: str = "packed",
    fuse: bool = False,
    graphs: bool = False,
    attention: str = "quantized",
    fallback: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Run a quantized UNet's layers in integers, exactly as fake quantization simulates them.

    Layers of the time path depend on the timestep alone: each timestep's row is computed once,
    bit-identically (`time_table`).

    Args:
        unet: a UNet made by `questlib.quantize` or `questlib.from_pretrained`.
        engine: "cpu" (oneDNN int8), "triton" (NVIDIA GPUs), "reference" (the same integers in
            float64, slow), or "auto": triton where there is a GPU, otherwise cpu.
        dtype: of all that stays in floating point (norms, the softmax's input, residuals); None:
            the UNet's own.
        weights: how the Triton engine holds weights in memory: "packed", two 4-bit codes a byte,
            or "int8", twice as large with nothing to unpack.
        fuse: whether the CPU and Triton engines run norm, SiLU and quantization of a ResNet
            block's input in one kernel, and so on. Values are then rounded in another order before
            the codes are taken, so that single codes differ by one from those of the unfused
            model. On the CPU it needs the compiled kernels.
        graphs: whether the Triton engine runs a step as one CUDA graph, captured at the first call
            of each step group and shape.
        attention: "quantized" runs attention's products as they were quantized. "float" runs them
            in floating point, by torch's fused attention, and "auto" those that are faster so on a
            GPU (`integer.float_attention`). This changes the numbers: the converted UNet's
            `quest_config.float_attention` and `engine_report` name these attentions.
        fallback: whether layers without integer form stay simulated, which `engine_report` shows.
        inplace: whether to convert `unet` itself, layer by layer, in half the memory.

    Returns:
        The converted UNet: frozen, in eval mode.

    Raises:
        ConfigError: a plain UNet, an unknown engine, or a choice that the engine does not have.
        EngineError: the engine cannot run here or cannot fuse, or a layer has no integer form and
            there is no fallback; the message names the layer.

    Example:
        >>> unet = convert(questlib.quantize(pipe.unet, config, calib), "cpu")
        >>> print(questlib.engine_report(unet))
    """
    chosen = choose_engine(engine)
    step_groups(unet)
    options = {"weights": weights, "fuse": fuse, "graphs": graphs}
    chosen.check_options(options)
    check_attention(attention)
    if unet.device.type not in ("cpu", chosen.device):
        raise EngineError(
            f"engine {chosen.name} needs the model on {chosen.device}, found {unet.device}"
        )
    unet = unet if inplace else copy.deepcopy(unet)
    unet.requires_grad_(False).eval()
    check_whole(unet)
    apply_attention(unet, attention)
    dtype = unet.dtype if dtype is None else dtype

    for name, layer in quant_layers(unet).items():
        if not _runs_in_integers(layer):
            continue
        new: nn.Module
        try:
            new = chosen.make_layer(integer_form(layer, name), unet.quest_steps, options)
        except EngineError:
            if not fallback:
                raise
            continue
        if layer.transform is not None:
            new = TransformedLayer(new, layer.transform)
        unet.set_submodule(name, new)

    for name, module in unet.named_modules():
        if not isinstance(module, Attention):
            continue
        processor = module.processor
        if isinstance(processor, QuantAttnProcessor) and processor.q.enabled:
            try:
                module.processor = chosen.make_attention(processor, name, module.heads)
            except EngineError:
                if not fallback:
                    raise

    cast(unet, dtype)  # what runs in integers keeps its tables
    tabulate_time(unet)
    if chosen.finish is not None:
        chosen.finish(unet, options)
    seal(unet)
    unet.quest_engine = chosen.name
    unet.quest_fused = fuse
    after_call = chosen.after_call
    if after_call is not None:
        unet.register_forward_hook(lambda module, args, out: after_call(module))
    return unet


def _runs_in_integers(layer: QuantLayer) -> bool:
    """Whether both operands are quantized: the config can leave either in floating point."""
    quantized = layer.weight_quantizer is not None and layer.weights_on
    return quantized and layer.input_quantizer.enabled
