"""Uniform affine quantization (paper, Sec. 3.1) and its gradient with a learned scale (LSQ)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch

from questlib.quantization import primitives

EPS = 1e-8
CACHED = 2**17  # float32 values


def affine(
    lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds [P] -> scale, zero_point [P]. Zero is always on the grid. Symmetric: z = 2^(b-1), codes -2^(b-1)..2^(b-1)-1."""
    levels = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-lo, hi).clamp_min(EPS) / (levels // 2)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
    scale = ((hi - lo) / levels).clamp_min(EPS)
    return scale, (-lo / scale).round().clamp(0, levels)


def fake_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    inverse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize. round(x * (1/s)): one formula everywhere, so that every engine can match it exactly.

    inverse: 1/s where it is not computed from `scale` (per-token grids).
    """
    inverse = 1.0 / scale if inverse is None else inverse
    out = torch.empty_like(x, dtype=torch.result_type(x, inverse))
    for part, y, s, z, inv in pieces(x, out, scale, zero_point, inverse):
        clamp_(torch.mul(part, inv, out=y).round_(), z, bits).mul_(s)
    return out


def pieces(x: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """x and what is like it, or broadcast over it, in parts along dimension 0 that stay in a core's cache through several
    operations: a quarter less time on large activations. On a GPU in one part."""
    if not x.is_cpu or x.numel() <= CACHED:
        return iter([(x, *others)])
    size = max(1, CACHED * len(x) // x.numel())
    parts = (
        v.split(size) if v.ndim == x.ndim and len(v) == len(x) else repeat(v) for v in (x, *others)
    )
    return zip(*parts, strict=False)  # some repeat for ever


def clamp_(q: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """q clamped in place to -z .. 2^b - 1 - z. By maximum and minimum: on CPUs `clamp_` with tensor bounds is far slower."""
    return torch.minimum(torch.maximum(q, -zero_point, out=q), 2**bits - 1 - zero_point, out=q)


HALF = 0.5 + 2**-24  # the float32 after 1/2: |d| < HALF just where |d| <= 1/2


def sum_to(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum a gradient over the dimensions along which `shape` was broadcast."""
    dims = [i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1]
    return grad.sum(dims, keepdim=True) if dims else grad


class LearnedQuant(torch.autograd.Function):
    """Fake quantization with straight-through rounding and a learned scale (LSQ): x, scale, zero_point broadcast together.

    d/dx = 1 inside the range, 0 outside; d/ds = (q - z) - x/s inside, (q - z) outside. The zero point is not trained.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits, inverse=None):
        inverse = 1.0 / scale if inverse is None else inverse
        d, q, out = (torch.empty_like(x, dtype=torch.result_type(x, inverse)) for _ in range(3))
        for part, u, r, y, s, z, inv in primitives.pieces(x, d, q, out, scale, zero_point, inverse):
            torch.mul(part, inv, out=u)
            primitives.clamp_(torch.round(u, out=r), z, bits)
            torch.sub(r, u, out=u)
            torch.mul(r, s, out=y)
        ctx.save_for_backward(d, q, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        d, q, scale = ctx.saved_tensors  # d = q - u, at most 1/2 just where u is inside the range
        grad_x, product = torch.empty_like(grad), torch.empty_like(grad)
        for g, e, r, inside, slope in primitives.pieces(grad, d, q, grad_x, product):
            # g where |d| <= 1/2, else 0; torch.where is five times as slow
            torch.ops.aten.hardtanh_backward(g, e, -HALF, HALF, grad_input=inside)
            if ctx.needs_input_grad[1]:  # g * d inside, g * q outside
                torch.sub(g, inside, out=slope).mul_(r).addcmul_(inside, e)
        grad_s = sum_to(product, scale.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_s, None, None, None
