"""How a pipeline draws samples, into memory or into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from questlib.diffusion.conditioning import Conditioning
from questlib.diffusion.digests import model_digest, parts_digest
from questlib.diffusion.sampling import (
    choose_scheduler,
    decode,
    denoise,
    index_ranges,
    initial_noise,
    sample_generators,
)
from questlib.errors import ConfigError, QuestError
from reproduce.evaluation.samples import Samples, read_samples, write_samples


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
        self.pipe = pipe
        self.unet = pipe.unet if unet is None else unet
        self.steps = num_inference_steps
        self.eta = eta
        self.seed = seed
        self.scheduler = choose_scheduler(pipe, sampler, eta)
        self.conditioning = Conditioning(
            pipe, guidance_scale=guidance_scale, labels=labels, prompts=prompts
        )

    def run(self, num_samples: int, batch_size: int) -> dict[str, Any]:
        """What decides the samples, as run.json holds it."""
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

    def draw(self, indices: range) -> Samples:
        """The samples with these indices.

        Raises:
            QuestError: they are not finite.
        """
        generators = sample_generators(self.seed, indices)
        latents = denoise(
            self.unet,
            self.scheduler,
            initial_noise(self.unet, generators),
            self.steps,
            eta=self.eta,
            generators=generators,
            condition=self.conditioning.at(indices),
        )
        if not torch.isfinite(latents).all():
            raise QuestError(
                f"sampling: samples {indices.start}..{indices.stop - 1} are not finite"
            )
        images = decode(self.pipe, latents)
        return Samples(images.cpu().contiguous(), latents.float().cpu().contiguous())


def sample(
    pipe: DiffusionPipeline,
    num_samples: int,
    *,
    batch_size: int = 100,
    out_dir: str | Path | None = None,
    progress: bool = True,
    **drawing: Any,
) -> Samples:
    """Draw images.

    Args:
        out_dir: a folder of samples, where each batch is a file (`reproduce.evaluation.samples`). A
            second call reads what is done and goes on.
        drawing: keywords of `Drawing`.

    Raises:
        ConfigError: counts below one.
        QuestError: `out_dir` holds another run or damaged shards, or cannot be written; or samples
            are not finite.

    Example:
        >>> samples = sample(pipe, 16, num_inference_steps=20, seed=0)
        >>> samples.images.shape
        torch.Size([16, 3, 64, 64])
    """
    if min(num_samples, batch_size) < 1:
        raise ConfigError(
            f"sampling: num_samples, batch_size must be >= 1, found {num_samples}, {batch_size}"
        )
    how = Drawing(pipe, **drawing)
    if out_dir is None:
        ranges = index_ranges(num_samples, batch_size)
        bar = tqdm(ranges, desc="sample", disable=not progress, mininterval=2)
        shards = [how.draw(indices) for indices in bar]
    else:
        write_samples(out_dir, how.run(num_samples, batch_size), how.draw, progress=progress)
        shards = list(read_samples(out_dir))
    return Samples(torch.cat([s.images for s in shards]), torch.cat([s.latents for s in shards]))
