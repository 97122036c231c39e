"""ResNet blocks that run norm and activation inside the quantizing kernel, and add the shortcut in
the product's epilogue."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.integer.triton.layers import TritonLayer
from questlib.integer.triton.quantizing import group_norm_affine


class FusedResnetBlock(ResnetBlock2D):
    """A ResnetBlock2D as `fuse` turns it into.

    GroupNorm becomes a scale and a shift for each channel, applied with the SiLU and the
    quantization in one pass over the activations. In exact arithmetic it is the same block; float
    rounding differs, so that single codes can differ from the simulation's by one.
    """

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs
    ) -> torch.Tensor:
        """input [B, C, H, W], temb [B, E] -> [B, O, H, W]"""
        x = self.conv1(input_tensor, norm=_affine(input_tensor, self.norm1), silu=True)
        shift = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if shift is not None and self.time_embedding_norm == "default":
            x = x + shift[:, :, None, None]
        norm = _affine(x, self.norm2)
        if shift is not None and self.time_embedding_norm == "scale_shift":
            scale, shift = (v.float() for v in shift.chunk(2, dim=1))  # [B, O] each
            norm = (norm[0] * (1 + scale), norm[1] * (1 + scale) + shift)
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self.conv2(x, norm=norm, silu=True, residual=skip)


def _affine(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    return group_norm_affine(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def fuse(unet: nn.Module) -> int:
    """Turn every ResNet block that can be into a FusedResnetBlock, in place.

    Returns:
        The number of such blocks.
    """
    blocks = [block for block in unet.modules() if _can_fuse(block)]
    for block in blocks:
        block.__class__ = FusedResnetBlock
    return len(blocks)


def _can_fuse(block: nn.Module) -> bool:
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
