"""A section of benchmarks/gpu.py in several processes, each with its share.

Most of a first run goes into compiling: one process a core. Kernels go into Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_report import WRONG, Report

COMMAND = Path(__file__).with_name("gpu.py")
GRACE = 20.0  # seconds that a process has after the budget
LAST_WORDS = 2000  # characters of a log


class ShardError(RuntimeError):
    """A process has failed. The message has the end of its log."""


class Shards(NamedTuple):
    """What several processes made of a section."""

    results: list[dict[str, Any]]  # of those that wrote one
    failures: list[str]  # how others ended, each with the end of its log

    def check(self) -> None:
        """Check that all processes ended well.

        Raises:
            ShardError: some have not.
        """
        if self.failures:
            raise ShardError("\n\n".join(self.failures))


def run_shards(
    report: Report, section: str, n: int | None = None, flags: tuple[str, ...] = ()
) -> Shards:
    """Run a section in n processes, each its share, within the budget that is left.

    What a process skips is skipped in the report.

    Args:
        report: the result of this process.
        section: its name.
        n: processes; None: one a core, but at most 12.
        flags: other options of the command.
    """
    n = n or max(1, min(12, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outs = [Path(folder) / f"{i}.json" for i in range(n)]
        logs = [stack.enter_context(open(out.with_suffix(".log"), "w+")) for out in outs]
        command = [sys.executable, str(COMMAND), "--sections", section, *flags]
        running = []
        for i, (out, log) in enumerate(zip(outs, logs, strict=True)):
            own = ["--shard", f"{i}/{n}", "--out", str(out), "--budget", str(report.left)]
            process = subprocess.Popen(
                [*command, *own],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            stack.callback(process.kill)  # nothing, where it has ended
            running.append(process)
        end = time.monotonic() + report.left + GRACE
        results, failures = [], []
        for i, (process, out, log) in enumerate(zip(running, outs, logs, strict=True)):
            how = _ended(process, end - time.monotonic())
            data = json.loads(out.read_text()) if out.exists() else {}
            if data:
                results.append(data)
                report.skip(*data["skipped"])
            if how is None and not data:
                how = "wrote no result"
            if how is not None or "errors" in data:
                log.seek(0)
                how = how or "failed beside a wrong result"
                failures.append(
                    f"process {i} of {n} of section {section} {how}:\n{log.read()[-LAST_WORDS:]}"
                )
    return Shards(results, failures)


def _ended(process: subprocess.Popen, seconds: float) -> str | None:
    """How a process ended, within so many seconds; None: as it should."""
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "did not end within the budget"
    return None if code in (0, WRONG) else f"ended with code {code}"
