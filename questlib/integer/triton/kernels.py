"""Triton kernels of the integer engine, launched by triton_ops.py only. int8 x int8 -> int32: exact in any order.

Layouts (channels innermost everywhere)
    x     float   [B, H, W, C], any strides but 1 in C; a Linear is B = H = 1, W = rows
    a     int8    [B, H + 2 pad, W + 2 pad, C'], C' = C rounded up to 64: padding is written once, so the loads need no masks
    sums  int32   [B, H + 2 pad, W + 2 pad]: sum over the channels of the true a (0 in the padding)
    w     int8    [O, taps, C']                      kind "int8"
          uint8   [O, taps, C' / 2]                  kind "packed": byte j holds the codes of channels j (low nibble) and
                                                     j + C'/2 (high), so that both halves of a are read as they stand
    With block shifts 2^e, the channels of a and of packed w are put in order of falling e, each e's own filled up to 64s.
    out   float   [B, H', W', O], or int32 accumulators

A kernel's stored operands may differ from the true ones by constants, a = a' + c and w = w' + d_o, corrected exactly:
    acc_o = sum a' w'_o + c sum w'_o + d_o sum a = dot + correction_o + d_o R,   R = the sums under the kernel's window.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: adding it to |t| < 2^22 rounds t to an integer, half to even, and leaves that integer in the low bits
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def integer(x):
    """float32 integers -> int32, without a conversion instruction."""
    return (x + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


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
    NORM: tl.constexpr,
    SILU: tl.constexpr,
):
    """What is quantized: (x, normalized and activated, float32; how many of each row were NaN or infinite, and are 0 here)."""
    x = tl.load(X + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    bad = tl.sum((~finite).to(tl.int32), 1)
    x = tl.where(finite, x, 0.0)
    if NORM:
        at = b[:, None] * channels + channel[None, :]
        x = x * tl.load(NORM_SCALE + at, mask=mask, other=0.0) + tl.load(
            NORM_SHIFT + at, mask=mask, other=0.0
        )
    if SILU:
        x = x / (1.0 + tl.exp(-x))
    return x, bad


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
    TOKEN: tl.constexpr,
    MIDDLE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """x -> a' int8. TABLE float32 [4, C or 1]: inverse scale, low (high: low + levels), multiplier, constant (a' = a + constant).

    ORDERED: column c of a' is channel ORDER[c] of x, or 0 where that is -1; TABLE [4, C'] is in a's order, and its last row holds
    the weights 2^e of the channels in the sums.

    NORM: x * NORM_SCALE[b, c] + NORM_SHIFT[b, c] first (the application of a GroupNorm), then SILU, both in float32.
    TOKEN: each row has a grid of its own (ranges.token_grid), and TABLE's first row is 1 / ratio; CLIP float32 [2]: 1 / clip and
    clip / levels; SCALES float32 [rows] is written. MIDDLE: zero in the middle of the codes.
    FLAG int32 [1] becomes 1 when an x is NaN or infinite. Grid (rows / BR, C' / BC), or (rows / BR, 1) with HAS_SUMS or TOKEN.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    wide, high = width + 2 * pad_x, height + 2 * pad_y
    px, py, b = r % wide - pad_x, r // wide % high - pad_y, r // (wide * high)
    inside = (r < rows) & (px >= 0) & (px < width) & (py >= 0) & (py < height)
    source = b * stride_b + py * stride_y + px * stride_x
    total = tl.zeros((BR,), tl.int32)
    bad = tl.zeros((BR,), tl.int32)
    first = tl.program_id(1) * BC
    last = padded if HAS_SUMS or TOKEN else first + BC
    if TOKEN:
        least, most = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
        for start in range(0, padded, BC):
            c = start + tl.arange(0, BC)
            channel = tl.load(ORDER + c, mask=c < padded, other=-1) if ORDERED else c
            mask = inside[:, None] & ((channel >= 0) & (channel < channels))[None, :]
            x, _ = values(X, NORM_SCALE, NORM_SHIFT, source, channel, b, mask, channels, NORM, SILU)
            at = TABLE + (0 if UNIFORM else c[None, :]) + 0 * r[:, None]
            u = x * tl.load(at, mask=mask, other=0.0)
            least, most = tl.minimum(least, tl.min(u, 1)), tl.maximum(most, tl.max(u, 1))
        span = tl.maximum(2.0 * tl.maximum(-least, most) if MIDDLE else most - least, 1e-8)
        unit = tl.div_rn(tl.full((BR,), 1.0, tl.float32) * levels, span)
        zero = tl.minimum(
            tl.maximum(-least * unit, 0.0), levels
        )  # the clamp keeps the sum below from being fused
        zero = tl.full((BR,), 128.0, tl.float32) if MIDDLE else (zero + ROUND) - ROUND
        inverse_own = unit * tl.load(CLIP)
        tl.store(SCALES + r, span * tl.load(CLIP + 1), mask=r < rows)
    for start in range(first, last, BC):
        c = start + tl.arange(0, BC)
        channel = tl.load(ORDER + c, mask=c < padded, other=-1) if ORDERED else c
        columns = padded if ORDERED else channels
        mask = inside[:, None] & ((channel >= 0) & (channel < channels))[None, :]
        x, wrong = values(X, NORM_SCALE, NORM_SHIFT, source, channel, b, mask, channels, NORM, SILU)
        bad += wrong
        if UNIFORM:
            inverse, low, multiplier, constant = (
                tl.load(TABLE),
                tl.load(TABLE + 1),
                tl.load(TABLE + 2),
                tl.load(TABLE + 3),
            )
        else:  # read in x's own layout [BR, BC] (from the cache), so that nothing is exchanged between threads
            at = TABLE + c[None, :] + 0 * r[:, None]
            inverse = tl.load(at, mask=mask, other=0.0)  # zeros where there is no x: its code is 0
            low = tl.load(at + columns, mask=mask, other=0.0)
            multiplier = tl.load(at + 2 * columns, mask=mask, other=0.0)
            constant = 0.0
        if TOKEN:
            inverse, low = inverse_own[:, None] * inverse, -zero[:, None]
        # the clamp stands between product and sum, so they cannot be fused; its bounds are integers: no change of order
        u = tl.minimum(tl.maximum(x * inverse, low), low + levels)
        carried = (
            (u + ROUND) - ROUND
        ) * multiplier  # integers in float32 from here on: exact, and no slow conversion
        if HAS_SUMS:
            weighted = (
                carried * tl.load(at + 3 * columns, mask=mask, other=0.0) if ORDERED else carried
            )
            total += tl.sum(integer(weighted), 1)
        a = integer(carried + constant).to(tl.int8)
        tl.store(
            OUT + r[:, None] * padded + c[None, :],
            a,
            mask=(r < rows)[:, None] & (c < padded)[None, :],
        )
    tl.store(FLAG + 0 * r, 1, mask=bad > 0)
    if HAS_SUMS:
        tl.store(SUMS + r, total, mask=r < rows)


@triton.jit
def moments(
    X, OUT, pixels, channels, share, stride_b, stride_pixel, BR: tl.constexpr, BC: tl.constexpr
):
    """x [B, pixels, C] -> OUT float32 [B, shares, 2, C]: sums and sums of squares of `share` pixels. Grid (shares, C / BC, B)."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * share
    total, square = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
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
    """Sums -> the scale and shift [B, C] that a GroupNorm applies. Grid (groups, B); count: values in a group."""
    own = channels // tl.num_programs(0)
    s, j = tl.arange(0, BS), tl.arange(0, BC)
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


@triton.jit
def low_codes(p, e, SHIFTED: tl.constexpr, ASM: tl.constexpr):
    """Low nibbles of packed bytes times 2^e, as int8 0..120; e int8. ASM: four bytes an instruction (none in the interpreter)."""
    if ASM and SHIFTED:  # e arrives in all four bytes of a register
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, e; and.b32 e, $2, 7; and.b32 t, $1, 0x0F0F0F0F; shl.b32 $0, t, e; }",
            "=r,r,r",
            [p, e],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [p], dtype=tl.int8, is_pure=True, pack=4
        )
    codes = (p & 15).to(tl.int8)
    return (codes << e).to(tl.int8) if SHIFTED else codes


@triton.jit
def high_codes(p, e, SHIFTED: tl.constexpr, ASM: tl.constexpr):
    if ASM and SHIFTED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, e; and.b32 e, $2, 7; shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; shl.b32 $0, t, e; }",
            "=r,r,r",
            [p, e],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r",
            [p],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    codes = (p >> 4).to(tl.int8)
    return (codes << e).to(tl.int8) if SHIFTED else codes


@triton.jit
def shift_at(k, end1, end2, end3):
    """e of the column k: they are sorted, those with e >= j come before end_j."""
    return ((k < end1).to(tl.int32) + (k < end2).to(tl.int32) + (k < end3).to(tl.int32)).to(tl.int8)


@triton.jit
def gemm(
    A,
    W,
    OUT,
    SCALE,
    ROW_SCALE,
    BIAS,
    RESIDUAL,
    CORRECTION,
    OFFSET,
    SUMS,
    M,
    N,
    span,
    padded,
    taps_y,
    taps_x,
    high,
    wide,
    out_high,
    out_wide,
    stride_y,
    stride_x,
    end1,
    end2,
    end3,
    POINT: tl.constexpr,
    PACKED: tl.constexpr,
    SHIFTED: tl.constexpr,
    ASM: tl.constexpr,
    RAW: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ATOMIC: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out^T [N, M] = w x a^T as an implicit GEMM over the taps of the window: N output channels, M output pixels. The weight is
    the left operand, so that unpacked codes go to the tensor core from registers. POINT: 1 x 1 with stride 1, pixel to pixel.

    span: bytes of w a tap, C' or C'/2, a multiple of BK. SHIFTED: packed codes of the columns before end_j count 2^j fold.
    HAS_ROW: ROW_SCALE float32 [M] multiplies each pixel's outputs (1 x 1, stride 1).
    RAW: out is int32, the true accumulators. ATOMIC: the programs of grid axis 1 share the reduction and add to out, int32 and
    zeroed before; integer sums do not depend on the order.
    """
    m_tiles, n_tiles = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    band = GROUP * n_tiles  # programs that run together share their rows of a and w in the L2 cache
    first = pid // band * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    rm = (first + pid % band % size) * BM + tl.arange(0, BM)
    rn = pid % band // size * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    own_m = tl.where(rm < M, rm, 0)  # beyond the end: load row 0, store nothing
    own_n = tl.where(rn < N, rn, 0)
    if POINT:
        pixel = own_m
    else:
        area = out_high * out_wide
        pixel = (
            own_m // area * high + own_m % area // out_wide * stride_y
        ) * wide + own_m % out_wide * stride_x

    blocks = span // BK  # of one tap
    steps = blocks if POINT else blocks * taps_y * taps_x
    share = tl.cdiv(steps, tl.num_programs(1))
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, steps)
    tap = begin // blocks
    k = begin % blocks * BK
    tx = tap % taps_x
    at = (tap // taps_x * wide + tx) * padded + k
    a_ptr = A + pixel[None, :] * padded + rk[:, None]  # [BK, BM]
    w_ptr = W + own_n[:, None] * (steps * BK) + begin * BK + rk[None, :]  # [BN, BK]
    acc = tl.zeros((BN, BM), tl.int32)
    for _ in range(begin, end):
        w = tl.load(w_ptr)
        a = tl.load(a_ptr + at)
        if PACKED:
            a2 = tl.load(a_ptr + (at + span))
            acc = tl.dot(
                low_codes(w, shift_at(k, end1, end2, end3), SHIFTED, ASM),
                a,
                acc,
                out_dtype=tl.int32,
            )
            acc = tl.dot(
                high_codes(w, shift_at(k + span, end1, end2, end3), SHIFTED, ASM),
                a2,
                acc,
                out_dtype=tl.int32,
            )
        else:
            acc = tl.dot(w, a, acc, out_dtype=tl.int32)
        w_ptr += BK
        at += BK
        k += BK
        if not POINT:  # at the end of a tap's channels go to the next pixel, at the end of a row of taps to the next row
            done = k == span
            k = tl.where(done, 0, k)
            tx = tl.where(done, tx + 1, tx)
            turn = tx == taps_x
            tx = tl.where(turn, 0, tx)
            at += tl.where(done, padded - span, 0) + tl.where(turn, (wide - taps_x) * padded, 0)

    in_m, in_n = rm < M, rn < N
    if tl.program_id(1) == 0:  # the corrections once
        if HAS_CORRECTION:
            acc += tl.load(CORRECTION + rn, mask=in_n, other=0)[:, None]
        if HAS_OFFSET:
            r = tl.zeros((BM,), tl.int32)
            for ty in range(taps_y):
                for x in range(taps_x):
                    r += tl.load(SUMS + pixel + ty * wide + x)
            acc += tl.load(OFFSET + rn, mask=in_n, other=0)[:, None] * r[None, :]
    place = rm[None, :] * N + rn[:, None]
    mask = in_m[None, :] & in_n[:, None]
    if ATOMIC:
        tl.atomic_add(OUT + place, acc, mask=mask, sem="relaxed")
    elif RAW:
        tl.store(OUT + place, acc, mask=mask)
    else:
        out = acc.to(tl.float32) * tl.load(SCALE + rn, mask=in_n, other=0.0)[:, None]
        if HAS_ROW:
            out *= tl.load(ROW_SCALE + rm, mask=in_m, other=0.0)[None, :]
        if HAS_BIAS:
            out += tl.load(BIAS + rn, mask=in_n, other=0.0)[:, None]
        if HAS_RESIDUAL:
            out += tl.load(RESIDUAL + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    ACC,
    OUT,
    SCALE,
    ROW_SCALE,
    BIAS,
    RESIDUAL,
    M,
    N,
    HAS_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The epilogue of `gemm` for int32 accumulators in memory (after a split reduction)."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    in_n = rn < N
    place = rm[:, None] * N + rn[None, :]
    mask = (rm < M)[:, None] & in_n[None, :]
    out = (
        tl.load(ACC + place, mask=mask, other=0).to(tl.float32)
        * tl.load(SCALE + rn, mask=in_n, other=0.0)[None, :]
    )
    if HAS_ROW:
        out *= tl.load(ROW_SCALE + rm, mask=rm < M, other=0.0)[:, None]
    if HAS_BIAS:
        out += tl.load(BIAS + rn, mask=in_n, other=0.0)[None, :]
    if HAS_RESIDUAL:
        out += tl.load(RESIDUAL + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=mask)
