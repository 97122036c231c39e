"""Sampling: the noise of sample i depends on (seed, i) alone, shards are written atomically and resumed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from questlib.errors import ConfigError, QuestError
from questlib.models.loading import model_digest


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


def _read_shard(shard: Path, about: dict[str, str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(shard, "pt") as f:
            if f.metadata() != about:
                raise QuestError(f"sampling: {shard} belongs to another run: expected {about}, found {f.metadata()}")
            return {k: f.get_tensor(k) for k in ("images", "latents")}
    except SafetensorError as error:
        raise QuestError(f"sampling: {shard} is damaged ({error}); remove it") from error


def sample(
    pipe: DiffusionPipeline, num_samples: int, *, num_inference_steps: int = 20, eta: float = 0.0, seed: int = 0,
    batch_size: int = 100, out_dir: str | Path | None = None, unet=None, progress: bool = True,
) -> Samples:  # fmt: skip
    """Draw `num_samples` images with `pipe`'s scheduler and autoencoder; `unet` replaces the pipeline's own (a quantized one).

    With `out_dir`, each batch is a file there; a second call reads what is done and goes on.
    Raises ConfigError for counts below one, QuestError when `out_dir` holds shards of another run or model, or damaged ones.
    """
    counts = {"num_samples": num_samples, "num_inference_steps": num_inference_steps, "batch_size": batch_size}
    if min(counts.values()) < 1:
        raise ConfigError(f"sampling: {', '.join(counts)} must be >= 1, found {', '.join(map(str, counts.values()))}")
    unet = pipe.unet if unet is None else unet
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    about = {"seed": str(seed), "steps": str(num_inference_steps), "eta": str(eta)}
    if out_dir is not None:
        about["unet"] = model_digest(unet)  # shards of another model must not pass for this one's
    shards = []
    starts = range(0, num_samples, batch_size)
    for start in tqdm(starts, desc="sample", disable=not progress, mininterval=2):
        indices = range(start, min(start + batch_size, num_samples))
        shard = None if out_dir is None else Path(out_dir) / f"{start:06d}-{len(indices)}.safetensors"
        if shard is not None and shard.exists():
            tensors = _read_shard(shard, about)
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
