"""Triton kernel of integer attention: both products in int8, the softmax between in float32."""

import triton
import triton.language as tl

from questlib.integer.triton.code_kernels import ROUND, integer


@triton.jit
def power2(x, ASM: tl.constexpr):
    """2^x by the hardware's instruction alone, without its care for subnormal results."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def scores(
    q,
    K,
    KEY_SUM,
    key,
    keys,
    stride,
    channel,
    dim: tl.constexpr,
    q_constant,
    factor,
    HAS_Q: tl.constexpr,
    EVEN: tl.constexpr,
):
    """factor * (q' + q_constant) k'^T [BQ, BK] float32 for the keys `key` [BK].

    -inf beyond the last key.
    Constants of k would add the same to all scores of a query, which the softmax does not see.
    """
    k = tl.load(
        K + key[None, :] * stride + channel[:, None],
        mask=(key < keys)[None, :] & (channel < dim)[:, None],
        other=0,
    )
    s = tl.dot(q, k, out_dtype=tl.int32)
    if HAS_Q:
        s += q_constant * tl.load(KEY_SUM + key, mask=key < keys, other=0)[None, :]
    s = s.to(tl.float32) * factor
    return s if EVEN else tl.where((key < keys)[None, :], s, float("-inf"))


@triton.jit
def attention(
    Q,
    K,
    VT,
    OUT,
    KEY_SUM,
    V_SCALE,
    queries,
    keys,
    keys_padded,
    heads,
    dim: tl.constexpr,
    stride,
    q_constant,
    v_constant,
    factor,
    p_inverse,
    p_high,
    HAS_Q: tl.constexpr,
    HAS_V: tl.constexpr,
    P_CONSTANT: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """softmax(ln 2 factor q k^T), quantized to codes 0..p_high, times v.

    Two passes over the keys: codes need the final sums.

    dim         channels of a head. A constant, so that the compiler knows how the heads are aligned
                in memory: with 40 channels it loads 8 bytes at once, and otherwise single bytes
    Q, K        q', k' int8 [B, queries or keys, stride], head h at channels h dim..
    VT          v'^T int8 [B, heads dim, keys_padded], anything beyond the keys
    KEY_SUM     int32 [B, heads, keys]: sums of k' over a head's channels
    OUT         [B, queries, heads dim] = V_SCALE * sum p (v' + v_constant)
    P_CONSTANT  codes travel as p - P_CONSTANT, to fit a signed byte
    EVEN        keys are a multiple of BK
    """
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    channel = tl.arange(0, BD)
    key = tl.arange(0, BK)
    in_q = (row < queries)[:, None]
    in_d = (channel < dim)[None, :]
    q = tl.load(
        Q + (batch * queries + row)[:, None] * stride + head * dim + channel[None, :],
        mask=in_q & in_d,
        other=0,
    )
    k_head = K + batch * keys * stride + head * dim
    v_head = VT + (batch * heads + head) * dim * keys_padded
    sum_head = KEY_SUM + (batch * heads + head) * keys

    top = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for start in range(0, keys, BK):
        s = scores(
            q,
            k_head,
            sum_head,
            start + key,
            keys,
            stride,
            channel,
            dim,
            q_constant,
            factor,
            HAS_Q,
            EVEN,
        )
        larger = tl.maximum(top, tl.max(s, 1))
        total = total * power2(top - larger, ASM) + tl.sum(power2(s - larger[:, None], ASM), 1)
        top = larger

    share = p_inverse / total
    acc = tl.zeros((BQ, BD), tl.int32)
    mass = tl.zeros((BQ,), tl.int32)
    v_sum = tl.zeros((BD,), tl.int32)  # of v' over the keys
    for start in range(0, keys, BK):
        s = scores(
            q,
            k_head,
            sum_head,
            start + key,
            keys,
            stride,
            channel,
            dim,
            q_constant,
            factor,
            HAS_Q,
            EVEN,
        )
        p = tl.minimum(power2(s - top[:, None], ASM) * share[:, None], p_high)
        if HAS_V:
            mass += tl.sum(integer(p), 1)
        # The low byte of p's integer, less the constant.
        code = (p + (ROUND - P_CONSTANT)).to(tl.int32, bitcast=True).to(tl.int8)
        at = start + key
        v = tl.load(
            v_head + channel[None, :] * keys_padded + at[:, None],
            mask=in_d & (at < keys_padded)[:, None],
            other=0,
        )
        if not EVEN:
            code = tl.where((at < keys)[None, :], code, 0)
        acc = tl.dot(code, v, acc, out_dtype=tl.int32)
        if P_CONSTANT:
            own = v if EVEN else tl.where((at < keys)[:, None], v, 0)
            v_sum += tl.sum(own.to(tl.int32), 0)
    c = head * dim + channel
    if P_CONSTANT:
        acc += P_CONSTANT * v_sum[None, :]
    if HAS_V:
        acc += v_constant * mass[:, None]
    out = acc.to(tl.float32) * tl.load(V_SCALE + c, mask=channel < dim, other=0.0)[None, :]
    place = (batch * queries + row)[:, None] * (heads * dim) + c[None, :]
    tl.store(OUT + place, out.to(OUT.dtype.element_ty), mask=in_q & in_d)
