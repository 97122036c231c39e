"""Attention on the CPU engine: both products in integers, whatever the number of heads; the softmax in float32."""

from __future__ import annotations

import itertools

import torch
from diffusers.models.attention_processor import Attention

from questlib.config import OFF
from questlib.errors import EngineError
from questlib.integer.cpu.layers import MIDDLE, multiply, prepack, send
from questlib.integer.form import BYTE, INT32, Grid, Part, act_grids, group_in_force
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import QuantAttnProcessor

CHUNK = (
    1 << 20
)  # attention scores of one head held at a time: few enough to stay in the cache, enough for all threads
SMALL = 1 << 19  # scores of one head below which a loop over heads costs more than it saves


class CpuAttnProcessor(QuantAttnProcessor):
    """Attention whose products run in integers: q k^T, and softmax codes times v. The softmax itself runs in float32.

    Small problems, where a loop over heads does not pay, multiply the same integers in float32, exact below 2^24.
    Shifts 2^e of v scale the output; q and k have none (`model.insert`).
    """

    def __init__(self, processor: QuantAttnProcessor, name: str, exact: bool = False) -> None:
        super().__init__(processor.q, processor.k, processor.v, processor.probs)
        self.name, self.exact, self.engine = name, exact, "reference" if exact else "cpu-int8"
        self.__dict__["steps"] = processor.q.steps
        self.grids, self.v_shift, self.format = attention_grids(processor, name)

    def attend(self, attn: Attention, query, key, value, attention_mask=None) -> torch.Tensor:
        grids = gq, gk, gv, gp = self.grids[group_in_force(self.steps, self.name)]
        m, heads = key.shape[1], attn.heads
        largest = max(gq.limit * gk.limit * query.shape[2] // heads, gp.limit * gv.limit * m)
        if largest > INT32:
            raise EngineError(f"{self.name}: sums over {m} keys could overflow int32")
        small = query.shape[1] * m <= SMALL and largest < 2**24
        product = self._in_float if small else self._in_bytes
        return product(grids, query, key, value, attention_mask, heads, attn.scale).to(query.dtype)

    def _in_float(self, grids, query, key, value, mask, heads: int, scale: float) -> torch.Tensor:
        gq, gk, gv, gp = grids
        q, k, v = (
            integers(x, g).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, N or M, dim]
            for x, g in ((query, gq), (key, gk), (value, gv))
        )
        scores = (q @ k.transpose(-1, -2)).mul_(gq.base * gk.base * scale)
        if mask is not None:
            scores = scores + mask.unflatten(0, (-1, heads))
        out = (integers(scores.softmax(-1), gp) @ v).transpose(1, 2).flatten(2)
        return out.mul_(2.0**self.v_shift * (gp.base * gv.base))

    def _in_bytes(self, grids, query, key, value, mask, heads: int, scale: float) -> torch.Tensor:
        gq, gk, gv, gp = grids
        (batch, n, width), m = query.shape, key.shape[1]
        dim, powers = width // heads, 2.0**self.v_shift
        out = torch.empty(batch, n, width)
        # an offset of k would add the same to all scores of a query, which the softmax does not see
        (q, zero), (k, _), (v, v_offset) = (
            send(query, gq, -1),
            as_weight(key, gk),
            as_weight(value, gv),
        )
        q, k = (
            x.unflatten(-1, (heads, dim)).transpose(1, 2).contiguous() for x in (q, k)
        )  # [B, heads, N or M, dim]
        v = v.unflatten(-1, (heads, dim)).permute(0, 2, 3, 1).contiguous()  # [B, heads, dim, M]
        rows = max(1, CHUNK // m)
        for b, h in itertools.product(range(batch), range(heads)):
            own = slice(h * dim, (h + 1) * dim)
            keys = prepack(Part(0, dim, k[b, h], None, torch.ones(m)), None, rows, self.exact)
            offset = None if v_offset == 0 else torch.full((dim,), v_offset, dtype=torch.int32)
            values = prepack(Part(0, m, v[b, h], offset, powers[own]), None, rows, self.exact)
            for r in range(0, n, rows):
                scores = multiply(
                    q[b, h, r : r + rows],
                    zero,
                    gq.base * gk.base * scale,
                    keys,
                    None,
                    None,
                    torch.float32,
                )
                if mask is not None:
                    scores = (
                        scores + mask[b * heads + h, r : r + rows]
                        if mask.shape[1] > 1
                        else scores + mask[b * heads + h]
                    )
                probs, _ = send(torch.softmax(scores, -1, out=scores), gp, -1, inplace=True)
                out[b, r : r + rows, own] = multiply(
                    probs, 0, gp.base * gv.base, values, None, None, torch.float32
                )
        return out


def attention_grids(
    processor: QuantAttnProcessor, name: str
) -> tuple[list[tuple[Grid, ...]], torch.Tensor, str]:
    """(grids of q, k, v, probs for each step group, shift e [C] of v, format in words). EngineError without integer form."""
    acts: list[ActQuantizer] = [processor.q, processor.k, processor.v, processor.probs]
    if off := [act.name for act in acts if not act.enabled or act.bits == OFF]:
        raise EngineError(
            f"{name}: expected quantized q, k, v and softmax output; not quantized: {', '.join(off)}"
        )
    tables = [
        act_grids(act, torch.zeros(len(act.index), dtype=torch.int64), act.name) for act in acts
    ]
    grids = [tuple(g[0] for g in of) for of in zip(*(grids for grids, _ in tables), strict=True)]
    q_shift, k_shift, v_shift, _ = (shift for _, shift in tables)
    if bool(q_shift.any() or k_shift.any()):
        raise EngineError(f"{name}: shifts 2^e of q and k have no room in their product")
    return grids, v_shift, f"A{acts[0].bits} q k^T, A{acts[3].bits} x A{acts[2].bits} probs v"


def integers(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """float x [..., C] -> its carried integers a, in float32."""
    a = (x * grid.inverse).round_().clamp_(grid.low.float(), grid.high.float())
    return a if grid.uniform else a.mul_(grid.multiplier.float())


def as_weight(x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, int]:
    """float x [..., C] -> (int8 w, offset) with a = w + offset."""
    offset = 0 if grid.limit <= BYTE else MIDDLE + int(grid.low)
    return integers(x, grid).sub_(offset).to(torch.int8), offset
