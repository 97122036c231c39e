"""What a row's number says about the paper's claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from reproduce.paired_test import LEVEL, Spread, p_value, pooled, spread_of
from reproduce.results import Result, Status
from reproduce.table_results import TableResults
from reproduce.tables.base import FAILED, UNKNOWN, Number, Row

HIGHER_IS_BETTER = ("inception_score", "clip_score")
JUDGED = ("fid", "sfid", "kid", "inception_score", "clip_score")
# Compared with the order of the paper's FIDs: it resolves what the FID of few samples cannot.
PAIRED = "feature_distance_to_fp"
# It is near 0 for good rows, where a relative spread of other rows means nothing.
NOT_POOLED = ("kid",)


class Order(StrEnum):
    """How a row's number stands to another row's, or why that cannot be said."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "no clear difference"
    REFERENCE = "reference row"
    NOT_MEASURED = "not measured"
    NOT_RUN = "not run"
    FAILED = "failed"
    NO_BASE = "no result to compare with"
    NO_COMMON_SEED = "no seed in common"


MEASURED_ORDERS = (Order.BETTER, Order.WORSE, Order.UNCLEAR)

# In a table's column, and what explains them there.
SIGNS = {Order.BETTER: "▲", Order.WORSE: "▼", Order.UNCLEAR: "="}
LEGEND = (
    "▲ better, ▼ worse, = no difference beyond chance (paired t-test over seeds, "
    f"p < {LEVEL}); ✓ as in the paper, ✗ not"
)


class Remark(StrEnum):
    """What limits a verdict."""

    ONE_SEED = "one seed, no spread"
    TWO_PROCESSORS = "on two processors"
    PAPER_FAILED = "the paper's run failed"


@dataclass(frozen=True)
class Verdict:
    """The order of two rows by one metric, and whether the paper has the same order."""

    order: Order
    base: str | None = None
    """Label of the other row."""

    difference: float | None = None
    """Mean over the seeds of our value minus the other row's."""

    p: float | None = None
    """Of the paired test (`paired_test.p_value`); None where nothing is known of the spread."""

    agrees: bool | None = None
    """Whether the paper has this order; None where it gives none or its run failed."""

    remarks: tuple[Remark, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether two numbers were compared."""
        return self.order in MEASURED_ORDERS

    @property
    def sign(self) -> str:
        """The verdict as in a table: one sign for the order, one for the paper's; `LEGEND`."""
        agrees = {True: " ✓", False: " ✗", None: ""}[self.agrees]
        return f"{SIGNS[self.order]}{agrees}" if self.measured else ""

    def __str__(self) -> str:
        """The verdict as a sentence."""
        if self.order == Order.NO_BASE:
            return f"{self.base} has {self.order}"
        if self.order == Order.NO_COMMON_SEED:
            return f"{self.order} with {self.base}"
        if self.difference is None:
            return str(self.order)
        size = [f"by {abs(self.difference):.3g}"]
        size += [] if self.p is None else [p_in_words(self.p)]
        size += [str(r) for r in self.remarks if r != Remark.PAPER_FAILED]
        than = "from" if self.order == Order.UNCLEAR else "than"
        return f"{self.order} {than} {self.base} ({', '.join(size)}); {self._papers_order}"

    @property
    def _papers_order(self) -> str:
        if Remark.PAPER_FAILED in self.remarks:
            return str(Remark.PAPER_FAILED)
        if self.agrees is None:
            return "the paper gives no order"
        return "as in the paper" if self.agrees else "differs from the paper"


def compare(
    metric: str,
    row: Row,
    base: Row | None,
    mine: Result,
    other: Result | None,
    claim: str | None = None,
    common: Spread | None = None,
) -> Verdict:
    """Our order of two rows by one metric, and whether the paper has the same.

    Our order: "better" or "worse" when a paired test over the seeds gives p < 0.05
    (`paired_test`), else "no clear difference". Where nothing is known of the spread (one seed),
    the order is that of the two values, and a remark says so. Another remark says when a seed of
    the two rows comes from two processors, on which training goes another way.

    The paper's order is that of its two numbers in metric `claim`, or what its text says
    (`Row.paper_order`); a number wins against "N/A" (generation failed). Of a row that failed in
    the paper, only that is said. Where our order is not clear, it differs from the paper's.

    The paper's absolute numbers belong to another model and data set at smoke and mini scale:
    they are never compared.

    Args:
        row: the row that is judged, and `mine` its result.
        base: the row that the paper's claim compares it with (`Row.against`), `other` its result.
        claim: the metric of the paper's order; None: `metric`.
        common: the spread that this and other pairs of rows have in common (`common_spread`).
    """
    if not mine.done:
        return Verdict(Order.FAILED if mine.status == Status.FAILED else Order.NOT_RUN)
    if mine.metric(metric).value is None:
        return Verdict(Order.NOT_MEASURED)
    if base is None:
        return Verdict(Order.REFERENCE)
    if other is None or other.metric(metric).value is None:
        return Verdict(Order.NO_BASE, base.label)
    pairs = by_seed(metric, mine, other)
    if not pairs:
        return Verdict(Order.NO_COMMON_SEED, base.label)
    mean = statistics.fmean(a - b for a, b in pairs)
    p = p_value(pairs, common)
    order = _order(mean, p, metric in HIGHER_IS_BETTER)
    claim = claim or metric
    papers = row.paper_order.get(claim) or paper_order(
        row.paper.get(claim), base.paper.get(claim), claim in HIGHER_IS_BETTER
    )
    failed = row.paper.get(claim) == FAILED
    remarks = {
        Remark.ONE_SEED: p is None,
        Remark.TWO_PROCESSORS: _two_processors(mine, other),
        Remark.PAPER_FAILED: failed,
    }
    return Verdict(
        order,
        base.label,
        mean,
        p,
        None if failed or papers is None else papers == order,
        tuple(remark for remark, holds in remarks.items() if holds),
    )


def verdict(results: TableResults, row: Row, metric: str) -> Verdict | None:
    """A row's verdict by one of the metrics that the paper's tables use.

    The distance to full precision is judged where both rows are quantized, against the paper's
    order by the table's own metric. None for metrics that are not judged.
    """
    base = None if row.against is None else results.table.row(row.against)
    other = None if base is None else results[base.id]
    if metric in JUDGED:
        claim = None
    elif metric == PAIRED and base is not None and not base.full_precision:
        claim = results.table.claim
    else:
        return None
    common = common_spread(results, metric, row.bits)
    return compare(metric, row, base, results[row.id], other, claim, common)


def common_spread(results: TableResults, metric: str, bits: str) -> Spread | None:
    """The spread that the table's pairs of rows of these bits have in common.

    A pair is a row and the one that it is judged against. The distance to full precision is
    pooled over pairs of quantized rows.
    """
    if metric in NOT_POOLED:
        return None
    found = []
    for row in results.table.rows:
        if row.bits != bits or row.against is None:
            continue
        base = results.table.row(row.against)
        if metric != PAIRED or not base.full_precision:
            found.append(spread_of(by_seed(metric, results[row.id], results[base.id])))
    return pooled(found)


def p_in_words(p: float) -> str:
    """A p-value as it is read: "p 0.03", or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


def between_quantized(results: TableResults, metrics: Sequence[str]) -> list[Verdict]:
    """The verdicts on all rows that are compared with a quantized row."""
    table = results.table
    found = (
        verdict(results, row, metric)
        for row in table.rows
        if row.against is not None and not table.row(row.against).full_precision
        for metric in metrics
    )
    return [judged for judged in found if judged is not None]


def _order(mean: float, p: float | None, higher_is_better: bool) -> Order:
    if mean == 0 or (p is not None and p >= LEVEL):
        return Order.UNCLEAR
    return Order.BETTER if (mean < 0) != higher_is_better else Order.WORSE


def _two_processors(mine: Result, other: Result) -> bool:
    """Whether a seed of the two rows comes from more than one processor."""
    pairs = ((s, other.of_seed(s.seed)) for s in mine.seeds)
    return any(t is not None and len({*s.processors, *t.processors}) > 1 for s, t in pairs)


def paper_order(mine: Number, base: Number, higher_is_better: bool = False) -> str | None:
    """ "better", "worse", "equal" or None (not reported, not available, or both failed)."""
    if mine is None or base is None or UNKNOWN in (mine, base) or mine == base == FAILED:
        return None
    if isinstance(mine, str) or isinstance(base, str):
        return "worse" if mine == FAILED else "better"
    if mine == base:
        return "equal"
    return "better" if (mine < base) != higher_is_better else "worse"


def by_seed(metric: str, mine: Result, other: Result) -> list[tuple[float, float]]:
    """The two rows' values for each seed that both have."""
    base = {s.seed: s.metrics.get(metric) for s in other.seeds}
    pairs = [(s.metrics.get(metric), base.get(s.seed)) for s in mine.seeds]
    return [(a, b) for a, b in pairs if a is not None and b is not None]
