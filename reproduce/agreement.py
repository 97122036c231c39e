"""A run against the published one: do its numbers agree within the spread between seeds?

The spread of a number is the sample standard deviation over the published seeds, relative to the
value. Two seeds give a poor estimate of it, so it counts as no smaller than the root mean square
of that of all published rows with the same bits. Two numbers agree when they differ by at most
twice the spread.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from questlib.files import atomic_path
from reproduce.plan import Plan
from reproduce.results import IF_REPORTED, Conditions, Result
from reproduce.store import write_json
from reproduce.table_results import TableResults
from reproduce.tables.base import Row
from reproduce.verdicts import PAIRED

# KID is missing: it is near 0 for good rows, where a relative spread means nothing.
METRICS = ("fid", "sfid", "inception_score", "clip_score", "psnr_to_fp", PAIRED)
SPREADS = 2.0


@dataclass(frozen=True)
class Difference:
    """One number of a run and the published one."""

    row: str
    metric: str
    own: float
    """Mean over the seeds."""

    published: float
    spread: float
    """One standard deviation over seeds, as the module says, in the metric's unit."""

    @property
    def agrees(self) -> bool:
        """Whether the two differ by no more than the spread between seeds explains."""
        return abs(self.own - self.published) <= SPREADS * self.spread

    def __str__(self) -> str:
        words = f"{self.own:.4g}, published {self.published:.4g}, spread {self.spread:.2g}"
        return f"{self.row}, {self.metric}: {words}"


@dataclass(frozen=True)
class Agreement:
    """A run's numbers beside the published ones.

    Example:
        >>> print(compare_with_published(results))
        21 of 21 numbers agree with the published run within the spread between seeds (two ...
    """

    differences: tuple[Difference, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    """Rows that were run and cannot be compared, each with the reason."""

    reason: str | None = None
    """Why nothing at all can be compared."""

    @property
    def differing(self) -> list[Difference]:
        """Those that do not agree."""
        return [difference for difference in self.differences if not difference.agrees]

    def __str__(self) -> str:
        """Plain text, a line a statement."""
        return "\n".join(self._lines(""))

    def markdown(self) -> str:
        """The same as a paragraph and a list."""
        return "\n".join(self._lines("- ")) + "\n"

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON can hold."""
        differences = [dataclasses.asdict(d) | {"agrees": d.agrees} for d in self.differences]
        return {"text": str(self), "differences": differences, "left_out": dict(self.left_out)}

    def _lines(self, bullet: str) -> list[str]:
        if self.reason is not None:
            return [f"Not compared with a published run: {self.reason}."]
        agreeing = len(self.differences) - len(self.differing)
        lines = [
            f"{agreeing} of {len(self.differences)} numbers agree with the published run within "
            "the spread between seeds (two standard deviations)."
        ]
        if self.differing:
            lines += ["", "These do not:", "", *(f"{bullet}{d}" for d in self.differing)]
        if self.left_out:
            reasons = Counter(reason for _, reason in self.left_out)
            lines += ["", "Rows that are not compared:", ""]
            lines += [
                f"{bullet}{count} {'row' if count == 1 else 'rows'}: {reason}"
                for reason, count in reasons.items()
            ]
        return lines


def compare_with_published(results: TableResults) -> Agreement | None:
    """How a run's numbers compare with the published ones of the same table and scale.

    Returns:
        None where `results` are the published ones themselves.
    """
    plan = results.plan
    if plan.is_published:
        return None
    if plan.published is None:
        return Agreement(reason=f"none is published at {plan.scale.name} scale")
    if not results.done:
        return Agreement(reason="no row of this run has numbers")
    published = TableResults.stored(plan.published)
    differences: list[Difference] = []
    left_out = []
    for row, own in results.done:
        reason = _other_conditions(own, published[row.id])
        if reason is None:
            differences += _differences(row, own, published)
        else:
            left_out.append((row.id, reason))
    if not differences and not left_out:
        return Agreement(reason="the two runs have no number in common")
    return Agreement(tuple(differences), tuple(left_out))


def write_agreement(plan: Plan, agreement: Agreement | None) -> None:
    """Write agreement.json and agreement.md beside the table; nothing for published results."""
    if agreement is None:
        return
    write_json(plan.folder / "agreement.json", agreement.as_json())
    with atomic_path(plan.folder / "agreement.md") as temporary:
        temporary.write_text(agreement.markdown(), encoding="utf-8")


def _other_conditions(own: Result, published: Result) -> str | None:
    """Why two results of a row are not of the same experiment, or None."""
    if not published.done:
        return "not in the published run"
    changed = [
        field.name
        for field in dataclasses.fields(Conditions)
        if getattr(own.conditions, field.name) != getattr(published.conditions, field.name)
    ]
    if changed:
        return f"other {', '.join(changed)} than the published run's".replace("_", " ")
    pairs = [(s, published.of_seed(s.seed)) for s in own.seeds]
    if any(other is not None and s.config_hash != other.config_hash for s, other in pairs):
        return "other settings of the method than the published run's"
    return None


def _differences(row: Row, own: Result, published: TableResults) -> list[Difference]:
    """The row's numbers; over the seeds that both runs have, or over all where they share none."""
    common = {s.seed for s in own.seeds} & {s.seed for s in published[row.id].seeds}
    found = []
    for metric in METRICS:
        if metric in IF_REPORTED and metric not in published.told:
            continue
        mine = _of_seeds(own, common).metric(metric).value
        theirs = _of_seeds(published[row.id], common).metric(metric).value
        relative = _relative_spread(row, metric, published)
        if mine is not None and theirs is not None and relative is not None:
            found.append(Difference(row.id, metric, mine, theirs, relative * abs(theirs)))
    return found


def _of_seeds(result: Result, seeds: set[int]) -> Result:
    kept = tuple(s for s in result.seeds if s.seed in seeds)
    return dataclasses.replace(result, seeds=kept) if kept else result


def _relative_spread(row: Row, metric: str, published: TableResults) -> float | None:
    """Standard deviation over seeds, over the value; None where no row has two seeds."""
    alike = {
        other.id: std / abs(value)
        for other, result in published.done
        if other.bits == row.bits and other.dataset == row.dataset
        for value, std in [result.metric(metric)]
        if value and std is not None
    }
    if not alike:
        return None
    pooled = math.sqrt(statistics.fmean(spread**2 for spread in alike.values()))
    return max(pooled, alike.get(row.id, 0.0))
