"""Attention on the CPU: both products in integers, the softmax in pinned float32 operations.

    scores = scale (q - z) k'                            k' bytes, k less its compensation
    out = f_c (sum_m p_m v'_m + compensation_v sum_m p_m)    f_c = base_p base_v 2^{e_c}

k's compensation would add the same to all scores of a query: the softmax does not see it. Sums are
int32, each is rounded to float32 once, and every operation behind them is written out, so that the
compiled kernel, oneDNN's products and the reference give the same bits. Shifts 2^e of v scale the
output; q and k have none (`attention_form`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention

from questlib.errors import EngineError
from questlib.integer.attention_form import Operands
from questlib.integer.cpu.products import MIDDLE, multiply, prepack
from questlib.integer.cpu.quantizing import Sender, engine_name, uses_kernels
from questlib.integer.form import INT32, WeightPart, group_in_force
from questlib.integer.modules import IntegerAttention
from questlib.integer.softmax import no_finite_score, softmax_codes
from questlib.kernels import attention as compiled
from questlib.quantization.attention import QuantAttnProcessor

# Attention scores of one head that are held at a time: few enough to stay in the cache, enough for
# all threads.
CHUNK = 1 << 20
# Scores of one head below which a loop over heads costs more than it saves.
SMALL = 1 << 19


class Sent(NamedTuple):
    """The operands of one attention as bytes, and what its products are multiplied with."""

    q: torch.Tensor  # uint8 [B, N, C]
    zero: int  # of q
    k: torch.Tensor  # int8 [B, M, C]
    v: torch.Tensor  # int8 [B, M, C]
    compensation: int  # of v
    scale: float  # of the scores
    factor: torch.Tensor  # float32 [C], of the output
    heads: int

    @property
    def codes_add(self) -> torch.Tensor | None:
        """float32 [C]: what the output gets for each unit of the probabilities' sum."""
        return self.factor * self.compensation if self.compensation else None


class CpuAttnProcessor(IntegerAttention):
    """Attention whose products q k^T and probs v run in integers.

    Without the compiled kernel, small problems, where a loop over heads does not pay, multiply the
    same integers in float32, exact below 2^24.
    """

    def __init__(
        self,
        processor: QuantAttnProcessor,
        name: str,
        exact: bool = False,
        kernels: bool | None = None,
    ) -> None:
        super().__init__(processor, name)
        self.exact = exact
        self.compiled = uses_kernels(exact, kernels)
        self.engine = engine_name(exact, self.compiled)
        self.senders = [
            [
                Sender(grid, -1, name, self.compiled, signed)
                for grid, signed in zip(group, (False, True, True), strict=False)
            ]
            for group in self.grids
        ]

    @torch.compiler.disable  # its kernels are compiled already
    def attend(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        g = group_in_force(self.steps, self.name)
        grids = gq, gk, gv, gp = self.grids[g]
        queries, keys = query.shape[1], key.shape[1]
        dim = query.shape[2] // attn.heads
        largest = max(gq.max_abs * gk.max_abs * dim, gp.max_abs * gv.max_abs * keys)
        if largest > INT32:
            raise EngineError(f"{self.name}: sums over {keys} keys could overflow int32")
        send_q, send_k, send_v = self.senders[g]
        sent = Sent(
            q=send_q(query).bytes,
            zero=send_q.offset,
            k=send_k(key).bytes.view(torch.int8),
            v=send_v(value).bytes.view(torch.int8),
            compensation=send_v.compensation,
            scale=gq.base * gk.base * attn.scale,
            factor=2.0**self.v_shift * (gp.base * gv.base),
            heads=attn.heads,
        )
        if self.compiled:
            out = self._in_kernel(sent, grids, attention_mask)
        elif queries * keys <= SMALL and largest < 2**24:
            out = self._in_float(sent, grids, attention_mask)
        else:
            out = self._in_bytes(sent, grids, attention_mask)
        return out.to(query.dtype)

    def _in_kernel(self, x: Sent, grids: Operands, mask: torch.Tensor | None) -> torch.Tensor:
        gp = grids[3]
        codes_add = x.codes_add
        out = compiled.attention(
            q=x.q,
            zero=x.zero,
            k=x.k,
            v=x.v,
            scale=x.scale,
            mask=mask,
            inverse=float(gp.inverse),
            high=float(gp.high),
            factor=x.factor,
            codes_add=codes_add,
            heads=x.heads,
        )
        if out is None:
            raise no_finite_score(self.name)
        return out

    def _in_float(self, x: Sent, grids: Operands, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            _by_head(operand.float(), x.heads)  # [B, heads, N or M, dim]
            for operand in (x.q, x.k, x.v)
        )
        scores = (q.sub_(x.zero) @ k.transpose(-1, -2)).mul_(x.scale)  # [B, heads, N, M]
        if mask is not None:
            scores = scores + mask.unflatten(0, (-1, x.heads))
        codes = softmax_codes(scores, grids[3], self.name)
        out = (codes @ v).transpose(1, 2).flatten(2) * x.factor  # [B, N, C]
        if x.codes_add is None:
            return out
        sums = codes.sum(-1, keepdim=True)  # [B, heads, N, 1]
        added = sums * x.codes_add.unflatten(0, (x.heads, 1, -1))  # [B, heads, N, dim]
        return out.add_(added.transpose(1, 2).flatten(2))

    def _in_bytes(self, x: Sent, grids: Operands, mask: torch.Tensor | None) -> torch.Tensor:
        gp = grids[3]
        batch, n, width = x.q.shape
        m = x.k.shape[1]
        dim = width // x.heads
        out = torch.empty(batch, n, width)
        q = _by_head(x.q, x.heads).contiguous()  # [B, heads, N, dim]
        k = _by_head(x.k, x.heads).contiguous()  # [B, heads, M, dim]
        v = _by_head(x.v, x.heads).transpose(2, 3).contiguous()  # [B, heads, dim, M]
        rows = max(1, CHUNK // m)

        def packed(weight: torch.Tensor, factor: torch.Tensor):
            inputs = weight.shape[1]
            shift = torch.zeros(inputs, dtype=torch.int64)
            part = WeightPart(0, inputs, weight, None, factor, shift)
            return prepack(part, None, (rows, inputs), self.exact)

        for b, h in itertools.product(range(batch), range(x.heads)):
            own = slice(h * dim, (h + 1) * dim)
            keys = packed(k[b, h], torch.ones(m))
            values = packed(v[b, h], x.factor[own])
            for r in range(0, n, rows):
                few = q[b, h, r : r + rows]
                scores = multiply(few, x.zero, x.scale, keys, None, None, torch.float32)
                if mask is not None:
                    own_mask = mask[b * x.heads + h]  # [1 or N, M]
                    scores = scores + (own_mask[r : r + rows] if len(own_mask) > 1 else own_mask)
                codes = softmax_codes(scores, gp, self.name)
                probs = codes.sub_(MIDDLE).to(torch.int8).view(torch.uint8).bitwise_xor_(MIDDLE)
                y = multiply(probs, 0, 1.0, values, None, None, torch.float32)
                if x.codes_add is not None:
                    sums = probs.sum(-1, keepdim=True, dtype=torch.int32)
                    y = y + sums.float() * x.codes_add[own]
                out[b, r : r + rows, own] = y
        return out


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, heads * dim] -> [B, heads, N, dim]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
