"""One row of a table, from the model to its result file."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from questlib.errors import QuestError
from questlib.files import atomic_path
from reproduce.kept_seeds import kept_result
from reproduce.plan import Plan
from reproduce.provenance import Provenance, provenance
from reproduce.results import Result, ResultError, SeedResult, Status
from reproduce.scales import FASTEST, SIMULATED
from reproduce.seed_run import PREVIEW_FILE, SeedRun
from reproduce.table_results import planned_conditions, readable_result, without_numbers
from reproduce.tables.base import Row


def is_current(row: Row, plan: Plan) -> bool:
    """Whether the row's stored result is what a run would make now.

    It is when its images are by this version, configuration and model (the artifacts' hashes) and
    were measured with files of these names. The score's hash does not count: it has the times of
    files, which each clone has anew.

    Where a run would draw by what is fastest, images that were simulated are current, too: the
    integers are those of the simulation, and the row's result names its engine.
    """
    stored = readable_result(row, plan)
    if not stored.done or plan.missing(row) is not None:
        return False
    plans = [plan, plan.choose(engine=SIMULATED)] if plan.engine == FASTEST else [plan]
    for number in plan.seeds:
        seed = stored.of_seed(number)
        runs = [SeedRun(row, each, number) for each in plans]
        would_make = [run.artifacts | {"evaluate": ""} for run in runs]
        if seed is None or seed.artifacts | {"evaluate": ""} not in would_make:
            return False
    return stored.conditions == planned_conditions(row, plan, runs[0].model_sha256)


def _provenance_of(runs: list[SeedRun], earlier: Result | None) -> tuple[Provenance, ...]:
    """That of the first seed's samples, then of the other artifacts, each once."""
    made = [p for run in runs for p in run.made]
    if earlier is not None:
        kept = list(earlier.provenance)
        first = earlier.seeds[0].seed < runs[0].seed
        made = kept + made if first else made + kept
    return tuple(p for i, p in enumerate(made) if p not in made[:i])


def _engines_of(seeds: list[SeedResult], earlier: Result | None) -> str:
    """What drew the images of all seeds; kept ones of before this was recorded: by their row."""
    recorded = None if earlier is None else earlier.engine
    return ", ".join(sorted({seed.engine or str(recorded) for seed in seeds}))


def _make_row(row: Row, plan: Plan) -> Result:
    """Make (or read) every seed, and copy the first one's picture beside the result."""
    runs = [SeedRun(row, plan, seed) for seed in plan.seeds]
    model = runs[0].model_sha256
    earlier = kept_result(row, plan, model)
    kept = () if earlier is None else earlier.seeds
    seeds = sorted((*kept, *(run.run() for run in runs)), key=lambda s: s.seed)
    if seeds[0].seed == runs[0].seed:
        with atomic_path(plan.folder / row.picture_file) as temporary:
            shutil.copyfile(runs[0].score.folder / PREVIEW_FILE, temporary)
    return Result(
        table=plan.table.name,
        row=row.id,
        scale=plan.scale.name,
        status=Status.DONE,
        engine=_engines_of(seeds, earlier),
        conditions=planned_conditions(row, plan, model),
        seeds=tuple(seeds),
        provenance=_provenance_of(runs, earlier),
        command=plan.command,
    )


def _has_numbers(path: Path) -> bool:
    """Whether a file holds a result with numbers, or something that cannot be read."""
    try:
        return path.is_file() and Result.read(path).done
    except ResultError:
        return True


def run_row(row: Row, plan: Plan) -> Result:
    """Make (or read) one row's numbers and write its result file.

    A row that fails with a QuestError, or for lack of GPU memory, has status "failed"; it does not
    replace an earlier result that has numbers.

    Returns:
        The result; with `plan.choices.stored` the one that its file holds. A damaged file is a
        failed row then.
    """
    if plan.choices.stored:
        return readable_result(row, plan)
    reason = plan.missing(row)
    if reason is not None:
        result = without_numbers(row, plan, Status.NOT_RUN, reason)
    else:
        try:
            result = _make_row(row, plan)
        except (QuestError, torch.OutOfMemoryError) as error:
            print(f"{row.id}: failed: {error}", file=sys.stderr)
            result = without_numbers(row, plan, Status.FAILED, str(error), (provenance(),))
    path = plan.row_file(row.id)
    if not result.done and _has_numbers(path):
        kept = "the earlier result is kept"
        print(f"{row.id}: {result.status}: {result.reason}; {kept}", file=sys.stderr)
    else:
        result.write(path)
    return result
