"""What the layers and attentions of the Triton engine share: flags for inputs that are not finite,
and tables that keep their precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from questlib.errors import EngineError
from questlib.integer.graph_capture import capturing


class Tables(nn.Module):
    """A module whose tables move with the model and stay float32 under `model.half()`."""

    def hold(self, name: str, value: torch.Tensor | None) -> None:
        """Register a buffer that `.to(device)` moves and the state_dict leaves out."""
        self.register_buffer(name, value, persistent=False)

    moves = 0  # how often the tables were moved

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.moves += 1

        def move(t: torch.Tensor) -> torch.Tensor:
            return t.to(fn(t).device) if t.is_floating_point() else fn(t)

        return super()._apply(move, recurse)


class Flagged(Tables):
    """Tables of a layer whose kernels set `flag` to 1 on an input that is NaN or infinite."""

    name: str
    flag: torch.Tensor  # int32 [1]

    def hold_flag(self, device: torch.device) -> None:
        self.hold("flag", torch.zeros(1, dtype=torch.int32, device=device))


HELD = "quest_flagged"  # where a converted model keeps the list of its flagged modules


def flagged(model: nn.Module) -> list[Flagged]:
    """The modules of a model that have flags."""
    return [m for m in model.modules() if isinstance(m, Flagged)]


def hold_flagged(model: nn.Module) -> None:
    """Keep the list, for models whose modules stay in their places: to walk them takes longer."""
    model.__dict__[HELD] = flagged(model)


@torch.compiler.disable
def check_finite(model: nn.Module) -> None:
    """Check the inputs of all layers since the last check.

    While a CUDA graph is captured nothing can be read: the next check outside sees what the
    graph's replays have flagged.

    Raises:
        EngineError: one was NaN or infinite; the message names the model's first such layer.
    """
    if capturing():
        return
    layers = model.__dict__.get(HELD) or flagged(model)
    if not layers:
        return
    flags = torch.cat([layer.flag for layer in layers])
    if bool(flags.any()):
        for layer in layers:
            layer.flag.zero_()
        first = layers[int(flags.cpu().argmax())]
        raise EngineError(f"{first.name}: its input was not finite (NaN or infinity)")
