"""diffusers' attention with quantized operands, or with products in floating point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.transforms import hadamard, largest_block

SCORES = 2**28  # attention scores in one piece (1 GiB); larger ones are computed head by head


class ProjectedAttention(nn.Module):
    """What stands around an attention's products: norms, projections, residual.

    The method is `__call__`, not `forward`: diffusers reads its signature to decide which arguments
    to pass. Subclasses implement `attend`.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn.added_kv_proj_dim is not None:
            return self.with_added(attn, hidden_states, encoder_hidden_states, attention_mask)
        residual = hidden_states
        shape = hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = attn.prepare_attention_mask(attention_mask, source.shape[1], shape[0])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            source = hidden_states
        elif attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        query, key = self.turned(attn, attn.to_q(hidden_states), attn.to_k(source))
        hidden_states = self.attend(attn, query, key, attn.to_v(source), attention_mask)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)  # -> [B, C, H, W]
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        factor = attn.rescale_output_factor
        return hidden_states if factor == 1 else hidden_states / factor

    def with_added(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention on pixels [B, C, H, W] with added keys and values of the text [B, L, D].

        DeepFloyd IF, Kandinsky and unCLIP have it (diffusers' AttnAddedKVProcessor).
        """
        residual = hidden_states
        hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, HW, C]
        batch, length, _ = hidden_states.shape
        attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden_states)
        key = attn.add_k_proj(source)
        value = attn.add_v_proj(source)
        if not attn.only_cross_attention:
            key = torch.cat([key, attn.to_k(hidden_states)], 1)
            value = torch.cat([value, attn.to_v(hidden_states)], 1)
        query, key = self.turned(attn, query, key)
        hidden_states = self.attend(attn, query, key, value, attention_mask)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        return hidden_states.transpose(1, 2).reshape(residual.shape) + residual

    def turned(
        self, attn: Attention, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, N, C] and keys [B, M, C] as the products take them."""
        return query, key

    def attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention between the projections' outputs.

        Args:
            attn: the attention module, for its number of heads and its scale.
            query: [B, N, C].
            key: [B, M, C].
            value: [B, M, C].
            attention_mask: added to the scores [B * heads, N, M].

        Returns:
            [B, N, C].
        """
        raise NotImplementedError


class FloatAttnProcessor(ProjectedAttention):
    """An attention whose products run in floating point, by torch's own fused attention.

    It has no quantizers: the simulation and every engine compute the same.
    """

    def attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # [B, N, C] -> [B, heads, N, C / heads]
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attention_mask.unflatten(0, (-1, attn.heads))  # [B, heads, N, M]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=attn.scale)
        return out.transpose(1, 2).flatten(2)


class QuantAttnProcessor(ProjectedAttention):
    """diffusers' attention with quantized q, k, v [B, N, C] and softmax output.

    The softmax output is unsigned, with zero point 0 and one scale. The softmax and both products
    run in the model's own precision on the quantized operands. Integer engines replace `attend`.

    With `rotation`, queries and keys of each head are rotated before they are quantized (QuaRot,
    Ashkboos et al. 2024). A rotation of both leaves their products as they are.
    """

    def __init__(
        self,
        q: ActQuantizer,
        k: ActQuantizer,
        v: ActQuantizer,
        probs: ActQuantizer,
        rotation: bool = False,
    ) -> None:
        super().__init__()
        self.rotation = rotation
        self.q = q
        self.k = k
        self.v = v
        self.probs = probs

    def turned(
        self, attn: Attention, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.rotation:
            return query, key
        # Blocks of this size do not cross the bounds of heads.
        block = largest_block(query.shape[-1] // attn.heads)
        return hadamard(query, block), hadamard(key, block)

    def attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch = query.shape[0]
        query = attn.head_to_batch_dim(self.q(query))  # [B * heads, N, C / heads]
        key = attn.head_to_batch_dim(self.k(key))
        value = attn.head_to_batch_dim(self.v(value))

        def heads(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            mask: torch.Tensor | None = None,
        ) -> torch.Tensor:
            probs = attn.get_attention_scores(query, key, mask)  # [B * heads, N, M]
            # [B, heads, N, M], so that the quantizer sees the batch first
            probs = self.probs(probs.unflatten(0, (batch, -1)))
            return torch.bmm(probs.flatten(0, 1), value)

        small = query.shape[0] * query.shape[1] * key.shape[1] <= SCORES
        if small or attention_mask is not None or self.probs.observer is not None:
            return attn.batch_to_head_dim(heads(query, key, value, attention_mask))
        # One head after another; the gradient computes a head's scores again. At 64x64 latents the
        # scores [N, M] of one head take 64 MiB.
        split = [
            x.unflatten(0, (batch, attn.heads)).unbind(1)  # heads x [B, N, C / heads]
            for x in (query, key, value)
        ]
        out = [checkpoint(heads, *qkv, use_reentrant=False) for qkv in zip(*split, strict=True)]
        return attn.batch_to_head_dim(torch.stack(out, 1).flatten(0, 1))
