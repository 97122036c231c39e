"""Random pipelines of every kind, small enough for whole runs in a test."""

from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn


def autoencoder() -> VQModel:
    return VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
        sample_size=16,
    )


def unconditional() -> LDMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return LDMPipeline(vqvae=autoencoder(), unet=unet, scheduler=DDIMScheduler(clip_sample=False))


class Embedder(nn.Module):
    """Class labels int64 [N] -> context [N, tokens, 12]; the last row is the null class."""

    def __init__(self, classes: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.config, self.null_class = SimpleNamespace(num_classes=classes), classes
        self.embedding = nn.Embedding(classes + 1, tokens * 12)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding(labels).unflatten(1, (self.tokens, 12))


def conditional_unet(width: int = 12) -> UNet2DConditionModel:
    return (
        UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=width,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        .eval()
        .requires_grad_(False)
    )


def class_conditional(classes: int = 4, tokens: int = 1) -> SimpleNamespace:
    torch.manual_seed(0)
    vae = autoencoder().eval().requires_grad_(False)
    return SimpleNamespace(
        unet=conditional_unet(),
        scheduler=DDIMScheduler(clip_sample=False),
        vqvae=vae,
        components={"vqvae": vae},
        class_embedder=Embedder(classes, tokens).requires_grad_(False),
    )
