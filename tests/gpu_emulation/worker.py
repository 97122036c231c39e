"""Emulate one choice of jobs for one GPU: `worker.py ARCH CHOICE`; a line of JSON for each job.

In a process of its own: the kernels must be imported without Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from driver import engine_on
from jobs import jobs_of
from machine_code import faults, row_of
from ptx import PtxError
from triton.runtime.errors import OutOfResources


def cpu_seconds() -> float:
    """Of this process and of the compilers that it ran."""
    return sum(os.times()[:4])


def main(arch: int, choice: str) -> None:
    """Run the jobs and print what was found."""
    torch.set_grad_enabled(False)
    driver, parts = engine_on(arch)
    for job in jobs_of(choice, parts.gpu):
        began = cpu_seconds()
        driver.launches.clear()
        parts.use(None)
        try:
            wrong = job.run(parts)
        except (PtxError, OutOfResources) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        kernels = {launch.binary.ptx: launch for launch in driver.launches}
        for launch in kernels.values():
            wrong += faults(launch, driver)
        row = dict(
            job=job.name,
            wrong=wrong,
            seconds=round(cpu_seconds() - began, 1),
            launches=len(driver.launches),
            kernels=[row_of(launch) for launch in kernels.values()],
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
