"""The denoising loop: any diffusers sampler; the noise of sample i depends on (seed, i) alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from questlib.diffusion.conditioning import Condition
from questlib.diffusion.schedulers import make_scheduler
from questlib.errors import ConfigError


def choose_scheduler(
    pipe: DiffusionPipeline, sampler: str | None = None, eta: float = 0.0
) -> SchedulerMixin:
    """The pipeline's scheduler (None), or another sampler on its noise schedule (`questlib.diffusion.schedulers`).

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
    unet,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    generators: list[torch.Generator] | None = None,
    condition: Condition | None = None,
) -> torch.Tensor:
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
        if (
            correction is not None
        ):  # its variance schedule: less noise where quantization brings its own
            noise = randn_tensor(x.shape, generators, x.device, x.dtype)
            extra = {
                "eta": eta,
                "variance_noise": noise * correction.noise_factor(scheduler, t, eta),
            }
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
        images = torch.cat(
            [vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(batch_size)]
        )
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def index_ranges(num_samples: int, batch_size: int) -> list[range]:
    """The indices 0..num_samples - 1 in runs of `batch_size`, the last one maybe shorter."""
    return [
        range(start, min(start + batch_size, num_samples))
        for start in range(0, num_samples, batch_size)
    ]
