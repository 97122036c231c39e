"""How far the same seeds come out on another machine: a table's committed rows beside the rows of a second run of it.

    make reproduce-table2                                # on the other machine, in a clone of its own
    python benchmarks/machines.py CLONE/results [--table table2]

Each machine gives the same bits whenever it runs again. Another processor adds floats up in another order, and what is trained
from there on (AdaRound, finetuning) goes another way: no error, but a spread that the seeds of one machine do not show.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from questlib.errors import QuestError
from reproduce.provenance import ROOT
from reproduce.reporting import report

RESULT = Path(__file__).parent / "results" / "machines.json"
METRICS = ("fid", "feature_distance_to_fp")


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Values by row, seed and metric as [first, second]; `between_machines`, `between_seeds`: root mean squares of differences.

    Left out: full precision, where nothing is trained, and rows that a clone brought along. QuestError when nothing is left.
    """
    rows, of_machines, of_seeds = [], {m: [] for m in METRICS}, {m: [] for m in METRICS}
    for mine, other in zip(first, second, strict=True):
        if mine["preset"] is None or mine == other or {mine["status"], other["status"]} != {"done"}:
            continue
        pairs = {
            s["seed"]: [s, t]
            for s in mine["per_seed"]
            for t in other["per_seed"]
            if s["seed"] == t["seed"]
        }
        for seed, both in pairs.items():
            values = {m: [s["metrics"][m] for s in both] for m in METRICS}
            rows.append({"cell": mine["cell"], "seed": seed} | values)
            for m in METRICS:
                of_machines[m].append(values[m][0] - values[m][1])
        for run in (mine, other):
            for m in METRICS:
                values = [s["metrics"][m] for s in run["per_seed"] if s["seed"] in pairs]
                of_seeds[m] += [b - a for a, b in zip(values, values[1:], strict=False)]
    if not rows or not all(of_seeds.values()):
        raise QuestError(
            "machines: expected rows with two seeds or more, measured on both machines; found none"
        )
    spread = {
        name: {m: statistics.fmean(d * d for d in differences[m]) ** 0.5 for m in METRICS}
        for name, differences in (("between_machines", of_machines), ("between_seeds", of_seeds))
    }
    about = [
        next(r["provenance"] for r in run if r["cell"] == rows[0]["cell"])
        for run in (first, second)
    ]
    keep = ("commit", "dirty", "versions", "machine")
    return spread | {"runs": [{k: a[k] for k in keep} for a in about], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the other machine's results folder")
    parser.add_argument("--table", default="table2")
    args = parser.parse_args()
    found = compare(
        *(report.committed(args.table, folder)[1] for folder in (ROOT / "results", args.results))
    )
    RESULT.write_text(json.dumps({"table": args.table} | found, indent=1) + "\n")
    print(json.dumps({k: found[k] for k in ("between_machines", "between_seeds")}, indent=1))


if __name__ == "__main__":
    main()
