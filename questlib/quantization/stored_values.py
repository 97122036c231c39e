"""Checks of the values that a file gives to quantizers, before they are used."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from questlib.config import OFF
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.carrier import CARRIER_MULTIPLIER, CARRIER_SHIFT
from questlib.quantization.weight_quantizer import WeightQuantizer


def wrong_act_values(quantizer: ActQuantizer, values: Mapping[str, torch.Tensor]) -> list[str]:
    """What an activation quantizer cannot have, each as its tensor's last name and the reason.

    Args:
        quantizer: made from the configuration, not from the values.
        values: "scale", "zero_point", "ratio" and "shift", of the quantizer's own shapes, finite,
            as whole numbers of any type where they are whole.
    """
    no_offset = quantizer.unsigned or quantizer.token or quantizer.bits == OFF
    wrong = _wrong_grid(values, 0 if no_offset else 2**quantizer.bits - 1)
    ratio = values["ratio"].double()
    shift = values["shift"].double()
    largest = CARRIER_SHIFT if quantizer.carrier and quantizer.shifts else 0
    if not _whole(shift, 0, largest):
        return [*wrong, f"shift (expected whole numbers 0..{largest})"]
    multiplier = ratio / 2**shift
    if not _whole(multiplier, 1, CARRIER_MULTIPLIER if quantizer.carrier else 1):
        grid = f"m * 2^e with m in 1..{CARRIER_MULTIPLIER}" if quantizer.carrier else "1"
        wrong.append(f"ratio (expected {grid})")
    return wrong


def wrong_weight_values(
    quantizer: WeightQuantizer, values: Mapping[str, torch.Tensor]
) -> list[str]:
    """The same for the quantizer of a weight: "scale" and "zero_point"."""
    return _wrong_grid(values, 2**quantizer.bits - 1)


def _wrong_grid(values: Mapping[str, torch.Tensor], largest_zero: int) -> list[str]:
    wrong = [] if bool((values["scale"] > 0).all()) else ["scale (expected positive numbers)"]
    if not _whole(values["zero_point"].double(), 0, largest_zero):
        wrong.append(f"zero_point (expected whole numbers 0..{largest_zero})")
    return wrong


def _whole(values: torch.Tensor, low: int, high: int) -> bool:
    inside = (values >= low) & (values <= high) & (values == values.round())
    return bool(inside.all())
