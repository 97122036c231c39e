"""Attention whose norm runs in the projections' quantization, whose operands the projections write
as codes, and whose residual is added by the last projection."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.integer.triton.attention import TritonAttnProcessor, masked
from questlib.integer.triton.layers import TritonLayer
from questlib.integer.triton.quantizing import affine_of


class FusedAttnProcessor(TritonAttnProcessor):
    """A TritonAttnProcessor as `fuse` turns it into."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As QuantAttnProcessor; residual, like the output, is added to it."""
        x = hidden_states
        norm = (None, None)
        if attn.group_norm is not None:
            pixels = x if x.ndim == 4 else x.transpose(1, 2)[..., None]  # [B, C, N, 1]
            norm = affine_of(pixels, attn.group_norm)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]
        if attn.residual_connection:
            residual = x
        source = x if encoder_hidden_states is None else encoder_hidden_states
        other = norm if encoder_hidden_states is None else (None, None)
        if attention_mask is not None:
            raise masked(self.name)
        query = attn.to_q(x, norm=norm, codes=self.kernel.codes("q"))
        key = attn.to_k(source, norm=other, codes=self.kernel.codes("k"))
        value = attn.to_v(source, norm=other, codes=self.kernel.codes("v"))
        out = self.kernel.attend_codes(query, key, value, attn.heads, attn.scale, x.dtype)
        out = attn.to_out[0](out, residual=residual)
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)  # -> [B, C, H, W]
        return out


def can_fuse_attention(attn: Attention) -> bool:
    """Whether an attention's products and projections are all Triton's, with no more between."""
    if type(attn.processor) is not TritonAttnProcessor or attn.added_kv_proj_dim is not None:
        return False
    layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    norm = attn.group_norm
    return (
        all(isinstance(layer, TritonLayer) for layer in layers)
        and (norm is None or (isinstance(norm, nn.GroupNorm) and norm.affine))
        and attn.spatial_norm is None
        and attn.norm_cross is None
        and attn.to_out[1].p == 0
        and attn.rescale_output_factor == 1
    )


def fuse_attention(attn: Attention) -> None:
    """Fuse it, in place."""
    attn.processor.__class__ = FusedAttnProcessor
    attn.processor.kernel.hold_codes()
