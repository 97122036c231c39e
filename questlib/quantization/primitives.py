"""Uniform affine quantization (paper, Sec. 3.1), and its gradient with a learned scale (LSQ).

    q = clamp(round(x / s) + z, 0, 2^b - 1)        codes
    x_hat = (q - z) * s                            what the quantized model computes with

s is the scale, z the integer zero point, b the number of bits. All functions here use the form
without codes, which gives the same numbers: x_hat = clamp(round(x / s), -z, 2^b - 1 - z) * s.

On the CPU compiled kernels do the same in one pass (`questlib.kernels`), where there is a compiler:
the same values, of which only zeros may differ in their sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch

from questlib.kernels import fake_quant as compiled

EPS = 1e-8  # the least scale
CACHED = 2**17  # float32 values that stay in the cache of a CPU's core
HALF = 0.5 + 2**-24  # the float32 after 1/2: |d| < HALF exactly where |d| <= 1/2


# ---- Sec. 3.1: uniform affine quantization ----


def affine(
    lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the grid that covers a range; zero is always on the grid.

        s = (hi - lo) / (2^b - 1),  z = round(-lo / s)                  with lo <= 0 <= hi
        s = max(-lo, hi) / (2^(b-1) - 1),  z = 2^(b-1)                  symmetric

    Args:
        lo: lower ends of the ranges [P].
        hi: upper ends of the ranges [P].
        bits: b.
        symmetric: whether the grid's middle is zero.

    Returns:
        Scale and zero point, [P] each.
    """
    levels = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-lo, hi).clamp_min(EPS) / (levels // 2)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    lo = lo.clamp_max(0.0)
    hi = hi.clamp_min(0.0)
    scale = ((hi - lo) / levels).clamp_min(EPS)
    return scale, (-lo / scale).round().clamp(0, levels)


def fake_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bits: int,
    inverse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize and dequantize: x_hat = clamp(round(x * (1 / s)), -z, 2^b - 1 - z) * s.

    The product with 1 / s stands in place of the quotient everywhere, so that every engine can
    match the codes exactly.

    Args:
        x: values of any shape.
        scale: s, broadcasts over x.
        zero_point: z, broadcasts over x.
        bits: b.
        inverse: 1 / s, where it is not computed from `scale` (grids of single tokens).
    """
    inverse = 1.0 / scale if inverse is None else inverse
    if torch.compiler.is_compiling():
        # The same operations, which torch.compile makes one loop of.
        codes = (x * inverse).round().maximum(-zero_point).minimum(2**bits - 1 - zero_point)
        return codes * scale
    own = compiled.parameters_over(x, scale, zero_point, inverse, bits)
    if own is not None:
        return compiled.fake_quant(x, own)
    out = torch.empty_like(x, dtype=torch.result_type(x, inverse))
    for part, y, s, z, inv in pieces(x, out, scale, zero_point, inverse):
        torch.mul(part, inv, out=y).round_()
        clamp_(y, z, bits).mul_(s)
    return out


# ---- LSQ: a learned scale ----


class LearnedQuant(torch.autograd.Function):
    """Fake quantization with a learned scale, LSQ (Esser et al. 2020, Eq. 1 to 3).

    Forward as `fake_quant`. Backward, with u = x / s and straight-through rounding:

        d x_hat / d x = 1                inside the range, 0 outside
        d x_hat / d s = round(u) - u     inside the range
                        -z               below it
                        2^b - 1 - z      above it

    The zero point is not trained. LSQ's scaling of the gradient by the number of values is left
    out: the learning rate of a scale is the optimizer's matter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        bits: int,
        inverse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        inverse = 1.0 / scale if inverse is None else inverse
        ctx.own = own = compiled.parameters_over(x, scale, zero_point, inverse, bits)
        if own is not None:
            ctx.save_for_backward(x, scale)
            return compiled.fake_quant(x, own)
        d, q, out = (torch.empty_like(x, dtype=torch.result_type(x, inverse)) for _ in range(3))
        for part, u, r, y, s, z, inv in pieces(x, d, q, out, scale, zero_point, inverse):
            torch.mul(part, inv, out=u)
            clamp_(torch.round(u, out=r), z, bits)
            torch.sub(r, u, out=u)
            torch.mul(r, s, out=y)
        # d = r - u is at most 1/2 exactly where u is inside the range
        ctx.save_for_backward(d, q, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.own is not None:
            x, scale = ctx.saved_tensors
            learned = ctx.needs_input_grad[1]
            grad_x, slope = compiled.fake_quant_gradient(x, grad, ctx.own, learned)
            grad_s = None if slope is None else _sum_to(slope, scale.shape)
            return grad_x, grad_s, None, None, None
        d, q, scale = ctx.saved_tensors
        grad_x = torch.empty_like(grad)
        product = torch.empty_like(grad)
        for g, e, r, inside, slope in pieces(grad, d, q, grad_x, product):
            # g where |d| <= 1/2, else 0; torch.where is five times as slow
            torch.ops.aten.hardtanh_backward(g, e, -HALF, HALF, grad_input=inside)
            if ctx.needs_input_grad[1]:
                # g * d inside, g * q outside
                torch.sub(g, inside, out=slope).mul_(r).addcmul_(inside, e)
        grad_s = _sum_to(product, scale.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_s, None, None, None


# ---- in place, and in parts that fit a cache ----


def pieces(x: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts of x and of tensors that are like it, or broadcast over it, along dimension 0.

    Each part stays in a core's cache through several operations, which takes a quarter less time
    on large activations. On a GPU there is one part.
    """
    if not x.is_cpu or x.numel() <= CACHED:
        return iter([(x, *others)])
    size = max(1, CACHED * len(x) // x.numel())
    parts = (
        v.split(size) if v.ndim == x.ndim and len(v) == len(x) else repeat(v) for v in (x, *others)
    )
    return zip(*parts, strict=False)  # what broadcasts repeats for ever


def clamp_(q: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """Clamp q in place to -z .. 2^b - 1 - z.

    On CPUs torch's `clamp_` with tensor bounds is far slower than maximum and minimum.
    """
    return torch.minimum(torch.maximum(q, -zero_point, out=q), 2**bits - 1 - zero_point, out=q)


def _sum_to(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum a gradient over the dimensions along which `shape` was broadcast."""
    dims = [i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1]
    return grad.sum(dims, keepdim=True) if dims else grad
