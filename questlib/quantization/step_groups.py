"""From the timestep that a UNet is called with to the calibrated step group whose activation scales apply.

The official release maps steps to quantizers by a hard-coded `i % 10`; here the group follows from the timestep itself.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from questlib.errors import ConfigError, TimestepWarning


def contiguous_groups(num_steps: int, num_groups: int) -> torch.Tensor:
    """Group of each of `num_steps` sampler steps, int64 [T]: `num_groups` runs of (nearly) equal length."""
    if not 1 <= num_groups <= num_steps:
        raise ConfigError(
            f"step_groups: expected 1..{num_steps} for {num_steps} calibrated steps, found {num_groups}"
        )
    return torch.arange(num_steps) * num_groups // num_steps


def nearest(timesteps: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each timestep t (any shape, B elements) the index of the nearest of `timesteps` [T], and its distance: int64 [B]."""
    distance = (t.reshape(-1, 1).to(timesteps.device) - timesteps[None]).abs()  # [B, T]
    index = distance.argmin(1)
    return index, distance.gather(1, index[:, None])[:, 0]


class StepGroups(nn.Module):
    """Holds the calibrated timesteps of a UNet and, during its forward, the group in force: an int, or int64 [B].

    `hook` is the UNet's forward pre-hook: it sets `current` from the `timestep` argument by nearest calibrated timestep, and
    warns once a timestep when the distance exceeds the widest gap between calibrated timesteps.
    """

    def __init__(self, timesteps: torch.Tensor, groups: torch.Tensor) -> None:
        super().__init__()
        order = timesteps.argsort()
        self.register_buffer("timesteps", timesteps[order].to(torch.int64).clone())
        self.register_buffer("groups", groups[order].to(torch.int64).clone())
        self.current: int | torch.Tensor = 0
        self.timestep: int | float | None = (
            None  # the timestep itself, when the whole batch has one
        )
        self.warned: set[int] = set()

    @property
    def num_groups(self) -> int:
        return int(self.groups.max()) + 1

    def lookup(self, t: torch.Tensor) -> int | torch.Tensor:
        """Timesteps, any shape with 1 or B elements -> one int where all agree, else int64 [B]."""
        t = t.reshape(-1).to(self.timesteps.device)
        index, distance = nearest(self.timesteps, t)
        self._warn_if_far(t, distance)
        groups = self.groups[index]
        return int(groups[0]) if bool((groups == groups[0]).all()) else groups

    def _warn_if_far(self, t: torch.Tensor, distance: torch.Tensor) -> None:
        steps = self.timesteps
        limit = int((steps[1:] - steps[:-1]).max()) if len(steps) > 1 else 1
        far = sorted({int(v) for v in t[distance > limit]} - self.warned)
        if far:
            self.warned.update(far)
            warnings.warn(
                f"timesteps {far} are farther than {limit} from every calibrated timestep ({int(steps[0])}..{int(steps[-1])}); "
                "the nearest group's scales are used",
                TimestepWarning,
                stacklevel=2,
            )

    def hook(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        t = torch.as_tensor(timestep).reshape(-1)
        self.current = self.lookup(t)
        self.timestep = t[0].item() if bool((t == t[0]).all()) else None
