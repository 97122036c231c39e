"""Range search: values -> scale and zero point. Vectorized: every row of a [P, n] table of values is one set of parameters.

Uniform affine quantization (paper, Sec. 3.1): q = clamp(round(x / s) + z, 0, 2^b - 1), x_hat = (q - z) * s.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch

EPS = 1e-8
GRID = torch.linspace(0.1, 1.0, 37)
CACHED = 2**17  # float32 values
PERCENTILES = (0.999, 0.9999, 0.99999)


def affine(lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds [P] -> scale, zero_point [P]. Zero is always on the grid. Symmetric: z = 2^(b-1), codes -2^(b-1)..2^(b-1)-1."""
    levels = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-lo, hi).clamp_min(EPS) / (levels // 2)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
    scale = ((hi - lo) / levels).clamp_min(EPS)
    return scale, (-lo / scale).round().clamp(0, levels)


def fake_quant(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int, inverse: torch.Tensor | None = None
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
    parts = (v.split(size) if v.ndim == x.ndim and len(v) == len(x) else repeat(v) for v in (x, *others))
    return zip(*parts, strict=False)  # some repeat for ever


def clamp_(q: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """q clamped in place to -z .. 2^b - 1 - z. By maximum and minimum: on CPUs `clamp_` with tensor bounds is far slower."""
    return torch.minimum(torch.maximum(q, -zero_point, out=q), 2**bits - 1 - zero_point, out=q)


def _error(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool, norm: float = 2.0) -> torch.Tensor:
    scale, zero = affine(lo, hi, bits, symmetric)
    return power(fake_quant(x, scale[:, None], zero[:, None], bits).sub_(x), norm).mean(1)  # [P]


def power(error: torch.Tensor, norm: float) -> torch.Tensor:
    """|error|^norm, in place; 2 and 4 without a call of pow, which is ten times as slow."""
    if norm in (2.0, 4.0):
        return error.square_() if norm == 2.0 else error.square_().square_()
    return error.abs_().pow_(norm)


def mse_bounds(
    x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool, norm: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrink [lo, hi] by a grid of factors, first together, then each end alone; the least |error|^norm on x [P, n] wins."""
    best_lo, best_hi = lo, hi
    best = _error(x, lo, hi, bits, symmetric, norm)
    ends = ((True, True),) if symmetric else ((True, True), (True, False), (False, True))
    for move_lo, move_hi in ends:
        base_lo, base_hi = best_lo.clone(), best_hi.clone()
        for r in GRID.tolist():
            new_lo, new_hi = base_lo * (r if move_lo else 1.0), base_hi * (r if move_hi else 1.0)
            err = _error(x, new_lo, new_hi, bits, symmetric, norm)
            better = err < best
            best = torch.where(better, err, best)
            best_lo, best_hi = torch.where(better, new_lo, best_lo), torch.where(better, new_hi, best_hi)
    return best_lo, best_hi


def percentile_bounds(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidate percentile (both tails) with the least squared error, for each row of x [P, n]."""
    ordered = x.sort(1).values
    n, best = x.shape[1], None
    for p in PERCENTILES:
        k = min(n - 1, int(round(p * (n - 1))))
        lo, hi = ordered[:, n - 1 - k], ordered[:, k]
        err = _error(x, lo, hi, bits, symmetric)
        if best is None:
            best, best_lo, best_hi = err, lo, hi
        else:
            better = err < best
            best = torch.where(better, err, best)
            best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
    return best_lo, best_hi


def search(
    x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, method: str, symmetric: bool = False, norm: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [P] by `method` (minmax | mse | percentile). x [P, n]: sampled values; lo, hi [P]: true extremes."""
    if method == "mse":
        # Some rows at a time, so that the 111 passes over them stay in a core's cache: three times as fast on large weights. Rows
        # do not depend on each other, but a lone row is summed in another order: hence two or more.
        parts = max(1, min(x.numel() // CACHED, len(x) // 2))
        found = [mse_bounds(*rows, bits, symmetric, norm) for rows in zip(*(v.chunk(parts) for v in (x, lo, hi)), strict=True)]
        lo, hi = (torch.cat(bounds) for bounds in zip(*found, strict=True))
    elif method == "percentile":
        lo, hi = percentile_bounds(x, bits, symmetric)
    return affine(lo, hi, bits, symmetric)


# ---- per-token dynamic grids: s_tk = clip * range_t / (2^b - 1) * ratio_k ----


class TokenGrid(NamedTuple):
    """One entry a token (and part) where x has its channels; zero_point integers, so that q - z is one whatever the token."""

    inverse: torch.Tensor  # 1 / scale
    zero_point: torch.Tensor
    scale: torch.Tensor


def token_grid(u: torch.Tensor, clip: torch.Tensor, bits: int, dim: int) -> TokenGrid:
    """u = x / ratio [..., C at dim, ...] and clip (scalar, or broadcastable) -> the grid of each token's range, zero included.

    Codes of 8 bits have their zero in the middle: q - z must fit a signed byte. The gradient of `scale` reaches `clip` alone.
    """
    with torch.no_grad():
        lo, hi = u.aminmax(dim=dim, keepdim=True)
        levels = 2**bits - 1
        lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
        span = (2 * torch.maximum(-lo, hi) if bits == 8 else hi - lo).clamp_min(EPS)
        unit = levels / span
        zero = torch.full_like(lo, 128.0) if bits == 8 else (-lo * unit).clamp(0, levels).round()
        inverse = unit * (1.0 / clip)
    return TokenGrid(inverse, zero, span * (clip / levels))


# ---- carrier headroom (design/integer.md): s_k = base * m_k * 2^e, applied exactly in 8-bit lanes ----

CARRIER_MULTIPLIER = 8  # m_k in 1..8: |(q - z) m_k| <= 15 * 8 = 120 fits a signed byte
CARRIER_SHIFT = 3  # 2^e on sorted blocks of input channels, moved into asymmetric weights carried as q - z in +-15
CARRIER_BLOCK = 64


def block_shifts(scale: torch.Tensor) -> torch.Tensor:
    """Free scales [G, C] -> shift e [C] (same for all groups): sorted by mean log scale, blocks of 64, e in 0..3."""
    log = scale.log2().mean(0)
    order = log.argsort()
    top = torch.stack([log[b].max() for b in order.split(CARRIER_BLOCK)])
    e_block = (CARRIER_SHIFT - (top.max() - top).floor()).clamp_min(0)
    e_block = e_block - e_block.min()
    e = torch.empty_like(log)
    for b, shift in zip(order.split(CARRIER_BLOCK), e_block, strict=True):
        e[b] = shift
    return e


def snap_to_carrier(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, shift: torch.Tensor, bits: int, norm: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Free scales [C] -> base (0-d), ratio [C] = m_k * 2^e, zero_point [C]; base has the least |error|^norm on x [C, n]."""
    levels, best = 2**bits - 1, None
    centre = (levels / 2 - zero) * scale  # keep the middle of the range where the search put it
    for base, ratio in carrier_ratios(scale, shift):
        s = base * ratio
        z = torch.where(zero == 0, zero, (levels / 2 - centre / s).round().clamp(0, levels))
        err = power(fake_quant(x, s[:, None], z[:, None], bits).sub_(x), norm).sum()
        if best is None or err < best[0]:
            best = (err, base, ratio, z)
    return best[1:]


def carrier_ratios(scale: torch.Tensor, shift: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Candidates (base, ratio [C] = m_k * 2^e) for free scales [C]."""
    unit = scale / 2**shift
    for r in torch.linspace(0.35, 1.3, 39).tolist():
        base = unit.max() * (r / CARRIER_MULTIPLIER)
        yield base, (unit / base).round().clamp(1, CARRIER_MULTIPLIER) * 2**shift


def snap_to_tokens(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, bits: int, norm: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens x [C, n], free scales [C] -> clip (0-d), ratio [C] with the least |error|^norm: first the ratios, then the clip.

    More than 4 bits leave no headroom for ratios: they are 1.
    """

    def error(ratio: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        grid = token_grid(x * (1.0 / ratio)[:, None], clip, bits, 0)
        inverse, full = grid.inverse * (1.0 / ratio)[:, None], grid.scale * ratio[:, None]
        return power(fake_quant(x, full, grid.zero_point, bits, inverse).sub_(x), norm).sum()

    one = torch.ones((), dtype=scale.dtype, device=scale.device)
    ratio = torch.ones_like(scale)
    if bits <= 4:
        ratio = min((r for _, r in carrier_ratios(scale, shift)), key=lambda r: error(r, one).item())
    clip = min((one * c for c in torch.linspace(0.4, 1.0, 25).flip(0).tolist()), key=lambda c: error(ratio, c).item())
    return clip, ratio
