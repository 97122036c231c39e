"""Hooks on the named parts of a model: record what they receive and give, stop a run early.

All of them stand on `hooks`, which removes what it registered however the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import nn


class StopForward(Exception):
    """Raised in a hook to stop a forward pass early."""


@contextmanager
def hooks(
    model: nn.Module,
    functions: Mapping[str, Callable[..., Any]],
    kind: Literal["input", "output"] = "output",
) -> Iterator[None]:
    """Call a function at each forward pass of named submodules, inside the block.

    The block ends quietly when a function raises `StopForward`.

    Args:
        model: the model that has the submodules.
        functions: by a submodule's dotted name ("" is the model itself). Each is called as
            ``function(module, args, kwargs)`` before the submodule runs (kind "input"), or as
            ``function(module, args, kwargs, output)`` after it (kind "output"). It returns None,
            or what replaces the input or output (see torch's hooks).
        kind: whether functions run before or after the submodules.

    Example:
        >>> def show(module, args, kwargs, output):
        ...     print(output.sample.shape)
        >>> with hooks(unet, {"": show}):
        ...     unet(x, t)
    """
    handles = []
    try:
        for name, function in functions.items():
            module = model.get_submodule(name)
            if kind == "input":
                handle = module.register_forward_pre_hook(function, with_kwargs=True)
            else:
                handle = module.register_forward_hook(function, with_kwargs=True)
            handles.append(handle)
        with suppress(StopForward):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_outputs(
    model: nn.Module, names: Sequence[str], device: str | None = None, stop: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """A dict that holds the last output of each named submodule, with its gradient history.

    Args:
        model: the model that has the submodules.
        names: their dotted names.
        device: where outputs are kept; None: where they are made.
        stop: leave the block as soon as each of them has run, without the rest of the model.

    Example:
        >>> with capture_outputs(unet, ["conv_in"], stop=True) as outputs:
        ...     unet(x, t)
        >>> outputs["conv_in"].shape
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            outputs[name] = output if device is None else output.to(device)
            if stop and len(outputs) == len(names):
                raise StopForward

        return hook

    with hooks(model, {name: keep(name) for name in names}):
        yield outputs


class Call(NamedTuple):
    """A submodule's call: ``output = submodule(*args, **kwargs)``."""

    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor


@torch.no_grad()
def capture_calls(
    model: nn.Module, name: str, runs: Iterable[Callable[[nn.Module], object]]
) -> list[Call]:
    """The first call of a submodule in each run of the model.

    A run stops after it.

    Args:
        model: the model that has the submodule.
        name: its dotted name.
        runs: functions that run the model once, such as ``batch.run`` of calibration batches.
    """
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        calls.append(Call(args, kwargs, output))
        raise StopForward

    for run in runs:
        with hooks(model, {name: hook}):
            run(model)
    return calls


@torch.no_grad()
def execution_order(
    model: nn.Module, names: Sequence[str], run: Callable[[nn.Module], object]
) -> list[str]:
    """The named submodules in the order in which a run first calls them.

    Those that the run does not call are left out.
    """
    order: dict[str, None] = {}  # a set that keeps its order

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            order.setdefault(name)

        return hook

    with hooks(model, {name: note(name) for name in names}, "input"):
        run(model)
    return list(order)
