"""How a pipeline draws images, each from noise of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from questlib.denoisers import unet_of
from questlib.diffusion.conditioning import Conditioning
from questlib.diffusion.digests import model_digest, parts_digest
from questlib.diffusion.sampling import (
    CALIBRATION_OFFSET,
    check_seed,
    choose_scheduler,
    decode,
    denoise,
    initial_noise,
    sample_generators,
)
from questlib.errors import ConfigError, NotFiniteError


class Samples(NamedTuple):
    """Samples in the order of their indices."""

    images: torch.Tensor  # uint8 [N, 3, H, W]
    latents: torch.Tensor  # float32 [N, C, h, w], before decoding


def check_count(num_samples: int) -> None:
    """ConfigError where there are so many samples that calibration has the noise of some."""
    if num_samples > CALIBRATION_OFFSET:
        raise ConfigError(
            f"sampling: expected at most {CALIBRATION_OFFSET} samples, found {num_samples}"
        )


class Drawing:
    """How a pipeline draws samples: `draw(indices)`.

    Args:
        sampler: see `questlib.diffusion.sampling.choose_scheduler`.
        guidance_scale, labels, prompts: see `questlib.diffusion.conditioning.Conditioning`.
        unet: replaces the pipeline's own, e.g. by a quantized one.

    Raises:
        ConfigError: a choice that the pipeline or the sampler cannot serve.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        seed: int = 0,
        sampler: str | None = None,
        guidance_scale: float = 1.0,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        unet: nn.Module | None = None,
    ) -> None:
        if num_inference_steps < 1:
            raise ConfigError(
                f"sampling: num_inference_steps must be >= 1, found {num_inference_steps}"
            )
        check_seed(seed)
        self.pipe = pipe
        self.unet = unet_of(pipe) if unet is None else unet
        self.steps = num_inference_steps
        self.eta = eta
        self.seed = seed
        self.scheduler = choose_scheduler(pipe, sampler, eta)
        self.conditioning = Conditioning(
            pipe, guidance_scale=guidance_scale, labels=labels, prompts=prompts
        )

    def run(self, num_samples: int, batch_size: int) -> dict[str, Any]:
        """What decides the samples, as run.json holds it. ConfigError for too many samples."""
        check_count(num_samples)
        settings = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "seed": self.seed,
            "steps": self.steps,
            "eta": self.eta,
            "sampler": type(self.scheduler).__name__,
            "schedule": {k: str(v) for k, v in settings.items()},
            "unet": model_digest(self.unet),
            "parts": parts_digest(self.pipe),
            **self.conditioning.about,
        }

    def draw(
        self,
        indices: range,
        track: Callable[[Iterable[torch.Tensor]], Iterable[torch.Tensor]] | None = None,
    ) -> Samples:
        """The samples with these indices.

        Args:
            track: wraps the timesteps, as a progress bar does.

        Raises:
            ConfigError: an index whose noise calibration has.
            NotFiniteError: they are not finite; it names the first step at which they were not.
        """
        check_count(indices.stop)
        generators = sample_generators(self.seed, indices)
        try:
            latents = denoise(
                self.unet,
                self.scheduler,
                initial_noise(self.unet, generators),
                self.steps,
                eta=self.eta,
                generators=generators,
                condition=self.conditioning.at(indices),
                track=track,
            )
        except NotFiniteError as error:
            raise NotFiniteError(
                f"sampling: samples {indices.start}..{indices.stop - 1} are not finite: {error}"
            ) from error
        images = decode(self.pipe, latents)
        return Samples(images.cpu().contiguous(), latents.float().cpu().contiguous())
