"""Seconds to calibrate, quantize and finetune a row's model, with our CPU kernels and without.

    python benchmarks/quantize_time.py [--row bedrooms-w4a4-quest] [--before CHECKOUT]

The row is one of Table 3 at `mini` scale. Nothing is read from a cache. Each run is a process of
its own; without kernels ($QUEST_NO_KERNELS) torch's operations do the same. `--before` times the
code of another checkout, too. The runs alternate (A B B A). The error is that of the predicted
noise on trajectories that were not calibrated on, so that one sees whether the faster run gives the
same model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, parser_of, write_json

from questlib.kernels.library import SWITCH
from reproduce.choices import Choices
from reproduce.plan import make_plan
from reproduce.provenance import provenance

RESULT = RESULTS / "quantize_time.json"
WORKER = Path(__file__).with_name("quantize_time_worker.py")


def run(row: str, threads: int, code: Path, kernels: bool) -> dict[str, Any]:
    """One run, in a process of its own.

    Args:
        code: the checkout whose packages are timed.
        kernels: whether they may use compiled kernels.
    """
    environment = {k: v for k, v in os.environ.items() if k != SWITCH}
    environment |= {"PYTHONPATH": str(code)} | ({} if kernels else {SWITCH: "1"})
    command = [sys.executable, str(WORKER), row, str(threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=code
    )
    if done.returncode:
        raise SystemExit(f"{row} in {code} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(code: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=code).stdout[:-1]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--row", default="bedrooms-w4a4-quest")
    parser.add_argument("--threads", type=int, default=1, help="of each run, as in `--jobs 2`")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--before", type=Path, help="a checkout of older code")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    plan = make_plan("table3", Choices(scale="mini", rows=(args.row,)), dry=True)
    row = plan.table.row(args.row)
    if row.full_precision:
        parser.error(f"--row: expected a quantized row, found {args.row}")
    variants = {"kernels": (ROOT, True), "torch": (ROOT, False)}
    if args.before is not None:
        variants["before"] = (args.before.resolve(), True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for number in range(args.repeats):
        for name in list(variants) if number % 2 == 0 else list(reversed(variants)):
            runs[name].append(run(args.row, args.threads, *variants[name]))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    result = {
        "command": f"python benchmarks/quantize_time.py --row {args.row}",
        "row": args.row,
        "bits": row.bits,
        "model": plan.setting(row).model,
        "threads": args.threads,
        "variants": {
            name: {
                "commit": commit_of(variants[name][0]),
                "seconds": {
                    stage: statistics.median(run["seconds"][stage] for run in found)
                    for stage in found[0]["seconds"]
                },
                "runs": found,
            }
            for name, found in runs.items()
        },
        "provenance": provenance(),
    }
    write_json(args.out, result)


if __name__ == "__main__":
    main()
