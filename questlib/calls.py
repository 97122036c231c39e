"""Recorded calls of a denoiser: all that it received, in any nesting, and what it returned.

A call's arguments are a tree of dicts, lists and tuples. Its tensors with a batch dimension become
rows, one a sample, so that samples of several calls can be drawn into one batch. Tensors without
one, numbers and texts are constants. Calls whose trees, shapes of a row and constants agree are in
one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from questlib.denoisers import predict
from questlib.diffusion.sampling import device_of
from questlib.errors import CheckpointError, ConfigError
from questlib.integrity import LATEST, check_finite, fail_if_any

# ---- trees of arguments ----


@dataclass(frozen=True)
class Slot:
    """Where a tensor stands in a tree of arguments."""

    name: str
    """The dotted path to it, such as "added_cond_kwargs.time_ids"."""


def take_tensors(tree: Any, name: str = "") -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the tensors out of a tree.

    Args:
        tree: dicts, lists and tuples of tensors, numbers, texts and None.
        name: of the tree itself, for the names of what is in it.

    Returns:
        The tree with a `Slot` in the place of each tensor, and the tensors by their slots' names.

    Raises:
        ConfigError: something else is in the tree.

    Example:
        >>> take_tensors({"x": torch.ones(2), "scale": 1.0})
        ({'x': Slot(name='x'), 'scale': 1.0}, {'x': tensor([1., 1.])})
    """
    if torch.is_tensor(tree):
        return Slot(name), {name: tree}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree, {}
    if isinstance(tree, dict):
        items = [(key, f"{name}.{key}" if name else str(key)) for key in tree]
        parts = {key: take_tensors(tree[key], path) for key, path in items}
        skeleton: Any = {key: part for key, (part, _) in parts.items()}
        found = list(parts.values())
    elif isinstance(tree, list | tuple):
        found = [take_tensors(value, f"{name}.{i}") for i, value in enumerate(tree)]
        skeleton = [part for part, _ in found]
        skeleton = tuple(skeleton) if isinstance(tree, tuple) else skeleton
    else:
        raise ConfigError(
            f"calibrate: the denoiser received {name} = {type(tree).__name__}; expected tensors, "
            "numbers, texts, and dicts, lists and tuples of them"
        )
    return skeleton, {key: tensor for _, own in found for key, tensor in own.items()}


def take_slots(skeleton: Any) -> list[str]:
    """The names of all slots in a tree without tensors."""
    if isinstance(skeleton, Slot):
        return [skeleton.name]
    parts = list(skeleton.values()) if isinstance(skeleton, dict) else skeleton
    return (
        [n for part in parts for n in take_slots(part)] if isinstance(parts, list | tuple) else []
    )


def put_tensors(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `take_tensors`."""
    if isinstance(skeleton, Slot):
        return tensors[skeleton.name]
    if isinstance(skeleton, dict):
        return {key: put_tensors(value, tensors) for key, value in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        return type(skeleton)(put_tensors(value, tensors) for value in skeleton)
    return skeleton


def skeleton_to_json(skeleton: Any) -> Any:
    """A tree without tensors in values that JSON holds; `skeleton_from_json` is the inverse."""
    if isinstance(skeleton, Slot):
        return {"slot": skeleton.name}
    if isinstance(skeleton, dict):
        return {"dict": [[key, skeleton_to_json(value)] for key, value in skeleton.items()]}
    if isinstance(skeleton, list | tuple):
        return {type(skeleton).__name__: [skeleton_to_json(value) for value in skeleton]}
    return {"value": skeleton}


def skeleton_from_json(value: Any) -> Any:
    """The tree that `skeleton_to_json` has written. CheckpointError for anything else."""
    try:
        ((kind, content),) = value.items()
        if kind == "slot":
            return Slot(content)
        if kind == "dict":
            return {key: skeleton_from_json(part) for key, part in content}
        if kind in ("list", "tuple"):
            parts = [skeleton_from_json(part) for part in content]
            return tuple(parts) if kind == "tuple" else parts
        if kind == "value":
            return content
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"calibration: not a tree of arguments ({error})") from error
    raise CheckpointError(f"calibration: not a tree of arguments: {kind!r}")


# ---- a batch of calls ----


@dataclass(frozen=True)
class Batch:
    """B calls of a denoiser, and what the full-precision one returned. All is on the CPU.

    Attributes:
        t: timesteps [B], or [] where all are the same.
        eps: outputs [B, C, h, w].
        rows: the arguments' tensors with a batch dimension [B, ...], by the names of their slots.
        constants: their tensors without one.
        skeleton: the arguments by keyword, but for the timestep, with slots in place of tensors.
            x_t is "sample", whatever the denoiser's own name for it.
    """

    t: torch.Tensor
    eps: torch.Tensor
    rows: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    skeleton: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def plain(
        cls,
        x: torch.Tensor,
        t: torch.Tensor,
        eps: torch.Tensor,
        context: torch.Tensor | None = None,
    ) -> Batch:
        """Calls with x [B, C, h, w], t and, at most, `encoder_hidden_states` [B, L, D]."""
        rows = {"sample": x}
        if context is not None:
            rows["encoder_hidden_states"] = context
        return cls(t, eps, rows, {}, {name: Slot(name) for name in rows})

    @property
    def x(self) -> torch.Tensor:
        """Inputs x_t [B, C, h, w]."""
        return self.rows["sample"]

    @property
    def context(self) -> torch.Tensor | None:
        """`encoder_hidden_states` [B, L, D]; None where there are none."""
        return self.rows.get("encoder_hidden_states")

    def __len__(self) -> int:
        return len(self.eps)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(
            self.t if self.t.ndim == 0 else self.t[rows],
            self.eps[rows],
            {name: value[rows] for name, value in self.rows.items()},
            self.constants,
            self.skeleton,
        )

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` calls; the last one may have fewer."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def without(self, *arguments: str) -> Batch:
        """The same calls without some of their arguments, by keyword."""
        kept = {k: v for k, v in self.skeleton.items() if k not in arguments}
        rows = {k: v for k, v in self.rows.items() if k.split(".")[0] not in arguments}
        return Batch(self.t, self.eps, rows, self.constants, kept)

    def arguments(self, unet: nn.Module) -> dict[str, Any]:
        """The keyword arguments on a UNet's device, without the timestep.

        What had the precision of x when it was recorded has the UNet's own now.
        """
        recorded = self.x.dtype
        device = device_of(unet)
        tensors = {
            name: value.to(device, unet.dtype if value.dtype == recorded else value.dtype)
            for name, value in (self.constants | self.rows).items()
        }
        return put_tensors(self.skeleton, tensors)

    def run(self, unet: nn.Module) -> torch.Tensor:
        """A UNet's output for these calls [B, C, h, w], on its own device."""
        arguments = self.arguments(unet)
        return predict(unet, arguments.pop("sample"), self.t.to(device_of(unet)), **arguments)


# ---- a table of calls ----


class Column(NamedTuple):
    """Rows of a table of T steps and N samples; equal ones are stored once.

    values: [K, ...].
    rows: which of them each call has, int64 [T, N].
    """

    values: torch.Tensor
    rows: torch.Tensor

    def at(self, step: int | torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """The rows of samples `which` int64 [B], at one step or at a step each: [B, ...]."""
        return self.values[self.rows[step, which]]

    def fits(self, grid: torch.Size) -> bool:
        """Whether there is one of the values for each call of a grid [T, N]."""
        rows = self.rows
        whole = rows.dtype == torch.int64 and rows.shape == grid and self.values.ndim > 0
        return whole and bool(((rows >= 0) & (rows < len(self.values))).all())

    @property
    def in_order(self) -> bool:
        """Whether the values stand as the table's calls do, step by step."""
        steps, width = self.rows.shape
        expected = torch.arange(steps * width).view(steps, width)
        return len(self.values) == steps * width and torch.equal(self.rows, expected)

    @property
    def same_at_all_steps(self) -> bool:
        """Whether sample n has value n at every step."""
        expected = torch.arange(self.rows.shape[1]).expand_as(self.rows)
        return len(self.values) == self.rows.shape[1] and torch.equal(self.rows, expected)

    def grid(self) -> torch.Tensor:
        """All rows as [T, N, ...]; a view where they stand in this order."""
        if self.in_order:
            return self.values.unflatten(0, self.rows.shape)
        return self.values[self.rows]


@dataclass
class CallTable:
    """Calls at T steps, N samples each, whose arguments agree in structure and shapes.

    Attributes:
        t: the timestep of each step [T], float32 or int64.
        eps: the outputs.
        inputs: the arguments' tensors with a batch dimension, by the names of their slots.
        constants: their tensors without one.
        skeleton: the arguments by keyword, but for the timestep.
    """

    t: torch.Tensor
    eps: Column
    inputs: dict[str, Column]
    constants: dict[str, torch.Tensor]
    skeleton: dict[str, Any]

    @property
    def width(self) -> int:
        """N."""
        return self.eps.rows.shape[1]

    @property
    def plain(self) -> bool:
        """Whether x, eps [T, N, ...] and, at most, one context [N, ...] are all there is."""
        context = self.inputs.get("encoder_hidden_states")
        return (
            set(self.skeleton) == set(self.inputs) <= {"sample", "encoder_hidden_states"}
            and not self.constants
            and self.eps.in_order
            and self.inputs["sample"].in_order
            and (context is None or context.same_at_all_steps)
        )

    def batch(self, step: int | torch.Tensor, which: torch.Tensor) -> Batch:
        """The calls of samples `which` int64 [B], at one step or at a step each [B]."""
        rows = {name: column.at(step, which) for name, column in self.inputs.items()}
        eps = self.eps.at(step, which)
        return Batch(self.t[step], eps, rows, self.constants, self.skeleton)

    def check(self) -> None:
        """Check that all parts of a table from a file fit together.

        Raises:
            CheckpointError: they do not; the message names the part.
        """
        grid = self.eps.rows.shape
        slots = set(take_slots(self.skeleton))
        wrong = {
            "t": self.t.ndim != 1 or len(grid) != 2 or len(self.t) != grid[0] or 0 in grid,
            "t's type": self.t.dtype not in (torch.int64, torch.float32),
            "t's range": bool(((self.t >= LATEST) | (self.t <= -LATEST)).any()),
            "its arguments": slots != self.inputs.keys() | self.constants.keys(),
            "sample": "sample" not in self.inputs,
            "constants": bool(self.inputs.keys() & self.constants.keys()),
        }
        floats = {"t": self.t, "eps": self.eps.values, **self.constants}
        for name, column in {"eps": self.eps, **self.inputs}.items():
            wrong[name] = wrong.get(name, False) or not column.fits(grid)
            floats[name] = column.values
        if not self.eps.values.is_floating_point():
            wrong["eps"] = True
        fail_if_any("tensors", {"do not fit": [name for name, is_so in wrong.items() if is_so]})
        check_finite("tensors", floats)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by the names that a file gives them."""
        found = {"t": self.t, "eps.values": self.eps.values, "eps.rows": self.eps.rows}
        for name, column in self.inputs.items():
            found |= {f"inputs.{name}.values": column.values, f"inputs.{name}.rows": column.rows}
        return found | {f"constants.{name}": value for name, value in self.constants.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], skeleton: Any) -> CallTable:
        """The inverse of `tensors`. KeyError where one is missing."""
        inputs = {
            name: Column(tensors[f"inputs.{name}.values"], tensors[f"inputs.{name}.rows"])
            for name in _names(tensors, "inputs.", ".values")
        }
        constants = {name: tensors[f"constants.{name}"] for name in _names(tensors, "constants.")}
        eps = Column(tensors["eps.values"], tensors["eps.rows"])
        return cls(tensors["t"], eps, inputs, constants, skeleton)

    @classmethod
    def regular(
        cls,
        x: torch.Tensor,
        t: torch.Tensor,
        eps: torch.Tensor,
        context: torch.Tensor | None = None,
        argument: str = "encoder_hidden_states",
    ) -> CallTable:
        """N trajectories of T steps: x, eps [T, N, ...], t [T], context [N, ...] or None.

        Args:
            argument: the denoiser's name for the context.
        """
        steps, width = x.shape[:2]
        each = torch.arange(steps * width).view(steps, width)
        inputs = {"sample": Column(x.flatten(0, 1), each.clone())}  # files hold no tensor twice
        if context is not None:
            same = torch.arange(width).expand(steps, width)
            inputs[argument] = Column(context, same)
        skeleton = {name: Slot(name) for name in inputs}
        return cls(t, Column(eps.flatten(0, 1), each), inputs, {}, skeleton)


def _names(tensors: Mapping[str, torch.Tensor], start: str, end: str = "") -> list[str]:
    """What stands between `start` and `end` in the names that have both."""
    named = [name for name in tensors if name.startswith(start) and name.endswith(end)]
    return sorted(name[len(start) : len(name) - len(end)] for name in named)
