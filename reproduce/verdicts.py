"""What a row's number says about the paper's claim."""

from __future__ import annotations

import statistics
from typing import Any

from reproduce.provenance import row_processors
from reproduce.tables.base import FAILED, UNKNOWN, Cell, Number

ONE_SEED = "one seed, no spread"
TWO_PROCESSORS = "on two processors"
HIGHER_IS_BETTER = ("inception_score", "clip_score")


def verdict(
    metric: str,
    cell: Cell,
    base: Cell | None,
    mine: dict[str, Any],
    other: dict[str, Any] | None,
    claim: str | None = None,
) -> str:
    """One line about one metric of one row: our order against `base`, and whether the paper has the same order.

    `base` is the row that the paper's claim compares `cell` with (Cell.against); `mine` and `other` are their result JSONs.

    Our order. d = our value - base's value, seed by seed: both rows see the same noise, so what the noise does cancels out.
    "better" or "worse" when |mean d| exceeds the sample standard deviation of d over the seeds, else "no clear difference":
    a weak test, with two seeds it tells 39% of pairs of equal rows apart (t distribution, 1 degree of freedom).
    With one seed there is no spread, and the order is said with that remark. So is it when a seed of the two rows comes from two
    processors, on which it goes another way.

    The paper's order is that of its two numbers in metric `claim` (None: the same metric), or what its text says of it
    (Cell.paper_order); a number wins against "N/A" (generation failed). Of a row that failed there, only that is said.
    "as in the paper" when both orders agree, "differs from the paper" when they are opposite or ours is not clear,
    "the paper gives no order" when one of its two numbers is not reported.

    The paper's absolute numbers belong to another model and another data set at smoke and mini scale: they are never compared.
    """
    if mine["status"] != "done":
        return mine["status"]  # the reason stands in the result and under the table
    if mine["metrics"][metric]["value"] is None:
        return "not measured"
    if base is None:
        return "reference row"
    if other is None or other["status"] != "done" or other["metrics"][metric]["value"] is None:
        return f"{base.label} has no result to compare with"
    differences = [a - b for a, b in by_seed(metric, mine, other)]
    if not differences:
        return f"no seed in common with {base.label}"
    mean = statistics.fmean(differences)
    if len(differences) > 1:
        spread = statistics.stdev(differences)
        clear, size = abs(mean) > spread, f"by {abs(mean):.3g}, spread {spread:.2g}"
    else:
        clear, size = mean != 0, f"by {abs(mean):.3g}, {ONE_SEED}"
    if any(len(used) > 1 for used in _processors(mine, other)):
        size += f", {TWO_PROCESSORS}"
    ours = (
        ("better" if (mean < 0) != (metric in HIGHER_IS_BETTER) else "worse")
        if clear
        else "no clear difference"
    )
    words = (
        f"{ours} than {base.label} ({size})"
        if clear
        else f"no clear difference from {base.label} ({size})"
    )
    claim = claim or metric
    if cell.paper.get(claim) == FAILED:
        return f"{words}; the paper's run failed"
    papers = cell.paper_order.get(claim) or paper_order(
        cell.paper.get(claim), base.paper.get(claim), claim in HIGHER_IS_BETTER
    )
    if papers is None:
        return f"{words}; the paper gives no order"
    return f"{words}; {'as in' if papers == ours else 'differs from'} the paper"


def _processors(mine: dict[str, Any], other: dict[str, Any]) -> list[set[str]]:
    """Of each seed that both rows have: the processors that made it, of a seed that does not say it its row's."""
    ours, theirs = (
        {s["seed"]: s.get("processors") or row_processors(r) for s in r["per_seed"]}
        for r in (mine, other)
    )
    return [{*ours[seed], *theirs[seed]} for seed in ours.keys() & theirs.keys()]


def paper_order(mine: Number, base: Number, higher_is_better: bool = False) -> str | None:
    """ "better", "worse", "equal" or None (not reported, not available, or both failed)."""
    if mine is None or base is None or UNKNOWN in (mine, base) or mine == base == FAILED:
        return None
    if FAILED in (mine, base):
        return "worse" if mine == FAILED else "better"
    return "equal" if mine == base else "better" if (mine < base) != higher_is_better else "worse"


def by_seed(metric: str, mine: dict[str, Any], other: dict[str, Any]) -> list[tuple[float, float]]:
    """(ours, base's) for each seed that both have."""
    base = {s["seed"]: s["metrics"].get(metric) for s in other["per_seed"]}
    pairs = [(s["metrics"].get(metric), base.get(s["seed"])) for s in mine["per_seed"]]
    return [(a, b) for a, b in pairs if a is not None and b is not None]
