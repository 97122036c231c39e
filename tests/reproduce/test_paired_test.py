"""The paired test: the textbooks' where there is one pair, and as rarely wrong as it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from reproduce.paired_test import (
    LEVEL,
    Spread,
    p_value,
    pooled,
    relative_differences,
    spread_of,
)

EQUAL = 4000  # simulated tables


def values(rng: np.random.Generator, seeds: int, spread: float) -> list[tuple[float, float]]:
    """Two equal rows: noise does much to both of them, and `spread` to each alone."""
    both = rng.normal(100, 20, seeds)
    own = rng.normal(0, spread, (2, seeds)) * both / 2**0.5
    return list(zip(both + own[0], both + own[1], strict=True))


def told_apart(seeds: int, spreads: list[float]) -> float:
    """How often equal rows are told apart, where the pairs of their table have these spreads."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(EQUAL):
        pairs = [values(rng, seeds, spread) for spread in spreads]
        p = p_value(pairs[0], pooled(map(spread_of, pairs)))
        assert p is not None
        found += p < LEVEL
    return found / EQUAL


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_equal_rows_are_rarely_told_apart(seeds, rows):
    """No oftener than the level says, within what 4,000 tables can show of it."""
    assert told_apart(seeds, [0.01] * rows) < LEVEL + 0.012


def test_a_pair_that_spreads_more_than_the_others_is_not_judged_by_theirs():
    """Half of its rows would be told apart by the others' spread."""
    assert told_apart(5, [0.05] + [0.01] * 7) < 0.08


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_difference_of_three_spreads_is_seen_with_five_seeds(seeds):
    rng = np.random.default_rng(1)
    seen = 0
    for _ in range(500):
        pairs = [[(a * 1.03, b) for a, b in values(rng, seeds, 0.01)] for _ in range(4)]
        p = p_value(pairs[0], pooled(map(spread_of, pairs)))
        seen += p is not None and p < LEVEL
    assert seen / 500 > {2: 0.6, 5: 0.99}[seeds]


def test_one_pair_alone_is_the_paired_t_test_of_relative_differences():
    pairs = [(9.0, 11.0), (8.0, 10.0), (9.1, 10.9)]
    relative = np.array(relative_differences(pairs))
    assert relative == pytest.approx([-0.2, -2 / 9, -0.18])
    assert p_value(pairs) == pytest.approx(ttest_rel(relative, np.zeros(3)).pvalue)


def test_the_order_of_the_two_rows_does_not_matter():
    pairs = [(9.0, 11.0), (8.0, 10.5), (9.1, 10.9)]
    assert p_value(pairs) == pytest.approx(p_value([(b, a) for a, b in pairs]))


def test_spreads_are_pooled_by_their_degrees_of_freedom():
    found = pooled([Spread(0.3, 1), None, Spread(0.1, 3)])
    assert found == Spread(pytest.approx(((0.09 + 3 * 0.01) / 4) ** 0.5), 4)
    assert pooled([]) is None and pooled([None]) is None


def test_what_is_known_of_one_seed():
    assert spread_of([(1.0, 2.0)]) is None
    assert p_value([(1.0, 2.0)]) is None
    common = p_value([(1.0, 2.0)], Spread(0.1, 4))
    assert common is not None and common < LEVEL
    assert p_value([], Spread(0.1, 4)) is None


def test_equal_values_differ_by_nothing():
    assert p_value([(0.0, 0.0), (0.0, 0.0)]) == 1.0
    assert p_value([(2.0, 2.0), (3.0, 3.0)]) == 1.0
    assert p_value([(2.0, 1.0), (4.0, 2.0)]) == 0.0  # always exactly twice as large
