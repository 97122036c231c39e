"""TODO"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from questlib.diffusion.conditioning import Conditioning
from questlib.diffusion.sampling import (
    choose_scheduler,
    denoise,
    index_ranges,
    initial_noise,
    sample_generators,
)
from questlib.distributed import broadcast_from, processes
from questlib.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Batch:
    """Calls of a UNet, and what the full-precision one gave: x, eps [B, C, h, w]; t int64 [B] or []; context [B, L, D]."""

    x: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    context: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(*(v if v is None or v.ndim == 0 else v[rows] for v in vars(self).values()))

    def split(self, size: int) -> list[Batch]:
        return [self[i : i + size] for i in range(0, len(self), size)]

    def run(self, unet: nn.Module) -> torch.Tensor:
        """The UNet's output for these calls, on its own device."""
        given = (
            {} if self.context is None else {"encoder_hidden_states": self.context.to(unet.device)}
        )
        return unet(self.x.to(unet.device), self.t.to(unet.device), **given).sample


@dataclass
class Calibration:
    """x [T, N, C, h, w] UNet inputs, t int64 [T], eps [T, N, C, h, w] its outputs; T sampler steps of N trajectories.

    context [N, L, D]: what each trajectory's UNet received beside them, the same at all steps; None for unconditional models.
    Under guidance N counts both halves: all unconditional ones, then all conditional ones. Everything stays on the CPU (Stable
    Diffusion, 50 steps x 128 samples: 0.4 GB a half for each of x and eps, 1.7 GB together).
    """

    x: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    context: torch.Tensor | None = None

    def batch(self, step: int | torch.Tensor, which: torch.Tensor) -> Batch:
        """Trajectories `which` int64 [B] at one step, or each at its own (int64 [B])."""
        context = None if self.context is None else self.context[which]
        return Batch(self.x[step, which], self.t[step], self.eps[step, which], context)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if v is not None}

    def save(self, path: str | Path) -> None:
        tmp = Path(path).with_suffix(f".tmp{os.getpid()}")
        save_file(self._tensors(), tmp)
        os.replace(tmp, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        try:
            with safe_open(path, "pt") as f:
                return cls(
                    *(
                        f.get_tensor(k)
                        for k in ("x", "t", "eps", "context")
                        if k != "context" or k in f.keys()
                    )
                )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"calibration file {path}: {error}") from error

    def hash(self) -> str:
        digest = hashlib.sha256()
        for tensor in self._tensors().values():
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]


@torch.no_grad()
def calibrate(
    pipe: DiffusionPipeline,
    num_samples: int,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    sampler: str | None = None,
    guidance_scale: float = 1.0,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    progress: bool = False,
) -> Calibration:
    """Sample `num_samples` trajectories with the full-precision pipeline and record (x_t, t, context, eps) at its UNet.

    The noise differs from that of `questlib.diffusion.sampling.sample` at equal seeds. Labels (all classes by default) and prompts are
    taken in turn, in an order drawn from `seed`: each occurs equally often, give or take one. For sampler, guidance_scale, labels
    and prompts see `questlib.diffusion.sampling.Drawing`. Under `accelerate launch` every process calls this: batches are shared out, and
    all get the whole result, which does not depend on the number of processes. ConfigError for counts below one.
    """
    if min(num_samples, num_inference_steps, batch_size) < 1:
        raise ConfigError(
            "calibrate: num_samples and num_inference_steps and batch_size must be >= 1, found "
            f"{num_samples}, {num_inference_steps}, {batch_size}"
        )
    unet, state = pipe.unet, processes()
    scheduler = choose_scheduler(pipe, sampler, eta)
    conditioning = Conditioning(
        pipe, guidance_scale=guidance_scale, labels=labels, prompts=prompts, shuffle=seed
    )
    batches = index_ranges(num_samples, batch_size)
    record: dict[str, list[torch.Tensor]] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        t = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).reshape(-1)
        for key, value in (("x", args[0]), ("t", t[:1].to(torch.int64)), ("eps", out.sample)):
            record.setdefault(key, []).append(value.cpu())
        if "encoder_hidden_states" in kwargs:
            record["context"] = [kwargs["encoder_hidden_states"].cpu()]

    def trajectories(indices: range) -> dict[str, torch.Tensor]:
        """Of one batch: x, eps [T, H, n, C, h, w], where H halves are 2 under guidance; t [T]; context [1, H, n, L, D]."""
        record.clear()
        # index offset: calibration never sees the noise of the samples that are evaluated
        generators = sample_generators(seed, [500_000 + i for i in indices])
        condition, x_t = conditioning.at(indices), initial_noise(unet, generators)
        denoise(
            unet,
            scheduler,
            x_t,
            num_inference_steps,
            eta=eta,
            generators=generators,
            condition=condition,
        )
        found = {
            k: torch.stack(v).unflatten(1, (condition.halves, -1))
            for k, v in record.items()
            if k != "t"
        }
        return found | {"t": torch.cat(record["t"])}

    whole: dict[str, torch.Tensor] = {}
    handle = unet.register_forward_hook(hook, with_kwargs=True)
    try:
        for first in tqdm(
            range(0, len(batches), state.num_processes), desc="calibrate", disable=not progress
        ):
            mine = batches[first + state.process_index : first + state.process_index + 1]
            found = trajectories(mine[0]) if mine else None
            for owner, indices in enumerate(batches[first : first + state.num_processes]):
                part = broadcast_from(found, owner)
                whole["t"] = part.pop("t")
                for key, value in part.items():
                    if key not in whole:
                        whole[key] = value.new_empty(
                            *value.shape[:2], num_samples, *value.shape[3:]
                        )
                    whole[key][:, :, indices.start : indices.stop] = value
    finally:
        handle.remove()
    joined = {k: v if k == "t" else v.flatten(1, 2) for k, v in whole.items()}
    context = joined.pop("context", None)
    return Calibration(**joined, context=None if context is None else context[0])
