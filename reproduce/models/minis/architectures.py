"""The embedded models: architecture, noise schedule, and the stages of training of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    ModelMixin,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import nn

from reproduce.models.pipelines import (
    ClassConditionalPipeline,
    ClassTransformerPipeline,
    LatentDiffusionPipeline,
)

NUM_SAMPLES = 2000  # of the card's figures
DROP = 0.1  # share of labels and prompts left out in training, for classifier-free guidance


@dataclass(frozen=True)
class Stage:
    """How one part is trained: AdamW with warm-up and cosine decay.

    Args:
        ema: decay of the averaged weights.
        bf16: autocast. On this project's CPUs it is faster from 16x16 on, and slower on 8x8
            latents.
    """

    title: str
    steps: int
    batch: int
    lr: float
    ema: float = 0.995
    bf16: bool = True


@dataclass(frozen=True)
class MiniModel:
    """An embedded model.

    Args:
        stands_for: the paper's model; of a transformer, which the paper has not, a known one.
        pipeline: puts the trained parts together.
        autoencoder: makes one with fresh weights; a name: that embedded model's own; None: the
            model works on pixels.
        denoiser: makes a UNet or a transformer with fresh weights.
        stages: in the order of training.
        condition: "class" or "text", the context of the UNet's cross-attention; a transformer
            takes the class itself.
        data: of `reproduce.models.minis.data.ARCHIVES`.
        sampling: how the samples of the card's figures are drawn.
    """

    stands_for: str
    pipeline: Callable[..., DiffusionPipeline]
    autoencoder: Callable[[], ModelMixin] | str | None
    denoiser: Callable[[], ModelMixin]
    scheduler: Callable[[], SchedulerMixin]
    stages: dict[str, Stage]
    condition: str | None = None
    data: str = "emoji"
    sampling: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": 20})

    @property
    def part(self) -> str:
        """The denoiser's name in the pipeline, and the name of its stage."""
        return "transformer" if "transformer" in self.stages else "unet"


def make_transformer(**config: Any) -> DiTTransformer2DModel:
    """A DiT with fresh weights, each block the identity at first (Peebles & Xie 2023, Sec. 3.2).

    Its embedders drop no labels of their own: each block has one, and they would drop others.
    """
    transformer = DiTTransformer2DModel(**config)
    outputs = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*outputs, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return transformer


# CompVis' "linear" betas are diffusers' "scaled_linear". A sampler's own settings follow the
# paper's configurations.
BETAS = dict(
    num_train_timesteps=1000, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
)
LDM_BETAS = dict(beta_start=0.0015, clip_sample=False, **BETAS)

AUTOENCODER = dict(
    in_channels=3, out_channels=3, sample_size=64, layers_per_block=1, norm_num_groups=8
)


MINI_MODELS = {
    # LDM-4's autoencoder and UNet, scaled down: f=4, 3 latent channels, attention at the two lower
    # resolutions.
    "mini-ldm4": MiniModel(
        stands_for="LDM-4 on LSUN-Bedrooms",
        pipeline=LDMPipeline,
        autoencoder=partial(
            VQModel,
            latent_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            num_vq_embeddings=2048,
            **AUTOENCODER,
        ),
        denoiser=partial(
            UNet2DModel,
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(48, 96, 96),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=16,
        ),
        scheduler=partial(DDIMScheduler, beta_end=0.0195, **LDM_BETAS),
        stages={
            "autoencoder": Stage("VQ autoencoder, f=4", steps=5000, batch=16, lr=2e-3),
            "classifier": Stage(
                "group classifier (metric features)", steps=2000, batch=64, lr=2e-3
            ),
            "unet": Stage("UNet (eps-prediction)", steps=8000, batch=64, lr=1e-3, ema=0.9995),
        },
    ),
    # LDM-8's marks: KL autoencoder f=8 with 4 channels, scale-shift norms, up- and downsampling
    # inside residual blocks.
    "mini-ldm8": MiniModel(
        stands_for="LDM-8 on LSUN-Churches",
        pipeline=LatentDiffusionPipeline,
        autoencoder=partial(
            AutoencoderKL,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 48, 48),
            **AUTOENCODER,
        ),
        denoiser=partial(
            UNet2DModel,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 80),
            down_block_types=("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2,
            attention_head_dim=16,
            norm_num_groups=16,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        ),
        scheduler=partial(DDIMScheduler, beta_end=0.0155, **LDM_BETAS),
        stages={
            "autoencoder": Stage("KL autoencoder, f=8", steps=6000, batch=16, lr=2e-3),
            "unet": Stage(
                "UNet (eps-prediction)", steps=8000, batch=64, lr=1e-3, ema=0.9995, bf16=False
            ),
        },
    ),
    "mini-cin": MiniModel(
        stands_for="LDM-4 on ImageNet",
        pipeline=ClassConditionalPipeline,
        autoencoder="mini-ldm4",
        denoiser=partial(
            UNet2DConditionModel,
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(64, 64, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,  # of this class: the number of heads
            norm_num_groups=16,
            cross_attention_dim=64,
        ),
        scheduler=partial(DDIMScheduler, beta_end=0.0195, **LDM_BETAS),
        stages={
            "unet": Stage(
                "UNet and class embedder (eps-prediction)",
                steps=8000,
                batch=64,
                lr=1e-3,
                ema=0.9995,
            )
        },
        condition="class",
        sampling={"num_inference_steps": 20, "guidance_scale": 3.0},
    ),
    # DiT's marks: patches of 2x2, adaLN-Zero with an embedder of time and class in each block. It
    # has the data and the autoencoder of mini-cin; the variance is not learned.
    "mini-dit": MiniModel(
        stands_for="DiT-XL/2 on ImageNet",
        pipeline=ClassTransformerPipeline,
        autoencoder="mini-ldm4",
        denoiser=partial(
            make_transformer,
            sample_size=16,
            patch_size=2,
            in_channels=3,
            out_channels=3,
            num_layers=6,
            num_attention_heads=4,
            attention_head_dim=32,
            num_embeds_ada_norm=32,
        ),
        scheduler=partial(DDIMScheduler, beta_end=0.0195, **LDM_BETAS),
        stages={
            "transformer": Stage(
                "transformer (eps-prediction)",
                steps=8000,
                batch=32,
                lr=1e-3,
                ema=0.9995,
                bf16=False,
            )
        },
        condition="class",
        sampling={"num_inference_steps": 20, "guidance_scale": 3.0},
    ),
    "mini-sd": MiniModel(
        stands_for="Stable Diffusion v1.4",
        pipeline=partial(
            StableDiffusionPipeline,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        autoencoder="mini-ldm8",
        denoiser=partial(
            UNet2DConditionModel,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 64),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=4,  # of this class: the number of heads
            norm_num_groups=16,
            cross_attention_dim=64,
        ),
        scheduler=partial(
            PNDMScheduler, beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, **BETAS
        ),
        stages={
            "clip": Stage("mini-clip (CLIP score)", steps=2000, batch=128, lr=1e-3, bf16=False),
            "unet": Stage(
                "UNet and text encoder (eps-prediction)",
                steps=8000,
                batch=64,
                lr=1e-3,
                ema=0.9995,
                bf16=False,
            ),
        },
        condition="text",
        sampling={"num_inference_steps": 50, "guidance_scale": 3.0},
    ),
    # DDPM's noise schedule and U-Net for CIFAR-10 (Ho et al. 2020), narrower: one level with
    # attention.
    "mini-cifar": MiniModel(
        stands_for="pixel-space DDIM on CIFAR-10",
        pipeline=DDIMPipeline,
        autoencoder=None,
        denoiser=partial(
            UNet2DModel,
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=16,
        ),
        scheduler=partial(
            DDIMScheduler,
            num_train_timesteps=1000,
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            clip_sample=True,
        ),
        stages={"unet": Stage("UNet (eps-prediction)", steps=5000, batch=64, lr=1e-3, ema=0.9995)},
        data="cifar10",
    ),
}
