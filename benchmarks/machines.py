"""How far the same seeds come out on another machine: committed rows beside a second run's.

    make reproduce-table2    # on the other machine, in a clone of its own
    python benchmarks/machines.py CLONE/results [--table table2]

Each machine gives the same bits whenever it runs again. Another processor adds floats up in
another order, and what is trained from there on (AdaRound, finetuning) goes another way: no error,
but a spread that the seeds of one machine do not show.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS, parser_of, write_json

from questlib.errors import QuestError
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.results import Result
from reproduce.table_results import TableResults

RESULT = RESULTS / "machines.json"
METRICS = ("fid", "feature_distance_to_fp")


def compare(first: TableResults, second: TableResults) -> dict[str, Any]:
    """How far the values of two runs of a table lie apart.

    Left out are full precision, where nothing is trained, and rows that a clone brought along.

    Returns:
        Values by row, seed and metric as [first, second]; `between_machines` and `between_seeds`,
        root mean squares of differences; the provenance of both runs.

    Raises:
        QuestError: nothing is left to compare.
    """
    rows: list[dict[str, Any]] = []
    of_machines: dict[str, list[float]] = {m: [] for m in METRICS}
    of_seeds: dict[str, list[float]] = {m: [] for m in METRICS}
    runs: list[tuple[Result, Result]] = []
    for row, mine in first:
        other = second[row.id]
        if row.full_precision or mine == other or not (mine.done and other.done):
            continue
        pairs = [(s, t) for s in mine.seeds if (t := other.of_seed(s.seed)) is not None]
        runs += [(mine, other)] if pairs else []
        for s, t in pairs:
            values = {m: [s.metrics[m], t.metrics[m]] for m in METRICS}
            rows.append({"row": row.id, "seed": s.seed} | values)
            for m in METRICS:
                of_machines[m].append(values[m][0] - values[m][1])
        for seeds in zip(*pairs, strict=True):
            for m in METRICS:
                of_run = [s.metrics[m] for s in seeds]
                of_seeds[m] += [b - a for a, b in zip(of_run, of_run[1:], strict=False)]
    if not rows or not all(of_seeds.values()):
        raise QuestError(
            "machines: expected rows with two seeds or more, measured on both machines; found none"
        )
    return {
        "between_machines": {m: _root_mean_square(of_machines[m]) for m in METRICS},
        "between_seeds": {m: _root_mean_square(of_seeds[m]) for m in METRICS},
        "runs": [run.provenance[0] for run in runs[0]],
        "rows": rows,
    }


def _root_mean_square(differences: list[float]) -> float:
    return statistics.fmean(d * d for d in differences) ** 0.5


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("results", type=Path, help="the other machine's results folder")
    parser.add_argument("--table", default="table2")
    args = parser.parse_args()
    here = report.committed(args.table, ROOT / "results")
    found = compare(here, report.committed(args.table, args.results))
    write_json(RESULT, {"table": args.table} | found)
    print(json.dumps({k: found[k] for k in ("between_machines", "between_seeds")}, indent=1))


if __name__ == "__main__":
    main()
