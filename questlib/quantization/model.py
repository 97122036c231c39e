"""The parts and the modes of a quantized UNet."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from questlib.config import OFF
from questlib.errors import ConfigError
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.layers import QuantLayer
from questlib.quantization.step_groups import StepGroups


def quant_layers(unet: nn.Module) -> dict[str, QuantLayer]:
    return {n: m for n, m in unet.named_modules() if isinstance(m, QuantLayer)}


def act_quantizers(module: nn.Module) -> Iterator[ActQuantizer]:
    return (m for m in module.modules() if isinstance(m, ActQuantizer))


def step_groups(unet: nn.Module) -> StepGroups:
    groups = getattr(unet, "quest_steps", None)
    if groups is None:
        raise ConfigError(
            f"expected a UNet made by questlib.quantize, found a plain {type(unet).__name__}"
        )
    return groups


def set_mode(module: nn.Module, *, weights: bool | None = None, acts: bool | None = None) -> None:
    """Switch weight and activation quantization on or off (off: the layer is full precision). Frozen weights are thawed."""
    for m in module.modules():
        if isinstance(m, QuantLayer) and weights is not None:
            m.weights_on = weights
            m.thaw()
        elif isinstance(m, ActQuantizer) and acts is not None:
            m.enabled = acts and m.bits != OFF


def freeze(unet: nn.Module) -> nn.Module:
    """Compute every quantized weight once; eval mode; no gradients. The state in which a model samples."""
    unet.requires_grad_(False).eval()
    for layer in quant_layers(unet).values():
        layer.freeze()
    return unet
