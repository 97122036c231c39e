"""Which attentions run faster with their products in floating point than in integers.

An attention computes its softmax in float32 between the two products. The integer kernel needs the
largest score of a row before it can take codes, and so goes over the scores twice; torch's fused
attention in half precision goes once. For heads of up to `NARROW` channels that costs more than
products of bytes save, by the estimate of `benchmarks/roofline.py`.

Products in floating point are other numbers than quantized ones. So the choice is never made
without being asked for, it takes the quantizers out of the simulation as well, and it stands in the
config (`QuantConfig.float_attention`) and in `engine_report`.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.diffusers_quantizer import attach
from questlib.errors import ConfigError
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.preparation import leave_in_float
from questlib.quantization.seal import seal

CHOICES = ("quantized", "float", "auto")
NARROW = 128  # channels of a head


def check_attention(choice: str) -> None:
    """ConfigError unless it is one of `CHOICES`."""
    if choice not in CHOICES:
        expected = ", ".join(CHOICES)
        raise ConfigError(f"attention: expected one of {expected}, found {choice!r}")


def faster_in_float(head: int) -> bool:
    """Whether products of heads with so many channels are faster in floating point."""
    return head <= NARROW


def apply_attention(unet: nn.Module, choice: str) -> None:
    """Leave attentions of a quantized UNet in floating point, in place, and say so in its config.

    Args:
        unet: a simulated UNet.
        choice: "quantized" leaves the UNet as it is, "float" takes all attentions, "auto" those
            that are faster so.

    Raises:
        ConfigError: another choice.
    """
    check_attention(choice)
    if choice == "quantized":
        return
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        and isinstance(module.processor, QuantAttnProcessor)
        and module.processor.q.enabled
        and (choice == "float" or faster_in_float(module.to_q.out_features // module.heads))
    ]
    if not names:
        return
    leave_in_float(unet, names)
    config = unet.quest_config
    unet.quest_config = config.replace(float_attention=[*config.float_attention, *names])
    attach(unet)
    seal(unet)
