"""Attention of a UNet on the Triton engine: the processor that calls its fused kernel."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention

from questlib.errors import EngineError
from questlib.integer.cpu.attention import attention_grids
from questlib.integer.triton.layers import TritonAttention
from questlib.quantization.attention import QuantAttnProcessor

WIDEST = 256  # channels of a head: of 512, the kernel's tiles do not fit an SM's shared memory


class TritonAttnProcessor(QuantAttnProcessor):
    engine = "triton"

    def __init__(self, processor: QuantAttnProcessor, name: str, heads: int) -> None:
        if (dim := len(processor.q.index) // heads) > WIDEST:
            raise EngineError(
                f"{name}: engine triton: expected heads of at most {WIDEST} channels, found {dim}"
            )
        super().__init__(processor.q, processor.k, processor.v, processor.probs)
        grids, v_shift, self.format = attention_grids(processor, name)
        self.kernel = TritonAttention(name, grids, v_shift, processor.q.steps)

    def attend(self, attn: Attention, query, key, value, attention_mask=None) -> torch.Tensor:
        if attention_mask is not None:
            raise EngineError(f"{self.kernel.name}: engine triton: attention masks are not served")
        return self.kernel.attend(query, key, value, attn.heads, attn.scale)
