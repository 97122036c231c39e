"""Range search: from values to scale and zero point.

Every row of a table [P, n] holds the values of one set of parameters.
"""

from __future__ import annotations

from functools import partial

import torch

from questlib.config_groups import Search
from questlib.quantization.primitives import CACHED, affine, fake_quant

SHRINK = torch.linspace(0.1, 1.0, 37)  # of a range, tried by the "mse" search
PERCENTILES = (0.999, 0.9999, 0.99999)  # of a row's values, tried by the "percentile" search


def choose_qparams(
    x: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    method: Search,
    symmetric: bool = False,
    norm: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row.

    Args:
        x: sampled values [P, n].
        lo: the true minimum of each row [P].
        hi: the true maximum of each row [P].
        bits: 2 to 8.
        method: "minmax": the extremes; "mse": the least |x_hat - x|^norm; "percentile": both tails
            are cut off where the squared error is least.
        symmetric: whether ranges are symmetric around zero.
        norm: of the "mse" search.

    Returns:
        Scale and zero point, [P] each.
    """
    if method == "mse":
        # Some rows at a time, so that the 111 passes over them stay in a core's cache: three times
        # as fast on large weights. Rows do not depend on each other, but a lone row is summed in
        # another order: hence two or more.
        parts = max(1, min(x.numel() // CACHED, len(x) // 2))
        search = partial(mse_bounds, bits=bits, symmetric=symmetric, norm=norm)
        chunks = zip(x.chunk(parts), lo.chunk(parts), hi.chunk(parts), strict=True)
        found = [search(*rows) for rows in chunks]
        lo = torch.cat([bounds[0] for bounds in found])
        hi = torch.cat([bounds[1] for bounds in found])
    elif method == "percentile":
        lo, hi = percentile_bounds(x, bits, symmetric)
    return affine(lo, hi, bits, symmetric)


def mse_bounds(
    x: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    symmetric: bool,
    norm: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row of x [P, n] with the least |error|^norm.

    [lo, hi] is shrunk by a grid of factors: first both ends together, then each end alone.
    """
    best_lo = lo
    best_hi = hi
    best = _error(x, lo, hi, bits, symmetric, norm)
    moves = ((True, True),) if symmetric else ((True, True), (True, False), (False, True))
    for move_lo, move_hi in moves:
        base_lo = best_lo.clone()
        base_hi = best_hi.clone()
        for r in SHRINK.tolist():
            new_lo = base_lo * (r if move_lo else 1.0)
            new_hi = base_hi * (r if move_hi else 1.0)
            error = _error(x, new_lo, new_hi, bits, symmetric, norm)
            better = error < best
            best = torch.where(better, error, best)
            best_lo = torch.where(better, new_lo, best_lo)
            best_hi = torch.where(better, new_hi, best_hi)
    return best_lo, best_hi


def percentile_bounds(
    x: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row of x [P, n] between percentiles: the pair with the least error."""
    ordered = x.sort(1).values
    n = x.shape[1]
    bounds = []
    for p in PERCENTILES:
        k = min(n - 1, int(round(p * (n - 1))))
        bounds.append((ordered[:, n - 1 - k], ordered[:, k]))
    best_lo, best_hi = bounds[0]
    best = _error(x, best_lo, best_hi, bits, symmetric)
    for lo, hi in bounds[1:]:
        error = _error(x, lo, hi, bits, symmetric)
        better = error < best
        best = torch.where(better, error, best)
        best_lo = torch.where(better, lo, best_lo)
        best_hi = torch.where(better, hi, best_hi)
    return best_lo, best_hi


def power(error: torch.Tensor, norm: float) -> torch.Tensor:
    """|error|^norm, in place. For 2 and 4 without `pow`, which is ten times as slow."""
    if norm == 2.0:
        return error.square_()
    if norm == 4.0:
        return error.square_().square_()
    return error.abs_().pow_(norm)


def _error(
    x: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    bits: int,
    symmetric: bool,
    norm: float = 2.0,
) -> torch.Tensor:
    """Mean |error|^norm of each row on the grid of its range [P]."""
    scale, zero_point = affine(lo, hi, bits, symmetric)
    x_hat = fake_quant(x, scale[:, None], zero_point[:, None], bits)
    return power(x_hat.sub_(x), norm).mean(1)
