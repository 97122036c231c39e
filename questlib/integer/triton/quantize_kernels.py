"""Triton kernels that give the products their operands: quantization.

Layouts (channels innermost everywhere)
    x     float   [B, H, W, C], any strides but 1 in C; a Linear is B = H = 1, W = rows
    a'    int8    [B, H + 2 pad, W + 2 pad, C'], C' = C rounded up to 64: the padding is written
                  once, so that the product's loads need no masks
    sums  int32   [B, H + 2 pad, W + 2 pad]: sums over the channels of the true a, 0 in the padding

With block shifts 2^e, the channels of a' are in the order of falling e, each e's own filled up to
64s (`packing.column_order`).
"""

import triton
import triton.language as tl

from questlib.integer.triton.code_kernels import ROUND, values, write_codes


@triton.jit
def quantize(
    X,
    TABLE,
    ORDER,
    OUT,
    SUMS,
    FLAG,
    NORM_SCALE,
    NORM_SHIFT,
    CLIP,
    SCALES,
    levels,
    rows,
    height,
    width,
    pad_y,
    pad_x,
    stride_b,
    stride_y,
    stride_x,
    channels,
    padded,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    TOKEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """x -> a' int8.

    TABLE     float32 [4, C or 1]: inverse scale; low, where high is low + levels; multiplier;
              constant, where a' = a + constant
    ORDERED   column c of a' is channel ORDER[c] of x, or 0 where that is -1. TABLE [4, C'] is in
              the order of a', and its last row holds the weights 2^e of the channels in the sums
    NORM      first x * NORM_SCALE[b, c] + NORM_SHIFT[b, c], as a GroupNorm does, in float32
    SILU      then a SiLU, in float32
    GATED     x has 2 C channels, the second half of which are gates: x * GELU(gate), as a GEGLU
              computes it, in float32
    TOKEN     each row has a grid of its own (`quantization.token_grid`), and TABLE's first row is
              1 / ratio. CLIP float32 [2]: 1 / clip and clip / levels. SCALES float32 [rows] is
              written
    MIDDLE    zero is in the middle of the codes
    FLAG      int32 [1], becomes 1 when an x is NaN or infinite

    Grid (rows / BR, C' / BC), or (rows / BR, 1) with HAS_SUMS or TOKEN.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    wide = width + 2 * pad_x
    high = height + 2 * pad_y
    px = r % wide - pad_x
    py = r // wide % high - pad_y
    b = r // (wide * high)
    inside = (r < rows) & (px >= 0) & (px < width) & (py >= 0) & (py < height)
    source = b * stride_b + py * stride_y + px * stride_x
    total = tl.zeros((BR,), tl.int32)
    bad = tl.zeros((BR,), tl.int32)
    first = tl.program_id(1) * BC
    last = padded if HAS_SUMS or TOKEN else first + BC
    inverse_own = tl.zeros((BR,), tl.float32)
    zero = tl.zeros((BR,), tl.float32)
    if TOKEN:
        least = tl.zeros((BR,), tl.float32)
        most = tl.zeros((BR,), tl.float32)
        for start in range(0, padded, BC):
            c = start + tl.arange(0, BC)
            channel = tl.load(ORDER + c, mask=c < padded, other=-1) if ORDERED else c
            mask = inside[:, None] & ((channel >= 0) & (channel < channels))[None, :]
            x, _ = values(
                X,
                NORM_SCALE,
                NORM_SHIFT,
                source,
                channel,
                b,
                mask,
                channels,
                0.0,
                0.0,
                False,
                NORM,
                SILU,
                GATED,
            )
            at = TABLE + (0 if UNIFORM else c[None, :]) + 0 * r[:, None]
            u = x * tl.load(at, mask=mask, other=0.0)
            least = tl.minimum(least, tl.min(u, 1))
            most = tl.maximum(most, tl.max(u, 1))
        span = tl.maximum(2.0 * tl.maximum(-least, most) if MIDDLE else most - least, 1e-8)
        unit = tl.div_rn(tl.full((BR,), 1.0, tl.float32) * levels, span)
        # The clamp keeps the sum below from being fused.
        zero = tl.minimum(tl.maximum(-least * unit, 0.0), levels)
        zero = tl.full((BR,), 128.0, tl.float32) if MIDDLE else (zero + ROUND) - ROUND
        inverse_own = unit * tl.load(CLIP)
        tl.store(SCALES + r, span * tl.load(CLIP + 1), mask=r < rows)
    for start in range(first, last, BC):
        c = start + tl.arange(0, BC)
        channel = tl.load(ORDER + c, mask=c < padded, other=-1) if ORDERED else c
        mask = inside[:, None] & ((channel >= 0) & (channel < channels))[None, :]
        x, wrong = values(
            X,
            NORM_SCALE,
            NORM_SHIFT,
            source,
            channel,
            b,
            mask,
            channels,
            0.0,
            0.0,
            False,
            NORM,
            SILU,
            GATED,
        )
        bad += wrong
        total += write_codes(
            x,
            TABLE,
            OUT,
            r,
            c,
            mask,
            rows,
            channels,
            padded,
            levels,
            inverse_own,
            zero,
            UNIFORM,
            ORDERED,
            HAS_SUMS,
            TOKEN,
        )
    tl.store(FLAG + 0 * r, 1, mask=bad > 0)
    if HAS_SUMS:
        tl.store(SUMS + r, total, mask=r < rows)


@triton.jit
def quantize_row(
    X,
    TABLE,
    ORDER,
    OUT,
    SUMS,
    NORM_SCALE,
    NORM_SHIFT,
    source,
    r,
    b,
    rows,
    channels,
    padded,
    levels,
    mean,
    spread,
    LAYER: tl.constexpr,
    NORM: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BC: tl.constexpr,
):
    """One of the results of `quantize_rows`; -> the number of values a row that are not finite."""
    total = 0 * r
    bad = 0 * r
    for start in range(0, padded, BC):
        c = start + tl.arange(0, BC)
        channel = tl.load(ORDER + c, mask=c < padded, other=-1) if ORDERED else c
        mask = (r < rows)[:, None] & ((channel >= 0) & (channel < channels))[None, :]
        x, wrong = values(
            X,
            NORM_SCALE,
            NORM_SHIFT,
            source,
            channel,
            b,
            mask,
            channels,
            mean,
            spread,
            LAYER,
            NORM,
            False,
            False,
        )
        bad += wrong
        total += write_codes(
            x,
            TABLE,
            OUT,
            r,
            c,
            mask,
            rows,
            channels,
            padded,
            levels,
            mean,
            mean,
            UNIFORM,
            ORDERED,
            HAS_SUMS,
            False,
        )
    if HAS_SUMS:
        tl.store(SUMS + r, total, mask=r < rows)
    return bad


@triton.jit
def quantize_rows(
    X,
    TABLE0,
    ORDER0,
    OUT0,
    SUMS0,
    TABLE1,
    ORDER1,
    OUT1,
    SUMS1,
    TABLE2,
    ORDER2,
    OUT2,
    SUMS2,
    FLAG,
    NORM_SCALE,
    NORM_SHIFT,
    levels,
    rows,
    pixels,
    stride_b,
    stride_x,
    channels,
    padded0,
    padded1,
    padded2,
    eps,
    RESULTS: tl.constexpr,
    LAYER: tl.constexpr,
    NORM: tl.constexpr,
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """x [B, pixels, C] -> up to three a', each on a grid of its own, as `quantize` writes them.

    LAYER     first a LayerNorm: NORM_SCALE and NORM_SHIFT [C] are its weight and bias. Otherwise
              NORM is as `quantize` has it

    Grid (rows / BR).
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    b = r // pixels
    source = b * stride_b + r % pixels * stride_x
    mean = tl.zeros((BR,), tl.float32)
    spread = tl.zeros((BR,), tl.float32)
    if LAYER:
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            mask = (r < rows)[:, None] & (c < channels)[None, :]
            x = tl.load(X + source[:, None] + c[None, :], mask=mask, other=0.0)
            mean += tl.sum(x.to(tl.float32), 1)
        mean = mean / channels
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            mask = (r < rows)[:, None] & (c < channels)[None, :]
            x = tl.load(X + source[:, None] + c[None, :], mask=mask, other=0.0)
            x = tl.where(mask, x.to(tl.float32) - mean[:, None], 0.0)
            spread += tl.sum(x * x, 1)
        spread = 1.0 / tl.sqrt(spread / channels + eps)
        b = 0 * b
    bad = quantize_row(
        X,
        TABLE0,
        ORDER0,
        OUT0,
        SUMS0,
        NORM_SCALE,
        NORM_SHIFT,
        source,
        r,
        b,
        rows,
        channels,
        padded0,
        levels,
        mean,
        spread,
        LAYER,
        NORM,
        UNIFORM,
        ORDERED,
        HAS_SUMS,
        BC,
    )
    if RESULTS > 1:
        quantize_row(
            X,
            TABLE1,
            ORDER1,
            OUT1,
            SUMS1,
            NORM_SCALE,
            NORM_SHIFT,
            source,
            r,
            b,
            rows,
            channels,
            padded1,
            levels,
            mean,
            spread,
            LAYER,
            NORM,
            UNIFORM,
            ORDERED,
            HAS_SUMS,
            BC,
        )
    if RESULTS > 2:
        quantize_row(
            X,
            TABLE2,
            ORDER2,
            OUT2,
            SUMS2,
            NORM_SCALE,
            NORM_SHIFT,
            source,
            r,
            b,
            rows,
            channels,
            padded2,
            levels,
            mean,
            spread,
            LAYER,
            NORM,
            UNIFORM,
            ORDERED,
            HAS_SUMS,
            BC,
        )
    tl.store(FLAG + 0 * r, 1, mask=bad > 0)
