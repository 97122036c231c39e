"""Sampling: any diffusers sampler; the noise of sample i depends on (seed, i) alone; folders of samples, resumable."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

from questlib.errors import ConfigError, QuestError
from questlib.models.conditioning import Condition, Conditioning
from questlib.models.loading import model_digest, parts_digest
from questlib.models.samplers import make_scheduler
from questlib.shards import Samples, read_samples, shard_ranges, write_samples


def choose_scheduler(pipe: DiffusionPipeline, sampler: str | None = None, eta: float = 0.0) -> SchedulerMixin:
    """The pipeline's scheduler (None), or another sampler on its noise schedule (`questlib.models.samplers`).

    ConfigError for another name, and for eta with a sampler that has none.
    """
    scheduler = pipe.scheduler if sampler is None else make_scheduler(pipe, sampler)
    if eta != 0 and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ConfigError(f"eta: {type(scheduler).__name__} has none; expected 0, found {eta}")
    return scheduler


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample. torch's CPU generator keeps 32 bits of a seed: distinct while seed < 2000 and i < 1,000,003."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in indices]


def sample_shape(unet) -> tuple[int, int]:
    """(height, width) of what a UNet denoises."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def initial_noise(unet, generators: list[torch.Generator]) -> torch.Tensor:
    """x_T [N, C, h, w] on the UNet's device, each sample from its own generator."""
    shape = (unet.config.in_channels, *sample_shape(unet))
    return torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(unet.device)


@torch.no_grad()
def denoise(
    unet, scheduler: SchedulerMixin, latents: torch.Tensor, num_inference_steps: int, *, eta: float = 0.0,
    generators: list[torch.Generator] | None = None, condition: Condition | None = None,
) -> torch.Tensor:  # fmt: skip
    """From x_T = `latents` [N, C, h, w] to x_0; noise that the sampler adds comes from each sample's own generator."""
    scheduler = copy.deepcopy(scheduler)  # multistep samplers hold state; set_timesteps clears it
    accepts = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in {"eta": eta, "generator": generators}.items() if k in accepts}
    condition = condition or Condition()
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    x = latents * scheduler.init_noise_sigma
    correction = getattr(unet, "quest_correction", None) if eta > 0 else None
    for t in scheduler.timesteps:
        eps = condition.predict(unet, scheduler.scale_model_input(x, t), t)
        if correction is not None:  # its variance schedule: less noise where quantization brings its own
            noise = randn_tensor(x.shape, generators, x.device, x.dtype)
            extra = {"eta": eta, "variance_noise": noise * correction.noise_factor(scheduler, t, eta)}
        x = scheduler.step(eps, t, x, **extra).prev_sample
    return x


def image_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) of the images that a pipeline draws: the UNet's sample, times the autoencoder's factor."""
    vae = getattr(pipe, "vqvae", None) or getattr(pipe, "vae", None)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = sample_shape(pipe.unet)
    return height * factor, width * factor


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Latents [N, C, h, w] -> uint8 images [N, 3, H, W] by the pipeline's autoencoder; without one they are images already."""
    vae, images = getattr(pipe, "vqvae", None) or getattr(pipe, "vae", None), latents
    if vae is not None:
        images = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(batch_size)])
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class Drawing:
    """How a pipeline draws samples: `draw(indices)`. `unet` replaces the pipeline's own (a quantized one).

    sampler: see `choose_scheduler`; guidance_scale, labels, prompts: see `Conditioning`.
    ConfigError for choices that the pipeline or the sampler cannot serve.
    """

    def __init__(
        self, pipe: DiffusionPipeline, *, num_inference_steps: int = 20, eta: float = 0.0, seed: int = 0,
        sampler: str | None = None, guidance_scale: float = 1.0, labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None, unet=None,
    ) -> None:  # fmt: skip
        if num_inference_steps < 1:
            raise ConfigError(f"sampling: num_inference_steps must be >= 1, found {num_inference_steps}")
        self.pipe, self.unet = pipe, pipe.unet if unet is None else unet
        self.steps, self.eta, self.seed = num_inference_steps, eta, seed
        self.scheduler = choose_scheduler(pipe, sampler, eta)
        self.conditioning = Conditioning(pipe, guidance_scale=guidance_scale, labels=labels, prompts=prompts)

    def run(self, num_samples: int, batch_size: int) -> dict[str, Any]:
        """What decides the samples, as run.json holds it."""
        settings = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return {
            "num_samples": num_samples, "batch_size": batch_size, "seed": self.seed, "steps": self.steps, "eta": self.eta,
            "sampler": type(self.scheduler).__name__, "schedule": {k: str(v) for k, v in settings.items()},
            "unet": model_digest(self.unet), "parts": parts_digest(self.pipe), **self.conditioning.about,
        }  # fmt: skip

    def draw(self, indices: range) -> Samples:
        generators = sample_generators(self.seed, indices)
        latents = denoise(
            self.unet, self.scheduler, initial_noise(self.unet, generators), self.steps, eta=self.eta, generators=generators,
            condition=self.conditioning.at(indices),
        )  # fmt: skip
        if not torch.isfinite(latents).all():
            raise QuestError(f"sampling: samples {indices.start}..{indices.stop - 1} are not finite")
        return Samples(decode(self.pipe, latents).cpu().contiguous(), latents.float().cpu().contiguous())


def sample(
    pipe: DiffusionPipeline, num_samples: int, *, batch_size: int = 100, out_dir: str | Path | None = None, progress: bool = True,
    **drawing: Any,
) -> Samples:  # fmt: skip
    """Draw `num_samples` images; other keywords are those of `Drawing`.

    With `out_dir`, each batch is a file there (see `questlib.shards`); a second call reads what is done and goes on.
    Raises ConfigError for counts below one, QuestError when `out_dir` holds another run or damaged shards, or cannot be written,
    and when samples are not finite.
    """
    if min(num_samples, batch_size) < 1:
        raise ConfigError(f"sampling: num_samples, batch_size must be >= 1, found {num_samples}, {batch_size}")
    how = Drawing(pipe, **drawing)
    if out_dir is None:
        ranges = tqdm(shard_ranges(num_samples, batch_size), desc="sample", disable=not progress, mininterval=2)
        shards = [how.draw(indices) for indices in ranges]
    else:
        write_samples(out_dir, how.run(num_samples, batch_size), how.draw, progress=progress)
        shards = list(read_samples(out_dir))
    return Samples(torch.cat([s.images for s in shards]), torch.cat([s.latents for s in shards]))
