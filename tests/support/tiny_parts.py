"""Tiny random parts of pipelines. Each is built after a fixed seed, and is in eval mode."""

from __future__ import annotations

import json
import tempfile
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

CONTEXT = 16
"""Width of text embeddings."""

TOKENS = 8
"""Length of a prompt."""

SIZE = 32
"""Height and width of images; latents of a VAE with two levels are half of it."""


def seeded(build: Any, *args: Any, **kwargs: Any) -> Any:
    """A module built after a fixed seed, in eval mode, without gradients."""
    torch.manual_seed(0)
    return build(*args, **kwargs).eval().requires_grad_(False)


TWO_BLOCKS = dict(
    sample_size=16, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8
)
"""Sizes of the UNets."""

TWO_LEVELS = dict(
    block_out_channels=(8, 8),
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
"""Sizes of the autoencoders; latents have half an image's size."""


def unet_2d(**choices: Any) -> UNet2DModel:
    """A UNet without conditions, with attention."""
    base = TWO_BLOCKS | dict(
        in_channels=3,
        out_channels=3,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return seeded(UNet2DModel, **base | choices)


def unet_2d_condition(**choices: Any) -> UNet2DConditionModel:
    """A UNet with cross-attention."""
    base = TWO_BLOCKS | dict(
        in_channels=4,
        out_channels=4,
        attention_head_dim=2,
        cross_attention_dim=CONTEXT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return seeded(UNet2DConditionModel, **base | choices)


def unet_sdxl(**choices: Any) -> UNet2DConditionModel:
    """SDXL's kind: sizes and a pooled text are added to the time embedding."""
    added = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + CONTEXT,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )
    return unet_2d_condition(**added | choices)


def vae(**choices: Any) -> AutoencoderKL:
    """An autoencoder with two levels: latents of half the size."""
    return seeded(AutoencoderKL, **TWO_LEVELS | dict(latent_channels=4) | choices)


def vq_model(latent_channels: int, **choices: Any) -> VQModel:
    """A VQ autoencoder with two levels."""
    base = dict(latent_channels=latent_channels, vq_embed_dim=latent_channels)
    return seeded(VQModel, **TWO_LEVELS | base | choices)


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: one token a letter."""
    letters = sorted(ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab = Path(folder, "vocab.json")
        merges = Path(folder, "merges.txt")
        vocab.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=TOKENS)


def text_encoder() -> CLIPTextModel:
    """A small CLIP text encoder for `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=2 * 256 + 2,
        hidden_size=CONTEXT,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=512,
        eos_token_id=513,
    )
    return seeded(CLIPTextModel, config)


def image_encoder() -> CLIPVisionModelWithProjection:
    """A small CLIP image encoder."""
    config = CLIPVisionConfig(
        hidden_size=CONTEXT,
        intermediate_size=32,
        projection_dim=CONTEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return seeded(CLIPVisionModelWithProjection, config)


def image_processor() -> CLIPImageProcessor:
    """Turns images into the input of `image_encoder`."""
    sizes = {"height": 16, "width": 16}
    return CLIPImageProcessor(size=sizes, crop_size=sizes)


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet whose residuals are not zero."""
    torch.manual_seed(1)
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    return _with_noise(made)


def adapter(kind: str = "full_adapter") -> T2IAdapter:
    """A T2I-Adapter for `unet_2d_condition`."""
    torch.manual_seed(1)
    made = T2IAdapter(
        in_channels=3,
        channels=[16, 32],
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type=kind,
    )
    return made.eval().requires_grad_(False)


def _with_noise(module: Any) -> Any:
    """Give the zero-initialized layers of a module small random values."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return module.eval().requires_grad_(False)


def image(channels: int = 3, size: int = SIZE) -> torch.Tensor:
    """An image [1, C, h, w] with values in [0, 1]."""
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(2))


def mask(size: int = SIZE) -> torch.Tensor:
    """A mask [1, 1, h, w]: the right half is 1."""
    found = torch.zeros(1, 1, size, size)
    found[..., size // 2 :] = 1
    return found


def embeddings(*shape: int, seed: int = 3) -> torch.Tensor:
    """Random embeddings of a text or an image."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def controlnet_union(unet: UNet2DConditionModel) -> ControlNetUnionModel:
    """A ControlNet Union whose residuals are not zero."""
    torch.manual_seed(1)
    known = signature(ControlNetUnionModel).parameters
    taken = {k: v for k, v in unet.config.items() if k in known}
    sizes = dict(
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
        conditioning_embedding_out_channels=(8, 8),
    )
    made = ControlNetUnionModel(**taken | sizes)
    return _with_noise(made)


def add_ip_adapter(unet: UNet2DConditionModel) -> None:
    """Put random IP-Adapter weights into a UNet, as `load_ip_adapter` does with files."""
    torch.manual_seed(1)
    width = CONTEXT
    state: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    state["image_proj"] = {
        "proj.weight": torch.randn(width * 4, width) * 0.1,
        "proj.bias": torch.zeros(width * 4),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    number = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("to_k_ip", "to_v_ip"):
                weight = torch.randn(module.inner_dim, width) * 0.1
                state["ip_adapter"][f"{number}.{part}.weight"] = weight
            number += 2
    unet._load_ip_adapter_weights([state])
    unet.eval().requires_grad_(False)


def fuse_lora(unet: UNet2DConditionModel) -> None:
    """Add a random LoRA to a UNet's attention, and fuse it."""
    from peft import LoraConfig

    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    unet.fuse_lora()
    unet.unload_lora()
    unet.eval().requires_grad_(False)


class OwnPipeline:
    """A sampling loop of one's own around a UNet and a scheduler: what `run` is for."""

    def __init__(self, unet: Any, scheduler: Any, size: int, arguments: dict[str, Any]) -> None:
        self.unet = unet
        self.scheduler = scheduler
        self.size = size
        self.arguments = arguments

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, generator: torch.Generator | None = None) -> Any:
        shape = (2, self.unet.config.in_channels, self.size, self.size)
        x = torch.randn(shape, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            eps = self.unet(x, t, **self.arguments).sample
            x = self.scheduler.step(eps, t, x).prev_sample
        return (x.numpy(),)


def own_pipeline(
    unet: Any, scheduler: Any, size: int = 16, **arguments: Any
) -> tuple[OwnPipeline, dict[str, Any]]:
    """A loop that hands these arguments to the UNet, and its call."""
    return OwnPipeline(unet, scheduler, size, arguments), {"num_inference_steps": 3}
