"""Range search: values -> scale and zero point. Every row of a [P, n] table is one set of parameters."""

from __future__ import annotations

import torch

from questlib.quantization.primitives import CACHED, affine, fake_quant

GRID = torch.linspace(0.1, 1.0, 37)
PERCENTILES = (0.999, 0.9999, 0.99999)


def _error(
    x: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    symmetric: bool,
    norm: float = 2.0,
) -> torch.Tensor:
    scale, zero = affine(lo, hi, bits, symmetric)
    return power(fake_quant(x, scale[:, None], zero[:, None], bits).sub_(x), norm).mean(1)  # [P]


def power(error: torch.Tensor, norm: float) -> torch.Tensor:
    """|error|^norm, in place; 2 and 4 without a call of pow, which is ten times as slow."""
    if norm in (2.0, 4.0):
        return error.square_() if norm == 2.0 else error.square_().square_()
    return error.abs_().pow_(norm)


def mse_bounds(
    x: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    symmetric: bool,
    norm: float = 2.0,
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
            best_lo, best_hi = (
                torch.where(better, new_lo, best_lo),
                torch.where(better, new_hi, best_hi),
            )
    return best_lo, best_hi


def percentile_bounds(
    x: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
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


def choose_qparams(
    x: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    method: str,
    symmetric: bool = False,
    norm: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [P] by `method` (minmax | mse | percentile). x [P, n]: sampled values; lo, hi [P]: true extremes."""
    if method == "mse":
        # Some rows at a time, so that the 111 passes over them stay in a core's cache: three times as fast on large weights. Rows
        # do not depend on each other, but a lone row is summed in another order: hence two or more.
        parts = max(1, min(x.numel() // CACHED, len(x) // 2))
        found = [
            mse_bounds(*rows, bits, symmetric, norm)
            for rows in zip(*(v.chunk(parts) for v in (x, lo, hi)), strict=True)
        ]
        lo, hi = (torch.cat(bounds) for bounds in zip(*found, strict=True))
    elif method == "percentile":
        lo, hi = percentile_bounds(x, bits, symmetric)
    return affine(lo, hi, bits, symmetric)
