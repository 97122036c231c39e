"""Seconds to calibrate, quantize and finetune a row's model, with our CPU kernels and without.

    python benchmarks/quantize_time.py [--row bedrooms-w4a4-quest] [--threads 1] [--repeats 2]

The row is one of Table 3 at `mini` scale. Nothing is read from a cache. Each run is a process of
its own; without kernels ($QUEST_NO_KERNELS) torch's operations do the same. The runs alternate
(A B B A ...). The error is that of the predicted noise on trajectories that were not calibrated on,
so that one sees whether the faster run gives the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser_of, run_worker, write_json
from held_out import SEED, TRAJECTORIES, error_db

import questlib
from questlib.denoisers import unet_of
from questlib.kernels.library import SWITCH
from reproduce.choices import Choices
from reproduce.models.loading import load_pipeline
from reproduce.plan import Plan, make_plan
from reproduce.provenance import provenance
from reproduce.tables.base import Row

RESULT = RESULTS / "quantize_time.json"
TABLE = "table3"
VARIANTS = ("kernels", "torch")


def plan_of(row: str) -> tuple[Plan, Row]:
    """The row and its plan. ConfigError for an unknown row."""
    plan = make_plan(TABLE, Choices(scale="mini", rows=(row,)), dry=True)
    return plan, plan.table.row(row)


def worker(name: str, threads: int) -> dict[str, Any]:
    """One run: seconds of each stage, and the error of what it gives."""
    torch.set_num_threads(threads)
    plan, row = plan_of(name)
    setting = plan.setting(row)
    config = plan.config(row, 0)
    pipe = load_pipeline(str(setting.model))
    how = vars(setting.sampling)
    start = time.perf_counter()
    calib = questlib.calibrate(pipe, setting.calib_samples, seed=0, **how)
    seconds = {"calibrate": time.perf_counter() - start}
    teacher = unet_of(pipe)
    unet = questlib.quantize(teacher, config, calib)
    seconds |= unet.quest_log["seconds"]
    start = time.perf_counter()
    questlib.finetune(unet, teacher, calib, config)
    seconds["finetune"] = time.perf_counter() - start
    held_out = questlib.calibrate(pipe, TRAJECTORIES, seed=SEED, **how)
    return {"seconds": seconds, "error_db": error_db(unet, held_out)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--row", default="bedrooms-w4a4-quest")
    parser.add_argument("--threads", type=int, default=1, help="of each run, as in `--jobs 2`")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", nargs=2, metavar=("ROW", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker[0], int(args.worker[1]))))
        return
    plan, row = plan_of(args.row)
    if row.full_precision:
        parser.error(f"--row: expected a quantized row, found {args.row}")
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for number in range(args.repeats):
        for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            environment = {k: v for k, v in os.environ.items() if k != SWITCH}
            if variant == "torch":
                environment[SWITCH] = "1"
            found = run_worker(__file__, args.row, str(args.threads), env=environment)
            runs[variant].append(found)
            print(variant, found, file=sys.stderr, flush=True)
    stages = runs["kernels"][0]["seconds"]
    result = {
        "command": f"python benchmarks/quantize_time.py --row {args.row}",
        "row": args.row,
        "bits": row.bits,
        "model": plan.setting(row).model,
        "threads": args.threads,
        "variants": {
            variant: {
                "seconds": {
                    stage: statistics.median(run["seconds"][stage] for run in found)
                    for stage in stages
                },
                "error_db": [run["error_db"] for run in found],
                "runs": found,
            }
            for variant, found in runs.items()
        },
        "provenance": provenance(),
    }
    write_json(args.out, result)


if __name__ == "__main__":
    main()
