"""Blocks whose norms and activations run inside the quantizing kernels (`kernels/rows.cpp`).

In exact arithmetic they are the same blocks. A norm's sums are taken in another order than torch's,
so that single codes can differ from the simulation's by one. Integer sums are exact as ever, and a
rerun gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from questlib.integer.cpu.attention import CpuAttnProcessor
from questlib.integer.cpu.layers import CpuLayer
from questlib.integer.cpu.prepared import (
    affine_of,
    after_geglu,
    after_group_norm,
    after_layer_norm,
    as_rows,
    pieces,
)
from questlib.integer.cpu.quantizing import Sent
from questlib.integer.time_table import time_of

# Values of a GEGLU's input that are held at a time: few enough to stay in the cache.
PIECE = 1 << 20


class FusedResnetBlock(ResnetBlock2D):
    """A ResnetBlock2D as `fuse` turns it into: norm, SiLU and quantization are one kernel."""

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs
    ) -> torch.Tensor:
        """input [B, C, H, W], temb [B, E] -> [B, O, H, W]"""
        time = time_of(self, temb)
        added = time if self.time_embedding_norm == "default" else None
        affine = affine_of(input_tensor, self.norm1)
        x = self.conv1(after_group_norm(self.conv1, input_tensor, affine, silu=True))
        affine = affine_of(x, self.norm2, added)
        if time is not None and added is None:
            scale, shift = (v.float() for v in time.chunk(2, dim=1))  # [B, O] each
            affine = (affine[0] * (1 + scale), affine[1] * (1 + scale) + shift)
        x = self.conv2(after_group_norm(self.conv2, x, affine, silu=True))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        x = x.add_(skip)
        return x if self.output_scale_factor == 1 else x.div_(self.output_scale_factor)


class FusedUpsample(Upsample2D):
    """An Upsample2D as `fuse` turns it into: the bytes are repeated, a quarter of the work."""

    def forward(
        self, hidden_states: torch.Tensor, output_size: Any = None, *args, **kwargs
    ) -> torch.Tensor:
        """[B, C, H, W] -> [B, O, 2 H, 2 W], or of `output_size`"""
        conv = _conv_of(self)
        factor = 2.0 if output_size is None else None

        def repeated(x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, output_size, factor, "nearest")

        sent = [
            Sent(repeated(part.bytes), None if part.scale is None else repeated(part.scale))
            for part in conv.send(hidden_states)
        ]
        return conv.multiply(sent, hidden_states.dtype)


class FusedTransformerBlock(BasicTransformerBlock):
    """A BasicTransformerBlock as `fuse` turns it into.

    Each LayerNorm is quantized for all layers behind it in one pass. The feed-forward runs on a few
    rows at a time, so that the eight-fold hidden layer stays in the cache.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, N, C] -> [B, N, C]. Its norms do not depend on the conditions."""
        kwargs = cross_attention_kwargs or {}
        x = hidden_states
        for attn, norm in ((self.attn1, self.norm1), (self.attn2, self.norm2)):
            if attn is None:
                continue
            source = None
            mask = attention_mask
            if attn is self.attn2 or self.only_cross_attention:
                source = encoder_hidden_states
            if attn is self.attn2:
                mask = encoder_attention_mask
            layers = [attn.to_q] if source is not None else [attn.to_q, attn.to_k, attn.to_v]
            x = attn(after_layer_norm(layers, x, norm), source, mask, **kwargs).add_(x)
        proj, last = self.ff.net[0].proj, self.ff.net[2]
        prepared = after_layer_norm([proj], x, self.norm3)
        rows = x.view(-1, x.shape[-1])  # [B N, C]
        for own, piece in pieces(prepared, proj, max(1, PIECE // proj.out_features)):
            rows[own] += last(after_geglu(last, proj(piece)))
        return x


class FusedTransformer(Transformer2DModel):
    """A Transformer2DModel on pixels as `fuse` turns it into."""

    def _operate_on_continuous_inputs(self, hidden_states: torch.Tensor) -> Any:
        affine = affine_of(hidden_states, self.norm)
        prepared = after_group_norm(self.proj_in, hidden_states, affine)
        if self.use_linear_projection:
            pixels = self.proj_in(as_rows(prepared))
        else:
            # [B, C, H, W] -> [B, HW, C]
            pixels = self.proj_in(prepared).permute(0, 2, 3, 1).flatten(1, 2)
        return pixels, pixels.shape[-1]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        def image(rows: torch.Tensor) -> torch.Tensor:
            # [B, HW, C] -> [B, C, H, W], in channels_last
            return rows.view(batch_size, height, width, -1).permute(0, 3, 1, 2)

        if self.use_linear_projection:
            return image(self.proj_out(hidden_states)).add_(residual)
        return self.proj_out(image(hidden_states)).add_(residual)


def fuse(unet: nn.Module) -> int:
    """Turn every block that can be into a fused one, in place.

    Returns:
        The number of such blocks.
    """
    fused = 0
    for block in unet.modules():
        for can_fuse, kind in KINDS:
            if can_fuse(block):
                block.__class__ = kind
                fused += 1
    return fused


def _conv_of(block: Upsample2D) -> CpuLayer:
    return block.conv if block.name == "conv" else block.Conv2d_0


def _compiled(*layers: nn.Module) -> bool:
    """Whether these are layers of this engine on its compiled kernels."""
    return all(isinstance(layer, CpuLayer) and layer.compiled for layer in layers)


def _plain(norm: nn.Module, kind: type[nn.GroupNorm] | type[nn.LayerNorm]) -> bool:
    """Whether a norm is just such a one, with weight and bias."""
    return type(norm) is kind and norm.weight is not None and norm.bias is not None


def _can_fuse_resnet(block: nn.Module) -> bool:
    return (
        type(block) is ResnetBlock2D
        and _compiled(block.conv1, block.conv2)
        and all(_plain(norm, nn.GroupNorm) for norm in (block.norm1, block.norm2))
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm in ("default", "scale_shift")
    )


def _can_fuse_upsample(block: nn.Module) -> bool:
    return (
        type(block) is Upsample2D
        and block.use_conv
        and not block.use_conv_transpose
        and block.interpolate
        and block.norm is None
        and _compiled(_conv_of(block))
    )


def _can_fuse_block(block: nn.Module) -> bool:
    if type(block) is not BasicTransformerBlock or block.norm_type != "layer_norm":
        return False
    attentions = [a for a in (block.attn1, block.attn2) if a is not None]
    norms = [block.norm1, block.norm3] + ([] if block.attn2 is None else [block.norm2])
    net = block.ff.net
    return (
        block.pos_embed is None
        and not hasattr(block, "fuser")
        and all(isinstance(a.processor, CpuAttnProcessor) for a in attentions)
        and all(a.group_norm is None and a.spatial_norm is None for a in attentions)
        and not any(a.residual_connection or a.added_kv_proj_dim for a in attentions)
        and all(_compiled(a.to_q, a.to_k, a.to_v) for a in attentions)
        and len(net) == 3
        and type(net[0]) is GEGLU
        and _compiled(net[0].proj, net[2])
        and all(_plain(norm, nn.LayerNorm) for norm in norms)
    )


def _can_fuse_transformer(model: nn.Module) -> bool:
    return (
        type(model) is Transformer2DModel
        and model.is_input_continuous
        and _plain(model.norm, nn.GroupNorm)
        and _compiled(model.proj_in)
    )


KINDS = (
    (_can_fuse_resnet, FusedResnetBlock),
    (_can_fuse_upsample, FusedUpsample),
    (_can_fuse_block, FusedTransformerBlock),
    (_can_fuse_transformer, FusedTransformer),
)
