"""The transformers of a UNet: GroupNorm and GEGLU inside the quantizing kernels, residuals in the
products' epilogues."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from questlib.errors import EngineError
from questlib.integer.triton.fused_attention import FusedAttention
from questlib.integer.triton.layers import TritonLayer
from questlib.integer.triton.quantizing import affine_of
from questlib.integer.triton.together import can_share, plain_norm, quantized_together


class FusedTransformerBlock(BasicTransformerBlock):
    """A BasicTransformerBlock as `fuse` turns it into."""

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
        if cross_attention_kwargs:
            raise EngineError(
                f"engine triton: fused blocks take no cross_attention_kwargs, "
                f"found {', '.join(cross_attention_kwargs)}; fuse=False takes them"
            )
        x = hidden_states
        source = encoder_hidden_states if self.only_cross_attention else None
        x = self.attn1(x, source, attention_mask, residual=x, norm=self.norm1)
        if self.attn2 is not None:
            x = self.attn2(
                x, encoder_hidden_states, encoder_attention_mask, residual=x, norm=self.norm2
            )
        proj = self.ff.net[0].proj
        (sent,) = quantized_together([proj], x, self.norm3)
        gated = proj(x, sent=sent)  # [B, N, 2 F]: values and gates
        return self.ff.net[2](gated, gated=True, residual=x)


class FusedTransformer(Transformer2DModel):
    """A Transformer2DModel on pixels as `fuse` turns it into; its tensors stay channels_last."""

    def _operate_on_continuous_inputs(self, hidden_states: torch.Tensor) -> Any:
        norm = affine_of(hidden_states, self.norm)
        if not self.use_linear_projection:
            pixels = self.proj_in(hidden_states, norm=norm).flatten(2).transpose(1, 2)
        else:
            rows = hidden_states.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]
            pixels = self.proj_in(rows, norm=norm)
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
        if self.use_linear_projection:
            rows = residual.flatten(2).transpose(1, 2)
            out = self.proj_out(hidden_states, residual=rows)
            return out.transpose(1, 2).reshape(residual.shape)
        pixels = hidden_states.transpose(1, 2).reshape(batch_size, inner_dim, height, width)
        return self.proj_out(pixels, residual=residual)


def can_fuse_block(block: nn.Module) -> bool:
    """Whether a block's attentions and GEGLU are all Triton's, behind plain LayerNorms."""
    if type(block) is not BasicTransformerBlock:
        return False
    attentions = [a for a in (block.attn1, block.attn2) if a is not None]
    net = block.ff.net
    norms = [block.norm1, block.norm3] + ([] if block.attn2 is None else [block.norm2])
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and block._chunk_size is None
        and all(isinstance(a.processor, FusedAttention) for a in attentions)
        and all(a.group_norm is None and not a.residual_connection for a in attentions)
        and len(net) == 3
        and isinstance(net[0], GEGLU)
        and can_share([net[0].proj])
        and all(plain_norm(norm) for norm in norms)
        and net[1].p == 0
        and isinstance(net[2], TritonLayer)
        and len(net[2].parts) == 1
    )


def can_fuse_transformer(model: nn.Module) -> bool:
    """Whether a transformer's projections are Triton's, behind a plain GroupNorm."""
    return (
        type(model) is Transformer2DModel
        and model.is_input_continuous
        and isinstance(model.norm, nn.GroupNorm)
        and model.norm.affine
        and isinstance(model.proj_in, TritonLayer)
        and isinstance(model.proj_out, TritonLayer)
    )
