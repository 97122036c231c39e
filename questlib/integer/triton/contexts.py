"""Keys and values of a context, which stays the same over a sampler's steps: computed once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

KeysAndValues = tuple[torch.Tensor, ...]


class _Held(NamedTuple):
    context: weakref.ref[torch.Tensor]
    version: int  # how often the context had been changed in place
    made: KeysAndValues


class Contexts:
    """What was made of the last context, for each step group.

    A copy of it is empty: it holds nothing that could not be made again.
    """

    def __init__(self) -> None:
        self.held: dict[int, _Held] = {}

    def __reduce__(self) -> tuple:
        return Contexts, ()

    def get(
        self, group: int, context: torch.Tensor, make: Callable[[], KeysAndValues]
    ) -> KeysAndValues:
        """Keys and values of a context, made when it is another one or was changed.

        Tensors of torch.inference_mode do not say when they are changed: nothing is held of them.
        """
        if context.is_inference():
            return make()
        held = self.held.get(group)
        version = context._version
        if held is None or held.context() is not context or held.version != version:
            held = _Held(weakref.ref(context), version, make())
            self.held[group] = held
        return held.made
