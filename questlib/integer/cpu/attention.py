"""Attention on the CPU: both products in integers, whatever the number of heads."""

from __future__ import annotations

import itertools

import torch
from diffusers.models.attention_processor import Attention

from questlib.errors import EngineError
from questlib.integer.attention_form import Operands
from questlib.integer.cpu.layers import send
from questlib.integer.cpu.products import MIDDLE, multiply, prepack
from questlib.integer.form import BYTE, INT32, Grid, WeightPart, group_in_force
from questlib.integer.modules import IntegerAttention
from questlib.quantization.attention import QuantAttnProcessor

# Attention scores of one head that are held at a time: few enough to stay in the cache, enough for
# all threads.
CHUNK = 1 << 20
# Scores of one head below which a loop over heads costs more than it saves.
SMALL = 1 << 19


class CpuAttnProcessor(IntegerAttention):
    """Attention whose products q k^T and probs v run in integers. The softmax runs in float32.

    Small problems, where a loop over heads does not pay, multiply the same integers in float32,
    exact below 2^24. Shifts 2^e of v scale the output; q and k have none (`attention_form`).
    """

    def __init__(self, processor: QuantAttnProcessor, name: str, exact: bool = False) -> None:
        super().__init__(processor, name)
        self.exact = exact
        self.engine = "reference" if exact else "cpu-int8"

    def attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        grids = gq, gk, gv, gp = self.grids[group_in_force(self.steps, self.name)]
        queries, keys = query.shape[1], key.shape[1]
        dim = query.shape[2] // attn.heads
        largest = max(gq.max_abs * gk.max_abs * dim, gp.max_abs * gv.max_abs * keys)
        if largest > INT32:
            raise EngineError(f"{self.name}: sums over {keys} keys could overflow int32")
        small = queries * keys <= SMALL and largest < 2**24
        product = self._in_float if small else self._in_bytes
        out = product(grids, query, key, value, attention_mask, attn.heads, attn.scale)
        return out.to(query.dtype)

    def _in_float(
        self,
        grids: Operands,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        heads: int,
        scale: float,
    ) -> torch.Tensor:
        gq, gk, gv, gp = grids
        q, k, v = (
            _by_head(integers(x, grid), heads)  # [B, heads, N or M, dim]
            for x, grid in ((query, gq), (key, gk), (value, gv))
        )
        scores = (q @ k.transpose(-1, -2)).mul_(gq.base * gk.base * scale)  # [B, heads, N, M]
        if mask is not None:
            scores = scores + mask.unflatten(0, (-1, heads))
        out = (integers(scores.softmax(-1), gp) @ v).transpose(1, 2).flatten(2)  # [B, N, C]
        return out.mul_(2.0**self.v_shift * (gp.base * gv.base))

    def _in_bytes(
        self,
        grids: Operands,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        heads: int,
        scale: float,
    ) -> torch.Tensor:
        gq, gk, gv, gp = grids
        batch, n, width = query.shape
        m = key.shape[1]
        dim = width // heads
        powers = 2.0**self.v_shift
        out = torch.empty(batch, n, width)
        q, zero = send(query, gq, -1)
        # k's compensation would add the same to all scores of a query: the softmax does not see it
        k, _ = as_weight(key, gk)
        v, v_compensation = as_weight(value, gv)
        q = _by_head(q, heads).contiguous()  # [B, heads, N, dim]
        k = _by_head(k, heads).contiguous()  # [B, heads, M, dim]
        v = _by_head(v, heads).transpose(2, 3).contiguous()  # [B, heads, dim, M]
        rows = max(1, CHUNK // m)
        compensation = None
        if v_compensation:
            compensation = torch.full((dim,), v_compensation, dtype=torch.int32)

        def packed(weight: torch.Tensor, add: torch.Tensor | None, factor: torch.Tensor):
            inputs = weight.shape[1]
            shift = torch.zeros(inputs, dtype=torch.int64)
            part = WeightPart(0, inputs, weight, add, factor, shift)
            return prepack(part, None, rows, self.exact)

        for b, h in itertools.product(range(batch), range(heads)):
            own = slice(h * dim, (h + 1) * dim)
            keys = packed(k[b, h], None, torch.ones(m))
            values = packed(v[b, h], compensation, powers[own])
            for r in range(0, n, rows):
                base = gq.base * gk.base * scale
                scores = multiply(
                    q[b, h, r : r + rows], zero, base, keys, None, None, torch.float32
                )
                if mask is not None:
                    own_mask = mask[b * heads + h]  # [1 or N, M]
                    scores = scores + (own_mask[r : r + rows] if len(own_mask) > 1 else own_mask)
                probs, _ = send(torch.softmax(scores, -1, out=scores), gp, -1, inplace=True)
                base = gp.base * gv.base
                out[b, r : r + rows, own] = multiply(
                    probs, 0, base, values, None, None, torch.float32
                )
        return out


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, heads * dim] -> [B, heads, N, dim]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def integers(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """float x [..., C] -> its carried integers a, in float32."""
    a = (x * grid.inverse).round_().clamp_(grid.low.float(), grid.high.float())
    return a if grid.multiplier is None else a.mul_(grid.multiplier.float())


def as_weight(x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, int]:
    """float x [..., C] -> (int8 w, compensation) with a = w + compensation."""
    compensation = 0 if grid.max_abs <= BYTE else MIDDLE + int(grid.low)
    return integers(x, grid).sub_(compensation).to(torch.int8), compensation
