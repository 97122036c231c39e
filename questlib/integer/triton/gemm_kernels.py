"""Triton kernels of the integer product. int8 x int8 -> int32 is exact in any order.

Layouts (channels innermost everywhere)
    a'    int8    [B, H + 2 pad, W + 2 pad, C'] and `sums`, as `quantize_kernels` write them
    w'    int8    [O, taps, C']        kind "int8"
          uint8   [O, taps, C' / 2]    kind "packed": byte j holds the codes of channels j (low
                                       nibble) and j + C'/2 (high), so that both halves of a' are
                                       read as they stand
    out   float   [B, H', W', O], or int32 accumulators, or int8 codes for the next product:
                  [B, N, O'], or transposed [B, O, N'], with padding that nobody writes

With block shifts 2^e, the channels of packed w' are in the same order as those of a'.

A kernel's stored operands may differ from the true ones by constants, a = a' + c and w = w' + d_o,
which are corrected exactly:

    acc_o = sum a' w'_o + c sum w'_o + d_o sum a = dot + correction_o + d_o R

R are the sums of a under the kernel's window, and d_o is the zero-point compensation.
"""

import triton
import triton.language as tl

from questlib.integer.triton.code_kernels import codes


@triton.jit
def low_codes(p, e, SHIFTED: tl.constexpr, ASM: tl.constexpr):
    """Low nibbles of packed bytes times 2^e, as int8 0..120; e int8.

    ASM: four bytes an instruction, which the interpreter lacks; e arrives in all four bytes of a
    register.
    """
    if ASM and SHIFTED:
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
    """High nibbles of packed bytes times 2^e; as `low_codes`."""
    if ASM and SHIFTED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, e; and.b32 e, $2, 7; shr.u32 t, $1, 4; "
            "and.b32 t, t, 0x0F0F0F0F; shl.b32 $0, t, e; }",
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
    """e of column k: columns are sorted, and those with e >= j come before end_j."""
    return ((k < end1).to(tl.int32) + (k < end2).to(tl.int32) + (k < end3).to(tl.int32)).to(tl.int8)


@triton.jit
def finish(
    acc,
    OUT,
    SCALE,
    ROW_SCALE,
    BIAS,
    SHIFT,
    RESIDUAL,
    CORRECTION,
    COMPENSATION,
    SUMS,
    TABLE,
    rm,
    rn,
    pixel,
    M,
    N,
    wide,
    taps_y,
    taps_x,
    area,
    shift_stride,
    levels,
    code_stride,
    RAW: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_COMPENSATION: tl.constexpr,
    BM: tl.constexpr,
):
    """Sums [BN, BM] -> out, for the output channels rn and the output pixels rm.

    pixel [BM] is where their windows begin.
    """
    in_m = rm < M
    in_n = rn < N
    if HAS_CORRECTION:
        acc += tl.load(CORRECTION + rn, mask=in_n, other=0)[:, None]
    if HAS_COMPENSATION:
        r = tl.zeros((BM,), tl.int32)
        for ty in range(taps_y):
            for x in range(taps_x):
                r += tl.load(SUMS + pixel + ty * wide + x)
        acc += tl.load(COMPENSATION + rn, mask=in_n, other=0)[:, None] * r[None, :]
    place = rm[None, :] * N + rn[:, None]
    mask = in_m[None, :] & in_n[:, None]
    if RAW:
        tl.store(OUT + place, acc, mask=mask)
    else:
        out = acc.to(tl.float32) * tl.load(SCALE + rn, mask=in_n, other=0.0)[:, None]
        if HAS_ROW:
            out *= tl.load(ROW_SCALE + rm, mask=in_m, other=0.0)[None, :]
        if HAS_BIAS:
            out += tl.load(BIAS + rn, mask=in_n, other=0.0)[:, None]
        if HAS_SHIFT:
            at = tl.where(in_m, rm, 0) // area * shift_stride
            shift = tl.load(SHIFT + at[None, :] + rn[:, None], mask=mask, other=0.0)
            out += shift.to(tl.float32)
        if HAS_RESIDUAL:
            out += tl.load(RESIDUAL + place, mask=mask, other=0.0).to(tl.float32)
        if CODES == "no":
            tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=mask)
        else:
            inverse = tl.load(TABLE + rn, mask=in_n, other=0.0)[:, None]
            low = tl.load(TABLE + N + rn, mask=in_n, other=0.0)[:, None]
            multiplier = tl.load(TABLE + 2 * N + rn, mask=in_n, other=0.0)[:, None]
            constant = tl.load(TABLE + 3 * N + rn, mask=in_n, other=0.0)[:, None]
            code = codes(out, inverse, low, levels, multiplier, constant)
            if CODES == "rows":
                place = rm[None, :] * code_stride + rn[:, None]
            else:
                of_picture = (rm // area * N)[None, :] + rn[:, None]
                place = of_picture * code_stride + (rm % area)[None, :]
            tl.store(OUT + place, code, mask=mask)


@triton.jit
def gemm(
    A,
    W,
    OUT,
    SCALE,
    ROW_SCALE,
    BIAS,
    SHIFT,
    RESIDUAL,
    CORRECTION,
    COMPENSATION,
    SUMS,
    TABLE,
    PARTIAL,
    ARRIVED,
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
    shift_stride,
    levels,
    code_stride,
    POINT: tl.constexpr,
    PACKED: tl.constexpr,
    SHIFTED: tl.constexpr,
    ASM: tl.constexpr,
    RAW: tl.constexpr,
    CODES: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_COMPENSATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out^T [N, M] = w x a^T as an implicit GEMM over the taps of the window.

    N are the output channels, M the output pixels. The weight is the left operand, so that unpacked
    codes go to the tensor core from registers.

    span      bytes of w a tap, C' or C'/2, a multiple of BK
    POINT     1 x 1 with stride 1, pixel to pixel
    SHIFTED   packed codes of the columns before end_j count 2^j fold
    HAS_ROW   ROW_SCALE float32 [M] multiplies each pixel's outputs (POINT only)
    HAS_SHIFT SHIFT [B, N] with strides (shift_stride, 1) is added to each picture's outputs
    RAW       out is int32, the true accumulators
    CODES     "rows" or "columns": out are the outputs' codes, int8 [B, N, code_stride] or [B, O,
              code_stride]. TABLE float32 [4, N] and levels are as `quantize_kernels.quantize` has
              them; otherwise "no"
    SPLIT     the programs of grid axis 1 share the reduction. PARTIAL int32 holds the shares, and
              ARRIVED int32 [tiles], zero before and after, how many of a tile's are there
    """
    m_tiles = tl.cdiv(M, BM)
    n_tiles = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    # Programs that run together share their rows of a and w in the L2 cache.
    band = GROUP * n_tiles
    first = pid // band * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    rm = (first + pid % band % size) * BM + tl.arange(0, BM)
    rn = pid % band // size * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    # Beyond the end: load row 0, store nothing.
    own_m = tl.where(rm < M, rm, 0)
    own_n = tl.where(rn < N, rn, 0)
    if POINT:
        pixel = own_m
    else:
        at = own_m % (out_high * out_wide)
        pixel = (
            own_m // (out_high * out_wide) * high + at // out_wide * stride_y
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
            low = low_codes(w, shift_at(k, end1, end2, end3), SHIFTED, ASM)
            acc = tl.dot(low, a, acc, out_dtype=tl.int32)
            codes = high_codes(w, shift_at(k + span, end1, end2, end3), SHIFTED, ASM)
            acc = tl.dot(codes, a2, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w, a, acc, out_dtype=tl.int32)
        w_ptr += BK
        at += BK
        k += BK
        # At the end of a tap's channels go to the next pixel, at the end of a row of taps to the
        # next row.
        if not POINT:
            done = k == span
            k = tl.where(done, 0, k)
            tx = tl.where(done, tx + 1, tx)
            turn = tx == taps_x
            tx = tl.where(turn, 0, tx)
            at += tl.where(done, padded - span, 0) + tl.where(turn, (wide - taps_x) * padded, 0)

    area = out_high * out_wide
    if SPLIT:
        # Every program leaves its share in memory, and the last to arrive adds them up.
        parts = tl.num_programs(1)
        each: tl.constexpr = BN * BM
        within = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        shares = PARTIAL + pid * parts * each
        tl.store(shares + tl.program_id(1) * each + within, acc)
        # All threads have stored when one of them counts; what it reads first is the others'.
        tl.debug_barrier()
        arrived = tl.atomic_add(ARRIVED + pid, 1, sem="acq_rel")
        if arrived == parts - 1:
            acc = tl.zeros((BN, BM), tl.int32)
            for i in range(parts):
                acc += tl.load(shares + i * each + within)
            tl.store(ARRIVED + pid, 0)
            finish(
                acc,
                OUT,
                SCALE,
                ROW_SCALE,
                BIAS,
                SHIFT,
                RESIDUAL,
                CORRECTION,
                COMPENSATION,
                SUMS,
                TABLE,
                rm,
                rn,
                pixel,
                M,
                N,
                wide,
                taps_y,
                taps_x,
                area,
                shift_stride,
                levels,
                code_stride,
                RAW,
                CODES,
                HAS_ROW,
                HAS_BIAS,
                HAS_SHIFT,
                HAS_RESIDUAL,
                HAS_CORRECTION,
                HAS_COMPENSATION,
                BM,
            )
    else:
        finish(
            acc,
            OUT,
            SCALE,
            ROW_SCALE,
            BIAS,
            SHIFT,
            RESIDUAL,
            CORRECTION,
            COMPENSATION,
            SUMS,
            TABLE,
            rm,
            rn,
            pixel,
            M,
            N,
            wide,
            taps_y,
            taps_x,
            area,
            shift_stride,
            levels,
            code_stride,
            RAW,
            CODES,
            HAS_ROW,
            HAS_BIAS,
            HAS_SHIFT,
            HAS_RESIDUAL,
            HAS_CORRECTION,
            HAS_COMPENSATION,
            BM,
        )
