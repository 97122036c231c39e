"""What keeps float32 while a model changes its precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class FixedPrecision(nn.Module):
    """A module whose tensors move with the model, but stay in their own precision.

    Scales of small ranges are zero in float16, and its timesteps are wrong above 2048.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put a diffusers model into another precision, in place; returns it.

    torch's own `to`: diffusers' warns of modules that it would keep, which the quantized ones do.
    """
    return model if model.dtype == dtype else nn.Module.to(model, dtype)
