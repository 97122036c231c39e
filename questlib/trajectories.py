"""Trajectories that are sampled for calibration, without a call of the pipeline itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from questlib.capture import hooks
from questlib.denoisers import timestep_of, unet_of
from questlib.diffusion.conditioning import Conditioning
from questlib.diffusion.sampling import (
    CALIBRATION_OFFSET,
    check_seed,
    choose_scheduler,
    denoise,
    index_ranges,
    initial_noise,
    sample_generators,
)
from questlib.distributed import broadcast_from, processes
from questlib.errors import ConfigError
from questlib.recording import as_timesteps, check_finite
from questlib.stage_cache import Parts


def sample_trajectories(
    pipe: DiffusionPipeline,
    num_samples: int | None,
    num_inference_steps: int | None,
    batch_size: int,
    seed: int,
    progress: bool,
    parts: Parts,
    *,
    eta: float,
    sampler: str | None,
    guidance_scale: float,
    labels: Sequence[int] | None,
    prompts: Sequence[str] | None,
) -> dict[str, Any]:
    """Sample trajectories of a pipeline's UNet; see `questlib.calibrate` for the arguments.

    Args:
        parts: keeps finished batches, and gives those of a run that was stopped.

    Returns:
        x, eps [T, H * N, C, h, w], t [T], context [H * N, L, D], labels [H * N] or None, and the
        denoiser's name for it. H is 2 under guidance, the unconditional half first.

    Raises:
        ConfigError: a count that is missing or below one, or choices that do not fit the pipeline.
        QuestError: a value that is not finite.
    """
    if num_samples is None or num_inference_steps is None:
        raise ConfigError("calibrate: expected both num_samples and num_inference_steps")
    if min(num_samples, num_inference_steps, batch_size) < 1:
        raise ConfigError(
            "calibrate: num_samples and num_inference_steps and batch_size must be >= 1, found "
            f"{num_samples}, {num_inference_steps}, {batch_size}"
        )
    check_seed(seed)
    unet = unet_of(pipe)
    scheduler = choose_scheduler(pipe, sampler, eta)
    conditioning = Conditioning(
        pipe, guidance_scale=guidance_scale, labels=labels, prompts=prompts, shuffle=seed
    )

    def trajectories(indices: range) -> dict[str, torch.Tensor]:
        """Sample one batch.

        Returns:
            x, eps [T, H, n, C, h, w], t [T], context [1, H, n, L, D] or [1, H, n], where H is 2
            under guidance.
        """
        # calibration never sees the noise of the samples that are evaluated
        generators = sample_generators(seed, [CALIBRATION_OFFSET + i for i in indices])
        condition = conditioning.at(indices)
        recorder = _Recorder(condition.argument)
        with hooks(unet, {"": recorder}):
            denoise(
                unet,
                scheduler,
                initial_noise(unet, generators),
                num_inference_steps,
                eta=eta,
                generators=generators,
                condition=condition,
            )
        return recorder.stacked(condition.halves)

    state = processes()
    batches = index_ranges(num_samples, batch_size)
    whole: dict[str, torch.Tensor] = {}
    starts = range(0, len(batches), state.num_processes)
    for first in tqdm(starts, desc="calibrate", disable=not progress):
        mine = batches[first + state.process_index : first + state.process_index + 1]
        found = parts.keep(str(mine[0].start), partial(trajectories, mine[0])) if mine else None
        for owner, indices in enumerate(batches[first : first + state.num_processes]):
            part = broadcast_from(found, owner)
            assert part is not None  # the owner of a batch has sampled it
            whole["t"] = part.pop("t")
            for name, value in part.items():
                if name not in whole:
                    shape = (*value.shape[:2], num_samples, *value.shape[3:])
                    whole[name] = value.new_empty(shape)  # [T or 1, H, N, ...]
                whole[name][:, :, indices.start : indices.stop] = value
    context = whole.get("context")
    return {
        "x": whole["x"].flatten(1, 2),  # [T, H, N, C, h, w] -> [T, H * N, C, h, w]
        "t": whole["t"],
        "eps": whole["eps"].flatten(1, 2),
        # [1, H, N, L, D] -> [H * N, L, D], or [1, H, N] -> [H * N]
        "context": None if context is None else context[0].flatten(0, 1),
        "argument": conditioning.argument,
    }


class _Recorder:
    """A denoiser's forward hook that keeps what each call received and returned.

    Args:
        argument: the denoiser's name for the context.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.x: list[torch.Tensor] = []
        self.t: list[torch.Tensor] = []
        self.eps: list[torch.Tensor] = []
        self.context: torch.Tensor | None = None  # the same at all steps

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        t = as_timesteps(timestep_of(module, args, kwargs))[:1]
        context = kwargs.get(self.argument)
        received = {"x": args[0]} | ({} if context is None else {self.argument: context})
        check_finite(t, received | {"its output": output.sample})
        self.x.append(args[0].cpu())
        self.t.append(t)
        self.eps.append(output.sample.cpu())
        if context is not None:
            self.context = context.cpu()

    def stacked(self, halves: int) -> dict[str, torch.Tensor]:
        """x, eps [T, H, n, C, h, w], t [T] and, if there is one, context [1, H, n, ...]."""
        found = {
            "x": torch.stack(self.x).unflatten(1, (halves, -1)),
            "t": torch.cat(self.t),
            "eps": torch.stack(self.eps).unflatten(1, (halves, -1)),
        }
        if self.context is not None:
            found["context"] = self.context[None].unflatten(1, (halves, -1))
        return found
