"""From the timestep of a UNet's call to the step group whose activation scales apply.

The official release maps steps to quantizers by a hard-coded `i % 10`. Here the group follows from
the timestep itself, so that a model may sample with other steps than it was calibrated with.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from questlib.errors import ConfigError, TimestepWarning
from questlib.quantization.precision import FixedPrecision


def contiguous_groups(num_steps: int, num_groups: int) -> torch.Tensor:
    """The group of each sampler step, int64 [num_steps]: runs of (nearly) equal length.

    Raises:
        ConfigError: there are fewer steps than groups, or no group.
    """
    if not 1 <= num_groups <= num_steps:
        raise ConfigError(
            f"step_groups: expected 1..{num_steps} for {num_steps} calibrated steps, "
            f"found {num_groups}"
        )
    return torch.arange(num_steps) * num_groups // num_steps


def nearest(timesteps: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of `timesteps` [T] to each t (any shape, B elements).

    Returns:
        Its index, int64 [B], and its distance [B].
    """
    t = t.float() if t.is_floating_point() else t
    distance = (t.reshape(-1, 1).to(timesteps.device) - timesteps[None]).abs()  # [B, T]
    index = distance.argmin(1)
    return index, distance.gather(1, index[:, None])[:, 0]


class StepGroups(FixedPrecision):
    """The calibrated timesteps of a UNet, and the step group of its present call.

    All quantizers of a UNet share one object. `select` is the only way to choose the group: the
    UNet's pre-hook `hook` calls it for every forward pass. `select_group` is for callers that know
    the group and have no timestep, such as a block that runs alone.

    Args:
        timesteps: int64 or float32 [T], in any order.
        groups: the group of each of them, int64 [T].

    Attributes:
        current: the group that is selected, an int, or int64 [B] where the batch has several.
        timestep: the timestep that is selected, or None where the batch has several.
    """

    timesteps: torch.Tensor  # int64 or float32 [T], ascending
    groups: torch.Tensor  # int64 [T]

    def __init__(self, timesteps: torch.Tensor, groups: torch.Tensor) -> None:
        super().__init__()
        order = timesteps.argsort()
        self.register_buffer("timesteps", timesteps[order].clone())
        self.register_buffer("groups", groups[order].to(torch.int64).clone())
        # Looked up on the CPU, where they stay when accelerate offloads the model's tensors.
        self._table = (self.timesteps.cpu(), self.groups.cpu())
        self._current: int | torch.Tensor = 0
        self._timestep: int | float | None = None
        self._warned: set[float] = set()

    @property
    def num_groups(self) -> int:
        """Number of step groups."""
        return int(self.groups.max()) + 1

    def first_steps(self) -> torch.Tensor:
        """The timestep with which the sampler enters each group [G]."""
        return torch.stack([self.timesteps[self.groups == g].max() for g in range(self.num_groups)])

    @property
    def current(self) -> int | torch.Tensor:
        """The selected group: an int, or int64 [B] where the batch has several."""
        return self._current

    def current_of(self, rows: int) -> int | torch.Tensor:
        """The selected group of each row of an input: an int, or int64 [rows] or [B].

        PixArt's embedders of sizes get two rows a sample, one after the other.
        """
        group = self._current
        if isinstance(group, int) or rows <= len(group):
            return group
        return group.repeat_interleave(rows // len(group))

    @property
    def timestep(self) -> int | float | None:
        """The selected timestep, or None where the batch has several."""
        return self._timestep

    def lookup(self, t: torch.Tensor) -> int | torch.Tensor:
        """The group of the calibrated timestep that is nearest to each t.

        Warns once about every timestep that is farther from all calibrated ones than the widest
        gap between them.

        Args:
            t: timesteps of any shape, with one element or one for each sample.

        Returns:
            An int where all agree, else int64 [B].
        """
        timesteps, of_step = self._table
        device = self.groups.device
        t = t.reshape(-1).cpu()
        index, distance = nearest(timesteps, t)
        self._warn_if_far(t, distance)
        groups = of_step[index]
        return int(groups[0]) if bool((groups == groups[0]).all()) else groups.to(device)

    def select(self, t: torch.Tensor) -> None:
        """Select the groups of timesteps `t`, one element or one for each sample."""
        t = t.reshape(-1)
        self._current = self.lookup(t)
        self._timestep = t[0].item() if bool((t == t[0]).all()) else None

    def select_group(self, group: int | torch.Tensor) -> None:
        """Select a group, or int64 [B] one for each sample; the timestep is unknown then."""
        self._current = group
        self._timestep = None

    @torch.compiler.disable
    def hook(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Select the group of a denoiser's call, from its argument `timestep`.

        Not a part of what torch.compile compiles: there is one program for each step group, not for
        each timestep.
        """
        # here, so that the engine also loads where diffusers is missing
        from questlib.denoisers import timestep_of

        self.select(torch.as_tensor(timestep_of(module, args, kwargs)))

    def _warn_if_far(self, t: torch.Tensor, distance: torch.Tensor) -> None:
        steps, _ = self._table
        limit = (steps[1:] - steps[:-1]).max().item() if len(steps) > 1 else 1
        far = sorted({v.item() for v in t[distance > limit]} - self._warned)
        if far:
            self._warned.update(far)
            warnings.warn(
                f"timesteps {far} are farther than {limit:g} from every calibrated timestep "
                f"({steps[0].item():g}..{steps[-1].item():g}); the nearest group's scales are used",
                TimestepWarning,
                stacklevel=2,
            )
