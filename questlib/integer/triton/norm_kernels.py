"""Triton kernels of a GroupNorm: its moments, and the scale and shift that it comes to."""

import triton
import triton.language as tl


@triton.jit
def moments(
    X, OUT, pixels, channels, share, stride_b, stride_pixel, BR: tl.constexpr, BC: tl.constexpr
):
    """x [B, pixels, C] -> OUT float32 [B, shares, 2, C]: sums and sums of squares of x.

    Each of the shares is of `share` pixels. Grid (shares, C / BC, B).
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * share
    total = tl.zeros((BC,), tl.float32)
    square = tl.zeros((BC,), tl.float32)
    for start in range(first, tl.minimum(first + share, pixels), BR):
        r = start + tl.arange(0, BR)
        mask = ((r < pixels) & (r < first + share))[:, None] & (c < channels)[None, :]
        at = X + tl.program_id(2) * stride_b + r[:, None] * stride_pixel + c[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        square += tl.sum(x * x, 0)
    out = OUT + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(out, total, mask=c < channels)
    tl.store(out + channels, square, mask=c < channels)


@triton.jit
def group_affine(
    MOMENTS,
    WEIGHT,
    BIAS,
    SCALE,
    SHIFT,
    channels,
    shares,
    count,
    eps,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums -> the scale and shift [B, C] that a GroupNorm applies.

    Grid (groups, B); count: the number of values in a group.
    """
    own = channels // tl.num_programs(0)
    s = tl.arange(0, BS)
    j = tl.arange(0, BC)
    c = tl.program_id(0) * own + j
    mask = (s < shares)[:, None] & (j < own)[None, :]
    at = MOMENTS + (tl.program_id(1) * shares + s)[:, None] * 2 * channels + c[None, :]
    mean = tl.sum(tl.load(at, mask=mask, other=0.0)) / count
    square = tl.sum(tl.load(at + channels, mask=mask, other=0.0)) / count
    inverse = 1.0 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
    scale = tl.load(WEIGHT + c, mask=j < own, other=0.0).to(tl.float32) * inverse
    shift = tl.load(BIAS + c, mask=j < own, other=0.0).to(tl.float32) - mean * scale
    tl.store(SCALE + tl.program_id(1) * channels + c, scale, mask=j < own)
    tl.store(SHIFT + tl.program_id(1) * channels + c, shift, mask=j < own)
