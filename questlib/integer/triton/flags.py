"""What the layers and attentions of the Triton engine share: flags for inputs that are not finite,
and tables that keep their precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from questlib.errors import EngineError


class Tables(nn.Module):
    """A module whose tables move with the model and stay float32 under `model.half()`."""

    def hold(self, name: str, value: torch.Tensor | None) -> None:
        """Register a buffer that `.to(device)` moves and the state_dict leaves out."""
        self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        def move(t: torch.Tensor) -> torch.Tensor:
            return t.to(fn(t).device) if t.is_floating_point() else fn(t)

        return super()._apply(move, recurse)


class Flagged(Tables):
    """Tables of a layer whose kernels set `flag` to 1 on an input that is NaN or infinite."""

    name: str
    flag: torch.Tensor  # int32 [1]

    def hold_flag(self, device: torch.device) -> None:
        self.hold("flag", torch.zeros(1, dtype=torch.int32, device=device))


def check_finite(model: nn.Module) -> None:
    """Check the inputs of all layers since the last check.

    While a CUDA graph is captured nothing can be read: the next check outside sees what the
    graph's replays have flagged.

    Raises:
        EngineError: one was NaN or infinite; the message names the model's first such layer.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    layers = [m for m in model.modules() if isinstance(m, Flagged)]
    if not layers:
        return
    flags = torch.cat([layer.flag for layer in layers])
    if bool(flags.any()):
        for layer in layers:
            layer.flag.zero_()
        first = layers[int(flags.cpu().argmax())]
        raise EngineError(f"{first.name}: its input was not finite (NaN or infinity)")
