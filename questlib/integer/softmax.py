"""The softmax of integer attention, as codes: the same bits on every machine and in every engine.

    p_m = e_m / sum_j e_j,  e_m = 2^((s_m - max s) log2 e),  codes round(p_m / scale)

torch's own softmax takes its exponential from a library that differs between machines, and its sum
in an order that differs between versions. Here both are written out in single float32 operations:
2^y = 2^n 2^r with n = round(y), 2^r by a polynomial (relative error below 2e-7), and the sum by
halves. `questlib/kernels/attention.cpp` has the same operations in the same order.
"""

from __future__ import annotations

import math

import torch

from questlib.errors import EngineError
from questlib.integer.form import Grid
from questlib.quantization.primitives import pieces

# 2^r for |r| <= 1/2: coefficients of r^5 to r^0, fitted to the least relative error with 1 at r = 0
POLYNOMIAL = (
    1.326472731e-03,
    9.671512991e-03,
    5.550733581e-02,
    2.402224243e-01,
    6.931470037e-01,
    1.0,
)


def softmax_codes(scores: torch.Tensor, grid: Grid, name: str) -> torch.Tensor:
    """The codes of the scores' softmax, in their place.

    Args:
        scores: float32 [..., M], contiguous; overwritten.
        grid: of the softmax's output, with zero point 0.
        name: of the attention, for the message.

    Returns:
        Whole numbers in float32 [..., M].

    Raises:
        EngineError: a query's scores are NaN, or its largest is infinite.
    """
    high = float(grid.high)
    for (part,) in pieces(scores.flatten(0, -2)):
        e = exponential_(part.sub_(part.amax(-1, keepdim=True)))
        sums = sum_by_halves(e)
        # NaN where a score is, or where the largest is infinite
        if not torch.isfinite(sums).all():
            raise no_finite_score(name)
        e.mul_(grid.inverse / sums).round_().clamp_max_(high)
    return scores


def exponential_(x: torch.Tensor) -> torch.Tensor:
    """e^x for float32 x <= 0, in place; 2^-126 where it is smaller."""
    x.mul_(math.log2(math.e)).clamp_min_(-126.0)
    n = x.round()
    x.sub_(n)
    power = x * POLYNOMIAL[0]
    for c in POLYNOMIAL[1:-1]:
        power.add_(c).mul_(x)
    power.add_(POLYNOMIAL[-1])
    bits = n.add_(127.0).mul_(2.0**23).to(torch.int32)  # of 2^n; whole numbers below 2^31 are exact
    return torch.mul(power, bits.view(torch.float32), out=x)


def sum_by_halves(e: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, kept: what lies beyond the largest power of two is added to
    the head, again and again."""
    m = e.shape[-1]
    if m == 1:
        return e.clone()
    width = 2 ** (m - 1).bit_length() // 2
    half = e[..., :width].clone()
    half[..., : m - width] += e[..., width:]
    while width > 1:
        width //= 2
        half[..., :width] += half[..., width : 2 * width]
    return half[..., :1]


def no_finite_score(name: str) -> EngineError:
    return EngineError(f"{name}: a query has scores that are NaN, or none that is finite")
