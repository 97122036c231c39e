"""Images to latents and back, by an autoencoder."""

from __future__ import annotations

from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, VQModel

from questlib.diffusion.sampling import to_uint8

BATCH = 128  # images at a time

Autoencoder: TypeAlias = VQModel | AutoencoderKL


def encode(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> latents [N, C, H / f, W / f], not scaled.

    They are those before vector quantization, or the mode of the posterior.
    """
    encoded = [vae.encode(batch.float() / 127.5 - 1) for batch in images.split(BATCH)]
    if isinstance(vae, AutoencoderKL):
        return torch.cat([e.latent_dist.mode() for e in encoded])
    return torch.cat([e.latents for e in encoded])


def reconstruct(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> what the autoencoder makes of them, uint8 [N, 3, H, W]."""
    return to_uint8(vae.decode(encode(vae, images)).sample)
