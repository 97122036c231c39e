"""Is one row better than another, or was it chance? A paired t-test over seeds.

Both rows draw from the same noise, seed by seed, so that what the noise does cancels out in their
difference. A difference is taken relative to the two values, because rows with a large FID also
spread more.

Two seeds tell little of the spread of one pair. A table has several pairs of rows of the same bits,
which spread alike, so that their spreads are pooled: the root mean square, with the degrees of
freedom of all pairs. A pair that spreads more than that keeps its own spread, and where an F-test
says that this is no chance, its own few degrees of freedom as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

LEVEL = 0.05  # a difference with a smaller p-value is called one

Pairs = Sequence[tuple[float, float]]
"""Values of two rows, seed by seed."""


class Spread(NamedTuple):
    """How much the difference of two rows varies from seed to seed."""

    relative: float
    """Sample standard deviation of the relative differences."""

    freedom: int
    """Degrees of freedom of this estimate."""


def relative_differences(pairs: Pairs) -> list[float]:
    """The first value minus the second, over the mean of their sizes.

    Example:
        >>> relative_differences([(9.0, 11.0)])
        [-0.2]
    """
    return [(a - b) / ((abs(a) + abs(b)) / 2) if a != b else 0.0 for a, b in pairs]


def spread_of(pairs: Pairs) -> Spread | None:
    """That of one pair of rows; None for fewer than two seeds."""
    if len(pairs) < 2:
        return None
    return Spread(statistics.stdev(relative_differences(pairs)), len(pairs) - 1)


def pooled(spreads: Iterable[Spread | None]) -> Spread | None:
    """The spread that several pairs of rows have in common; None where none has one.

    Example:
        >>> pooled([Spread(0.3, 1), Spread(0.4, 1), None])
        Spread(relative=0.3535533905932738, freedom=2)
    """
    known = [spread for spread in spreads if spread is not None]
    freedom = sum(spread.freedom for spread in known)
    if not freedom:
        return None
    square = sum(spread.freedom * spread.relative**2 for spread in known) / freedom
    return Spread(math.sqrt(square), freedom)


def p_value(pairs: Pairs, common: Spread | None = None) -> float | None:
    """How often chance alone gives a difference this large between rows that are equal.

    Two-sided, by Student's t distribution. With the pooled spread it assumes that the pairs of rows
    spread alike; without one it is the paired t-test of the textbooks, on relative differences.

    Args:
        pairs: values of two rows, seed by seed.
        common: the spread that these and other pairs of rows have in common.

    Returns:
        None where nothing is known of the spread: one seed, and no common spread.

    Example:
        >>> round(p_value([(9.0, 11.0), (8.0, 10.0), (9.1, 10.9)]), 3)
        0.004
    """
    spread = _in_force(spread_of(pairs), common)
    if spread is None or not pairs:
        return None
    mean = abs(statistics.fmean(relative_differences(pairs)))
    if spread.relative == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean * math.sqrt(len(pairs)) / spread.relative
    return float(2 * t_distribution.sf(t, spread.freedom))


def _in_force(own: Spread | None, common: Spread | None) -> Spread | None:
    """The larger spread: a pair's own one with its own freedom where it is larger by no chance."""
    if own is None or common is None:
        return own or common
    if own.relative <= common.relative:
        return common
    if common.relative > 0:
        ratio = (own.relative / common.relative) ** 2
        if f_distribution.sf(ratio, own.freedom, common.freedom) >= LEVEL:
            return Spread(own.relative, common.freedom)
    return own
