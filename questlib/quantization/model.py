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
    """The quantized layers by name, in the order of the model's modules."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, QuantLayer)}


def act_quantizers(module: nn.Module) -> Iterator[ActQuantizer]:
    """All quantizers of activations: inputs of layers, and operands of attention."""
    return (m for m in module.modules() if isinstance(m, ActQuantizer))


def step_groups(unet: nn.Module) -> StepGroups:
    """The step groups of a quantized UNet. ConfigError for a plain one."""
    groups = getattr(unet, "quest_steps", None)
    if groups is None:
        raise ConfigError(
            f"expected a UNet made by questlib.quantize, found a plain {type(unet).__name__}"
        )
    return groups


def set_mode(module: nn.Module, *, weights: bool | None = None, acts: bool | None = None) -> None:
    """Switch the quantization of weights and of activations on or off.

    Off, they are in full precision. Switching weights thaws them.

    Args:
        module: a quantized UNet, or a part of it.
        weights: on or off; None: as it is.
        acts: on or off; None: as it is.
    """
    for m in module.modules():
        if isinstance(m, QuantLayer) and weights is not None:
            m.weights_on = weights
            m.thaw()
        elif isinstance(m, ActQuantizer) and acts is not None:
            m.enabled = acts and m.bits != OFF


def freeze(unet: nn.Module) -> nn.Module:
    """Prepare a quantized UNet for sampling, in place; returns it.

    Every weight is quantized once, the model is in eval mode, and nothing has a gradient.
    """
    unet.requires_grad_(False).eval()
    for act in act_quantizers(unet):
        act.note_calibrated()
    for layer in quant_layers(unet).values():
        layer.freeze()
    return unet
