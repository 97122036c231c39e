"""The time path of a denoiser: from the timestep to the ResBlocks or the adaptive norms.

In most UNets these layers see the timestep alone (paper, Sec. 3.2, Property 1). Class labels,
guidance embeddings and added conditions, as SDXL's sizes and pooled text, enter the same embedding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.capture import StopForward, hooks
from questlib.denoisers import TRANSFORMERS

# What enters the embedding beside the timestep, in a UNet's configuration.
CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim")

# Arguments of a UNet that never reach the embedding, and can be large.
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def depends_on_time_alone(unet: nn.Module) -> bool:
    """Whether the timestep alone enters the embedding: no labels, no added conditions."""
    if isinstance(unet, DiTTransformer2DModel):
        return False
    if isinstance(unet, PixArtTransformer2DModel):
        return not unet.use_additional_conditions
    return all(unet.config.get(key) is None for key in CONDITIONS)


def needs_arguments(unet: nn.Module) -> bool:
    """Whether the time path can run only with the other arguments of a call."""
    return not depends_on_time_alone(unet) or getattr(unet, "encoder_hid_proj", None) is not None


def run_time_layers(
    unet: nn.Module, t: torch.Tensor, arguments: dict[str, Any] | None = None
) -> None:
    """Run only the layers that make the embedding of a call, and its projections.

    Their outputs are what hooks on them record (`questlib.capture.capture_outputs`). In a quantized
    UNet the activation scales are those of each timestep's step group.

    Args:
        unet: a diffusers UNet or transformer, quantized or not.
        t: timesteps [R], one a row.
        arguments: the other arguments of the call, R samples each; None: the denoiser sees the
            timestep alone (`needs_arguments`).
    """
    arguments = dict(arguments or {})
    if isinstance(unet, TRANSFORMERS):
        _run_norms(unet, t, arguments)
        return
    if "sample" not in arguments:
        shape = (len(t), unet.config.in_channels, 1, 1)
        arguments["sample"] = torch.zeros(shape, device=unet.device, dtype=unet.dtype)
    if "encoder_hidden_states" in inspect.signature(type(unet).forward).parameters:
        arguments.setdefault("encoder_hidden_states", None)
    embedding = None

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal embedding
        embedding = kwargs["temb"]  # [R, width]
        raise StopForward

    # The UNet makes the embedding before its first block runs.
    with hooks(unet, {"down_blocks.0": keep}, "input"):
        unet(timestep=t, **arguments)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
            block.time_emb_proj(embedding if block.skip_time_act else block.nonlinearity(embedding))
        elif isinstance(block, AdaGroupNorm):
            block.linear(embedding if block.act is None else block.act(embedding))


def _run_norms(transformer: nn.Module, t: torch.Tensor, arguments: dict[str, Any]) -> None:
    """The embeddings and projections of a transformer's adaptive norms.

    DiT has an embedding of timestep and label in each block, and that of the first one once more
    at the end (Peebles & Xie 2023, Sec. 3.2). PixArt has one for all (Chen et al. 2023, Sec. 2.3).
    """
    steps = getattr(transformer, "quest_steps", None)
    if steps is not None:
        steps.select(t)
    dtype = transformer.dtype
    if isinstance(transformer, PixArtTransformer2DModel):
        added = arguments.get("added_cond_kwargs")
        transformer.adaln_single(t, added, batch_size=len(t), hidden_dtype=dtype)
        return
    embeddings = []
    for norm in (block.norm1 for block in transformer.transformer_blocks):
        embeddings.append(norm.emb(t, arguments["class_labels"], hidden_dtype=dtype))  # [R, width]
        norm.linear(norm.silu(embeddings[-1]))
    transformer.proj_out_1(F.silu(embeddings[0]))
