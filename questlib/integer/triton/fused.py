"""Blocks that run norms and activations inside the quantizing kernels, and add residuals and shifts
in the products' epilogues.

In exact arithmetic they are the same blocks. Float rounding differs, so that single codes can
differ from the simulation's by one.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.integer.time_table import time_of
from questlib.integer.triton.fused_attention import can_fuse_attention, fuse_attention
from questlib.integer.triton.fused_transformers import (
    FusedTransformer,
    FusedTransformerBlock,
    can_fuse_block,
    can_fuse_transformer,
)
from questlib.integer.triton.layers import TritonLayer
from questlib.integer.triton.quantizing import affine_of


class FusedResnetBlock(ResnetBlock2D):
    """A ResnetBlock2D as `fuse` turns it into.

    GroupNorm becomes a scale and a shift for each channel, applied with the SiLU and the
    quantization in one pass over the activations. The timestep's shift and the shortcut are added
    by the products.
    """

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs
    ) -> torch.Tensor:
        """input [B, C, H, W], temb [B, E] -> [B, O, H, W]"""
        time = time_of(self, temb)
        added = time if self.time_embedding_norm == "default" else None
        x = self.conv1(
            input_tensor, norm=affine_of(input_tensor, self.norm1), silu=True, shift=added
        )
        norm = affine_of(x, self.norm2)
        if time is not None and added is None:
            scale, shift = (v.float() for v in time.chunk(2, dim=1))  # [B, O] each
            norm = (norm[0] * (1 + scale), norm[1] * (1 + scale) + shift)
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self.conv2(x, norm=norm, silu=True, residual=skip)


def fuse(unet: nn.Module) -> int:
    """Turn every block that can be into a fused one, in place.

    Returns:
        The number of such blocks.
    """
    fused = 0
    for module in unet.modules():
        if isinstance(module, Attention) and can_fuse_attention(module):
            fuse_attention(module)
            fused += 1
    for block in unet.modules():
        for can_fuse, kind in KINDS:
            if can_fuse(block):
                block.__class__ = kind
                fused += 1
    return fused


def _can_fuse_resnet(block: nn.Module) -> bool:
    """Whether a block has two Triton layers, each right behind a plain GroupNorm and a SiLU."""
    if not isinstance(block, ResnetBlock2D):
        return False
    layers = (block.conv1, block.conv2)
    norms = (block.norm1, block.norm2)
    return (
        all(isinstance(layer, TritonLayer) for layer in layers)
        and all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in norms)
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.output_scale_factor == 1
        and block.dropout.p == 0
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm in ("default", "scale_shift")
    )


KINDS = (
    (_can_fuse_resnet, FusedResnetBlock),
    (can_fuse_block, FusedTransformerBlock),
    (can_fuse_transformer, FusedTransformer),
)
