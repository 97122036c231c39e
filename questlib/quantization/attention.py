"""diffusers' attention with quantized operands."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from questlib.quantization.act_quantizer import ActQuantizer

SCORES = 2**28  # attention scores in one piece (1 GiB); above, head by head


class QuantAttnProcessor(nn.Module):
    """diffusers' attention with quantized q, k, v [B, N, C] and softmax output (unsigned, zero point 0, one scale).

    `__call__`, not `forward`: diffusers reads its signature to decide which arguments to pass.
    The softmax and the two products run in the model's own precision on the quantized operands.
    """

    def __init__(
        self, q: ActQuantizer, k: ActQuantizer, v: ActQuantizer, probs: ActQuantizer
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.probs = q, k, v, probs

    def __call__(
        self,
        attn: Attention,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
    ) -> torch.Tensor:
        residual, shape = hidden_states, hidden_states.shape
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
        hidden_states = self.attend(
            attn, attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source), attention_mask
        )
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(
                shape
            )  # [B, HW, C] -> [B, C, H, W]
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def attend(self, attn: Attention, query, key, value, attention_mask=None) -> torch.Tensor:
        """query [B, N, C], key, value [B, M, C], as the projections give them -> [B, N, C]. Engines replace this method."""
        batch = query.shape[0]
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (self.q(query), self.k(key), self.v(value))
        )

        def heads(query, key, value, mask=None) -> torch.Tensor:
            # [B * heads, N, M]; regrouped to [B, heads, N, M] so that the quantizer sees the batch first
            probs = attn.get_attention_scores(query, key, mask)
            return torch.bmm(self.probs(probs.unflatten(0, (batch, -1))).flatten(0, 1), value)

        count = attn.heads
        if (
            attention_mask is not None
            or query.shape[0] * query.shape[1] * key.shape[1] <= SCORES
            or self.probs.observer is not None
        ):
            return attn.batch_to_head_dim(heads(query, key, value, attention_mask))
        # One head after another, whose scores are computed again for the gradient: [N, M] is 64 MiB at 64x64 latents.
        split = [
            x.unflatten(0, (batch, count)).unbind(1) for x in (query, key, value)
        ]  # count x [B, N, C / count]
        out = [checkpoint(heads, *qkv, use_reentrant=False) for qkv in zip(*split, strict=True)]
        return attn.batch_to_head_dim(torch.stack(out, 1).flatten(0, 1))
