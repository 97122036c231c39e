"""Triton kernels that give the products their operands: quantization, and a GroupNorm's moments.

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

# 1.5 * 2^23: adding it to |t| < 2^22 rounds t to an integer, half to even, and leaves that integer
# in the low bits.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def integer(x):
    """float32 integers -> int32, without a conversion instruction."""
    return (x + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def carry(x, inverse, low, levels, multiplier):
    """The integers (q - z) m of x, in float32: exact, and no slow conversion."""
    # The clamp stands between product and sum, so that they cannot be fused. Its bounds are
    # integers: clamping before rounding gives the same codes as clamping after it.
    u = tl.minimum(tl.maximum(x * inverse, low), low + levels)
    return ((u + ROUND) - ROUND) * multiplier


@triton.jit
def codes(x, inverse, low, levels, multiplier, constant):
    """a' int8 of x."""
    return integer(carry(x, inverse, low, levels, multiplier) + constant).to(tl.int8)


@triton.jit
def gelu(x):
    """x Phi(x), without branches, unlike tl.erf.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| of erf <= 1.5e-7.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = 1.061405429 * t - 1.453152027
    series = (series * t + 1.421413741) * t - 0.284496736
    series = (series * t + 0.254829592) * t
    tail = 0.5 * series * tl.exp(-z * z)  # Phi(-|x|)
    return x * tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def values(
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
    LAYER: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
):
    """What is quantized: x, normalized and activated, or multiplied by its gate, in float32.

    Also the number of values of each row that were NaN or infinite; they are 0 here.
    """
    x = tl.load(X + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    bad = tl.sum((~finite).to(tl.int32), 1)
    x = tl.where(finite, x, 0.0)
    if LAYER:
        x = (x - mean[:, None]) * spread[:, None]
    if NORM:
        at = b[:, None] * channels + channel[None, :]
        scale = tl.load(NORM_SCALE + at, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(NORM_SHIFT + at, mask=mask, other=0.0).to(tl.float32)
        x = x * scale + shift
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    if GATED:
        gate_at = X + source[:, None] + (channel + channels)[None, :]
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
        finite = tl.abs(gate) < float("inf")
        bad += tl.sum((~finite).to(tl.int32), 1)
        gate = tl.where(finite, gate, 0.0)
        x = x * gelu(gate)
    return x, bad


@triton.jit
def write_codes(
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
    UNIFORM: tl.constexpr,
    ORDERED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    TOKEN: tl.constexpr,
):
    """Store the codes of x [BR, BC], the rows r and columns c of a'; -> their sums, int32 [BR].

    The rest is as `quantize` has it. inverse_own and zero [BR] are a token's own.
    """
    columns = padded if ORDERED else channels
    total = 0 * r
    if UNIFORM:
        inverse = tl.load(TABLE)
        low = tl.load(TABLE + 1)
        multiplier = tl.load(TABLE + 2)
        constant = tl.load(TABLE + 3)
    else:
        # Read in x's own layout [BR, BC] (from the cache), so that threads exchange nothing.
        # Zeros where there is no x: its code is 0.
        at = TABLE + c[None, :] + 0 * r[:, None]
        inverse = tl.load(at, mask=mask, other=0.0)
        low = tl.load(at + columns, mask=mask, other=0.0)
        multiplier = tl.load(at + 2 * columns, mask=mask, other=0.0)
        constant = 0.0
    if TOKEN:
        inverse = inverse_own[:, None] * inverse
        low = -zero[:, None]
    carried = carry(x, inverse, low, levels, multiplier)
    if HAS_SUMS:
        if ORDERED:
            weighted = carried * tl.load(at + 3 * columns, mask=mask, other=0.0)
        else:
            weighted = carried
        total = tl.sum(integer(weighted), 1)
    a = integer(carried + constant).to(tl.int8)
    tl.store(
        OUT + r[:, None] * padded + c[None, :],
        a,
        mask=(r < rows)[:, None] & (c < padded)[None, :],
    )
    return total


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


@triton.jit
def moments(
    X, OUT, pixels, channels, share, stride_b, stride_pixel, BR: tl.constexpr, BC: tl.constexpr
):
    """x [B, pixels, C] -> OUT float32 [B, shares, 2, C]: sums and sums of squares of x.

    Each of the shares is of `share` pixels.     Grid (shares, C / BC, B).
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
