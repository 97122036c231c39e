"""One run of `quantize_time.py`: prints the seconds of each stage, and the error of what it gives.

    python benchmarks/quantize_time_worker.py ROW THREADS

It takes questlib and reproduce from $PYTHONPATH, so that it can time another checkout, too. Hence
it uses only what older versions have.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from held_out import SEED, TRAJECTORIES, error_db

import questlib
from reproduce.choices import Choices
from reproduce.models.loading import load_pipeline
from reproduce.plan import make_plan


def run(name: str) -> dict[str, Any]:
    """Seconds of each stage of a row of Table 3 at mini scale, and the error of the result."""
    plan = make_plan("table3", Choices(scale="mini", rows=(name,)), dry=True)
    row = plan.table.row(name)
    setting = plan.setting(row)
    config = plan.config(row, 0)
    pipe = load_pipeline(str(setting.model))
    how = vars(setting.sampling)
    start = time.perf_counter()
    calib = questlib.calibrate(pipe, setting.calib_samples, seed=0, **how)
    seconds = {"calibrate": time.perf_counter() - start}
    unet = questlib.quantize(pipe.unet, config, calib)
    seconds |= unet.quest_log["seconds"]
    start = time.perf_counter()
    questlib.finetune(unet, pipe.unet, calib, config)
    seconds["finetune"] = time.perf_counter() - start
    held_out = questlib.calibrate(pipe, TRAJECTORIES, seed=SEED, **how)
    return {"seconds": seconds, "error_db": error_db(unet, held_out)}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(run(sys.argv[1])))
