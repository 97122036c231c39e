"""Attention whose norm runs in the projections' quantization, and whose residual is added by the
last projection. Where its products run in integers, the projections write their operands as codes.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.integer.form import group_in_force
from questlib.integer.triton.attention import TritonAttnProcessor, masked
from questlib.integer.triton.contexts import Contexts
from questlib.integer.triton.layers import Affine, Sent, TritonLayer
from questlib.integer.triton.quantizing import affine_of
from questlib.integer.triton.together import can_share, quantized_together
from questlib.quantization.attention import FloatAttnProcessor, ProjectedAttention


class FusedAttention(ProjectedAttention):
    """What `fuse` makes of an attention. Subclasses say what its products take and give."""

    contexts: Contexts

    def projection(
        self, layer: TritonLayer, which: str, x: torch.Tensor, sent: Sent
    ) -> torch.Tensor:
        """What the products take of "q", "k" or "v", of an input x that is quantized already."""
        raise NotImplementedError

    def products(
        self, attn: Attention, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The attention of three projections, [B, N, C]."""
        raise NotImplementedError

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> torch.Tensor:
        """As QuantAttnProcessor, and what stands around it.

        Args:
            residual: like the output; added to it.
            norm: of hidden_states [B, N, C], before everything else.
        """
        if attention_mask is not None:
            raise masked(attn.to_q.name)
        x = hidden_states
        before: Affine | nn.LayerNorm = (None, None) if norm is None else norm
        if attn.group_norm is not None:
            pixels = x if x.ndim == 4 else x.transpose(1, 2)[..., None]  # [B, C, N, 1]
            before = affine_of(pixels, attn.group_norm)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]
        if attn.residual_connection:
            residual = x
        if encoder_hidden_states is None:
            operands = self.projected(attn, "qkv", x, before)
        else:
            (query,) = self.projected(attn, "q", x, before)
            key_and_value = self.contexts.get(
                group_in_force(attn.to_q.steps, attn.to_q.name),
                encoder_hidden_states,
                lambda: self.of_context(attn, encoder_hidden_states),
            )
            operands = (query, *key_and_value)
        out = self.products(attn, operands, x.dtype)
        out = attn.to_out[0](out, residual=residual)
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)  # -> [B, C, H, W]
        return out

    def of_context(self, attn: Attention, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A context's keys and values, as the products take them."""
        return self.projected(attn, "kv", context, (None, None))

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.contexts = Contexts()  # what it holds is of another device
        return super()._apply(*args, **kwargs)

    def projected(
        self, attn: Attention, which: str, x: torch.Tensor, norm: Affine | nn.LayerNorm
    ) -> tuple[torch.Tensor, ...]:
        """Some of "qkv", whose input x [B, N, C] is quantized in one pass."""
        layers = [getattr(attn, f"to_{name}") for name in which]
        sent = quantized_together(layers, x, norm)
        return tuple(
            self.projection(layer, name, x, own)
            for layer, name, own in zip(layers, which, sent, strict=True)
        )


class FusedAttnProcessor(FusedAttention, TritonAttnProcessor):
    """A TritonAttnProcessor as `fuse` turns it into: its products take codes."""

    def projection(
        self, layer: TritonLayer, which: str, x: torch.Tensor, sent: Sent
    ) -> torch.Tensor:
        return layer(x, codes=self.kernel.codes(which), sent=sent)

    def products(
        self, attn: Attention, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        q, k, v = operands
        return self.kernel.attend_codes(q, k, v, attn.heads, attn.scale, dtype)


class FusedFloatAttnProcessor(FusedAttention, FloatAttnProcessor):
    """A FloatAttnProcessor as `fuse` turns it into: its products are torch's."""

    def projection(
        self, layer: TritonLayer, which: str, x: torch.Tensor, sent: Sent
    ) -> torch.Tensor:
        return layer(x, sent=sent)

    def products(
        self, attn: Attention, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        return self.attend(attn, *operands)


FUSED: dict[type, type[FusedAttention]] = {
    TritonAttnProcessor: FusedAttnProcessor,
    FloatAttnProcessor: FusedFloatAttnProcessor,
}


def can_fuse_attention(attn: Attention) -> bool:
    """Whether an attention's projections are Triton's, and its products Triton's or in floating
    point, with no more between."""
    if type(attn.processor) not in FUSED or attn.added_kv_proj_dim is not None:
        return False
    layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    norm = attn.group_norm
    if not all(isinstance(layer, TritonLayer) for layer in layers):
        return False
    # Keys and values of a context have another input than the queries.
    own = attn.to_k.channels == attn.to_q.channels
    return (
        can_share(layers[1:3])
        and can_share(layers[:3] if own else layers[:1])
        and (norm is None or (isinstance(norm, nn.GroupNorm) and norm.affine))
        and attn.spatial_norm is None
        and attn.norm_cross is None
        and attn.to_out[1].p == 0
        and attn.rescale_output_factor == 1
    )


def fuse_attention(attn: Attention) -> None:
    """Fuse it, in place."""
    attn.processor.__class__ = FUSED[type(attn.processor)]
    attn.processor.contexts = Contexts()
    if isinstance(attn.processor, FusedAttnProcessor):
        attn.processor.kernel.hold_codes()
