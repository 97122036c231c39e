"""What the Triton kernels share: the values that are quantized, and their codes.

Layouts are those of `quantize_kernels`.
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
