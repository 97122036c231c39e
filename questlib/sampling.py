"""Sampling: the noise of sample i depends on (seed, i) alone, shards are written atomically and resumed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from questlib.errors import ConfigError, QuestError


class Samples(NamedTuple):
    images: torch.Tensor  # uint8 [N, 3, H, W]
    latents: torch.Tensor  # float32 [N, C, h, w], before decoding


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator a sample. torch's CPU generator keeps 32 bits of a seed: distinct while seed < 2000 and i < 1,000,003."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32) for i in indices]


@torch.no_grad()
def denoise(unet, scheduler, latents, num_inference_steps: int, *, eta: float = 0.0, generators=None) -> torch.Tensor:
    """Unconditional DDIM from x_T = `latents` [N, C, h, w] to x_0; eta > 0 draws each sample's noise from its own generator."""
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    x = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        eps = unet(scheduler.scale_model_input(x, t), t).sample
        noise = None
        if eta > 0:
            noise = torch.cat([torch.randn(1, *x.shape[1:], generator=g) for g in generators]).to(x)
        x = scheduler.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
    return x


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Latents [N, C, h, w] -> uint8 images [N, 3, H, W] by the pipeline's autoencoder."""
    vae = getattr(pipe, "vqvae", None) or pipe.vae
    images = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(batch_size)])
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def sample(
    pipe: DiffusionPipeline, num_samples: int, *, num_inference_steps: int = 20, eta: float = 0.0, seed: int = 0,
    batch_size: int = 100, out_dir: str | Path | None = None, unet=None, progress: bool = True,
) -> Samples:  # fmt: skip
    """Draw `num_samples` images with `pipe`'s scheduler and autoencoder; `unet` replaces the pipeline's own (a quantized one).

    With `out_dir`, each batch is a file there; a second call reads what is done and goes on.
    Raises ConfigError for counts below one, QuestError when `out_dir` holds shards of another run.
    """
    if num_samples < 1 or num_inference_steps < 1 or batch_size < 1:
        raise ConfigError(
            f"sampling: num_samples, num_inference_steps, batch_size must be >= 1, found {num_samples}, {num_inference_steps}, {batch_size}"
        )
    unet = pipe.unet if unet is None else unet
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    about = {"seed": str(seed), "steps": str(num_inference_steps), "eta": str(eta)}
    shards = []
    starts = range(0, num_samples, batch_size)
    for start in tqdm(starts, desc="sample", disable=not progress, mininterval=2):
        indices = range(start, min(start + batch_size, num_samples))
        shard = None if out_dir is None else Path(out_dir) / f"{start:06d}-{len(indices)}-seed{seed}-steps{num_inference_steps}-eta{eta}.safetensors"
        if shard is not None and shard.exists():
            tensors = load_file(shard)
            if tensors["images"].shape[0] != len(indices):
                raise QuestError(f"sampling: {shard} holds {tensors['images'].shape[0]} images, expected {len(indices)}")
        else:
            generators = sample_generators(seed, indices)
            x_t = torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(unet.device)
            latents = denoise(unet, scheduler, x_t, num_inference_steps, eta=eta, generators=generators)
            if not torch.isfinite(latents).all():
                raise QuestError(f"sampling: samples {indices.start}..{indices.stop - 1} are not finite")
            tensors = {"images": decode(pipe, latents).cpu().contiguous(), "latents": latents.float().cpu().contiguous()}
            if shard is not None:
                shard.parent.mkdir(parents=True, exist_ok=True)
                tmp = shard.with_suffix(f".tmp{os.getpid()}")
                save_file(tensors, tmp, metadata=about)
                os.replace(tmp, shard)
        shards.append(tensors)
    return Samples(torch.cat([s["images"] for s in shards]), torch.cat([s["latents"] for s in shards]))
