"""The results of a plan's rows, as its files have them or as a run would make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reproduce.datasets import DATASETS
from reproduce.plan import Plan
from reproduce.provenance import Provenance
from reproduce.results import IF_REPORTED, Conditions, Model, Result, ResultError, Status
from reproduce.tables.base import Row, Table
from reproduce.tables.methods import QUEST_PRESETS


def public_name(name: str) -> str:
    """The last part of a path; an embedded name or hub id as it is. No machine's folders."""
    return Path(name).name if Path(name).exists() else name


def planned_conditions(row: Row, plan: Plan, model_sha256: str | None = None) -> Conditions:
    """How a run would draw and measure the row now.

    Args:
        model_sha256: of the loaded model; None when none was loaded.
    """
    setting = plan.setting(row)
    model = None
    if model_sha256 is not None and setting.model is not None:
        model = Model(id=public_name(setting.model), sha256=model_sha256)
    clip = None if setting.captions is None else setting.clip.removeprefix("local-dir:")
    reference, captions, clip = (
        None if name is None else public_name(name)
        for name in (setting.reference, setting.captions, clip)
    )
    return Conditions(
        model=model,
        dataset=row.dataset,
        sampling=plan.drawing(row).sampling,
        samples_per_seed=setting.samples_per_seed,
        features=setting.features or plan.scale.features,
        reference=reference,
        captions=captions,
        clip=clip,
    )


def without_numbers(
    row: Row,
    plan: Plan,
    status: Status,
    reason: str,
    provenance: tuple[Provenance, ...] = (),
) -> Result:
    """The result of a row that was not run, or failed."""
    return Result(
        table=plan.table.name,
        row=row.id,
        scale=plan.scale.name,
        status=status,
        reason=reason,
        conditions=planned_conditions(row, plan),
        provenance=provenance,
        command=plan.command if provenance else None,
    )


def stored_result(row: Row, plan: Plan) -> Result:
    """The row as its file has it; without a file it is "not run", with the reason.

    Raises:
        ResultError: the file is damaged, or another row's.
    """
    path = plan.row_file(row.id)
    if not path.is_file():
        hint = f"not run yet: python -m reproduce {plan.table.name} --scale {plan.scale.name}"
        return without_numbers(row, plan, Status.NOT_RUN, plan.missing(row) or hint)
    result = Result.read(path)
    expected = f"{plan.table.name}, {row.id}, {plan.scale.name} scale"
    found = f"{result.table}, {result.row}, {result.scale} scale"
    if found != expected:
        raise ResultError(f"{path}: expected the result of {expected}; found that of {found}")
    return result


def readable_result(row: Row, plan: Plan) -> Result:
    """`stored_result`; a damaged file is a failed row, whose reason names the file."""
    try:
        return stored_result(row, plan)
    except ResultError as error:
        return without_numbers(row, plan, Status.FAILED, str(error))


@dataclass(frozen=True)
class TableResults:
    """The results of a whole table, in its order.

    Example:
        >>> for row, result in TableResults.stored(plan):
        ...     print(row.title, result.metric("fid").value)
    """

    plan: Plan
    results: Mapping[str, Result]
    """By row id."""

    @classmethod
    def stored(cls, plan: Plan, *, strict: bool = False) -> TableResults:
        """As the files of `plan` have them.

        Args:
            strict: ResultError for a damaged file; else its row has failed, and says so.
        """
        read = stored_result if strict else readable_result
        return cls(plan, {row.id: read(row, plan) for row in plan.table.rows})

    @property
    def table(self) -> Table:
        """The table as specified."""
        return self.plan.table

    def __iter__(self) -> Iterator[tuple[Row, Result]]:
        """Each row with its result."""
        return ((row, self.results[row.id]) for row in self.table.rows)

    def __len__(self) -> int:
        return len(self.table.rows)

    def __getitem__(self, row_id: str) -> Result:
        return self.results[row_id]

    def ordered(self) -> list[tuple[Row, Result]]:
        """The rows as they are shown: at each data set and bits ours first, then QuEST's others.

        Rows of a table that compares no methods stay in its order.
        """
        groups = list(dict.fromkeys((row.dataset, row.bits) for row in self.table.rows))
        others = set(QUEST_PRESETS.values())

        def place(found: tuple[Row, Result]) -> tuple[int, int]:
            row = found[0]
            rank = 0 if row.ours else 1 if row.label in others else 2
            return groups.index((row.dataset, row.bits)), rank

        compares = any(row.ours for row in self.table.rows)
        return sorted(self, key=place) if compares else list(self)

    @property
    def done(self) -> list[tuple[Row, Result]]:
        """Rows that have numbers."""
        return [(row, result) for row, result in self if result.done]

    @property
    def told(self) -> tuple[str, ...]:
        """Those of IF_REPORTED that the table tells: what the paper's table has, and in a table of
        our own the CLIP score of images from prompts."""
        rows = self.table.rows
        scored = not self.table.in_paper and any(DATASETS[r.dataset].has_captions for r in rows)
        found = {metric for row in rows for metric in row.paper if row.paper[metric] is not None}
        found |= {"clip_score"} if scored else set()
        return tuple(metric for metric in IF_REPORTED if metric in found)

    @property
    def full_precision(self) -> tuple[Row, Result] | None:
        """The first row in which nothing is quantized."""
        return next(((row, result) for row, result in self if row.full_precision), None)
