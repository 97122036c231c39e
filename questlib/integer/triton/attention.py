"""Attention on NVIDIA GPUs: both products in integers, and the softmax between, in one kernel."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention

from questlib.errors import EngineError
from questlib.integer.attention_form import Operands
from questlib.integer.form import group_in_force
from questlib.integer.modules import IntegerAttention
from questlib.integer.triton.flags import Flagged
from questlib.integer.triton.layers import Codes
from questlib.integer.triton.packing import grid_table, padded_to, sent_constant
from questlib.integer.triton.products import integer_attention
from questlib.integer.triton.quantizing import quantize
from questlib.integer.triton.runtime import check_input
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.step_groups import StepGroups

# Channels of a head. With 512, the kernel's tiles do not fit a multiprocessor's shared memory.
WIDEST = 256


class TritonAttention(Flagged):
    """The two products of an attention in integers, and the softmax between them.

    Args:
        name: of the attention, for messages.
        grids: of q, k, v and the probabilities, for each step group; q and k have no shift.
        v_shift: int64 [C]: v is about base * a * 2^shift.
        steps: the UNet's step groups.

    Raises:
        EngineError: the kernel does not serve these grids.
    """

    def __init__(
        self,
        name: str,
        grids: tuple[Operands, ...],
        v_shift: torch.Tensor,
        steps: StepGroups,
    ) -> None:
        super().__init__()
        self.name = name
        self.width = len(v_shift)
        self.__dict__["steps"] = steps
        for operands in grids:
            probs = operands[3]
            from_zero = probs.uniform and int(probs.low) == 0
            if not from_zero or any(grid.max_abs > 255 for grid in operands):
                raise EngineError(
                    f"{name}: engine triton: attention takes codes of up to 8 bits, "
                    "probabilities from zero"
                )
        for i, x in enumerate("qkv"):
            own = [operands[i] for operands in grids]
            channels = max(len(grid.inverse) for grid in own)
            table = torch.stack([grid_table(grid).expand(4, channels) for grid in own])
            self.hold(f"table_{x}", table)
        self.levels = [int(grid.high[0] - grid.low[0]) for grid in grids[0]]
        self.factors = [q.base * k.base for q, k, _, _ in grids]
        self.p_inverses = [float(p.inverse) for *_, p in grids]
        self.constants = [[-sent_constant(q), -sent_constant(v)] for q, _, v, _ in grids]
        scales = [(p.base * v.base) * 2.0**v_shift for _, _, v, p in grids]
        self.hold("v_scale", torch.stack(scales).float())
        self.hold_flag(v_shift.device)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
    ) -> torch.Tensor:
        """The attention of each head.

        Args:
            query: [B, N, C].
            key: [B, M, C].
            value: [B, M, C].
            heads: number of heads, each with C / heads channels.
            scale: of the scores (attn.scale).

        Returns:
            [B, N, C] in the query's dtype.
        """
        g = group_in_force(self.steps, self.name)
        operands = (query, key, value)
        tables = (self.table_q, self.table_k, self.table_v)
        sent = []
        for x, table, levels in zip(operands, tables, self.levels[:3], strict=True):
            check_input(x, self.name, x.shape[-1], self.width)
            rows = x.reshape(1, 1, -1, self.width)
            rows = rows if rows.stride(-1) == 1 else rows.contiguous()
            a, *_ = quantize(rows, table[g], self.flag, levels, [0, 0], False)
            sent.append(a.reshape(*x.shape[:2], -1))
        q, k, v = sent
        # The tensor core wants the index that is summed over innermost.
        turned = v.new_empty(v.shape[0], self.width, padded_to(v.shape[1], 16))
        turned[..., : v.shape[1]] = v[..., : self.width].transpose(1, 2)
        return self.attend_codes(q, k, turned, heads, scale, query.dtype)

    def attend_codes(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The attention of operands that are codes, as `integer_attention` takes them."""
        g = group_in_force(self.steps, self.name)
        return integer_attention(
            q,
            k,
            v,
            self.v_scale[g],
            heads,
            self.constants[g],
            self.factors[g] * scale,
            self.p_inverses[g],
            self.levels[3],
            dtype,
        )

    def hold_codes(self) -> None:
        """Hold tables [G, 4, C] of q, k and v, with which products write the codes themselves."""
        for x in "qkv":
            table = getattr(self, f"table_{x}")
            self.hold(f"codes_{x}", table.expand(-1, -1, self.width).contiguous())

    def codes(self, x: str) -> Codes:
        """The codes that the attention takes of "q", "k" or "v"."""
        g = group_in_force(self.steps, self.name)
        table = getattr(self, f"codes_{x}")[g]
        return Codes(table, self.levels["qkv".index(x)], transposed=x == "v")


def masked(name: str) -> EngineError:
    """What an attention says to a mask."""
    return EngineError(f"{name}: engine triton: attention masks are not served")


class TritonAttnProcessor(IntegerAttention):
    """The processor of an attention whose products run in `TritonAttention`."""

    engine = "triton"

    def __init__(self, processor: QuantAttnProcessor, name: str, heads: int) -> None:
        dim = len(processor.q.index) // heads
        if dim > WIDEST:
            raise EngineError(
                f"{name}: engine triton: expected heads of at most {WIDEST} channels, found {dim}"
            )
        super().__init__(processor, name)
        self.kernel = TritonAttention(name, self.grids, self.v_shift, processor.q.steps)

    def attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise masked(self.name)
        return self.kernel.attend(query, key, value, attn.heads, attn.scale)
