"""The result of benchmarks/gpu.py: what was measured, what is wrong, what failed, what is left out.

It is on disk after every row, so that a time limit loses nothing. The exit code follows from it.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import write_json

# Exit codes. Python itself ends with 1, argparse with 2.
FAILED = 1  # a section raised an exception
NO_GPU = 2
WRONG = 3  # a kernel's result is wrong, whatever else happened


class Report:
    """A result that is written as it grows.

    Attributes:
        data: the result. `skipped` lists what did not fit the budget, `errors` has the traceback of
            each section that failed, and `wrong` what each section found to be wrong.
    """

    def __init__(self, path: Path, budget: float) -> None:
        self.path = path
        self.end = time.monotonic() + budget
        self.data: dict[str, Any] = {"skipped": []}

    @property
    def left(self) -> float:
        """Seconds of the budget that are left, at least 0."""
        return max(0.0, self.end - time.monotonic())

    @property
    def code(self) -> int:
        """The program's exit code."""
        if self.data.get("wrong"):
            return WRONG
        return FAILED if self.data.get("errors") else 0

    def enough(self, what: str, seconds: float = 5.0) -> bool:
        """Whether `seconds` are left of the budget; if not, `what` is listed as skipped."""
        if seconds <= self.left:
            return True
        self.skip(what)
        return False

    def skip(self, *what: str) -> None:
        """List what is left out, once."""
        self.data["skipped"] += [x for x in what if x not in self.data["skipped"]]
        self.save()

    def add(self, section: str, *rows: dict[str, Any]) -> None:
        """Write and print rows of a section."""
        self.data.setdefault(section, []).extend(rows)
        self.save()
        for row in rows:
            print(f"{section}: {told(row)}", flush=True)

    def found_wrong(self, section: str, *lines: str) -> None:
        """Write what a section found to be wrong; nothing if there are no lines."""
        if lines:
            self.data.setdefault("wrong", {}).setdefault(section, []).extend(lines)
            self.save()

    def failed(self, what: str, why: str) -> None:
        """Write and print why something failed."""
        self.data.setdefault("errors", {})[what] = why
        self.save()
        print(f"{what}: {why}", file=sys.stderr, flush=True)

    def run(self, section: str, measure: Callable[[], None]) -> None:
        """Run a section, if there is time, and say how it ended.

        Whatever it raises, the next section may run: the traceback is printed and written.
        """
        skipped = len(self.data["skipped"])
        start = time.monotonic()
        if self.enough(section):
            try:
                measure()
            except Exception:  # noqa: BLE001
                self.failed(section, traceback.format_exc())
            seconds = round(time.monotonic() - start, 1)
            self.data.setdefault("section seconds", {})[section] = seconds
        self.save()
        print(self.ended(section, self.data["skipped"][skipped:]), flush=True)
        for line in self.data.get("wrong", {}).get(section, []):
            print(f"{section}: wrong: {line}", file=sys.stderr, flush=True)

    def ended(self, section: str, skipped: list[str]) -> str:
        """How a section ended, and what it left out."""
        words = [
            word
            for word, of in (("WRONG", "wrong"), ("FAILED", "errors"))
            if section in self.data.get(of, {})
        ]
        seconds = self.data.get("section seconds", {}).get(section, 0.0)
        said = " and ".join(words) or ("not complete" if skipped else "ok")
        return f"{section}: {said} ({seconds} s){''.join(f'; skipped: {x}' for x in skipped)}"

    def save(self) -> None:
        """Write the result."""
        write_json(self.path, self.data)


def told(row: dict[str, Any]) -> str:
    """A row's times, in one line."""
    seconds = row["seconds"]
    if isinstance(seconds, float):
        tiles = "tuned" if row["tuned"] else "estimated"
        return f"{row['model']}, {tiles} tiles, batch {row['batch']}: {seconds * 1e3:.2f} ms"
    times = "  ".join(f"{name} {s * 1e6:.1f}" for name, s in seconds.items())
    return f"{row['shape']}, batch {row['batch']} (us): {times}"


def machine() -> dict[str, Any]:
    """GPU, driver, clocks and versions: part of every result."""
    import torch
    import triton

    found = dict(
        torch=torch.__version__,
        triton=triton.__version__,
        python=sys.version.split()[0],
        when=time.strftime("%Y-%m-%d %H:%M"),
    )
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        ]
        try:
            smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            smi = f"nvidia-smi: {error}"
        found |= dict(
            gpu=p.name,
            processors=p.multi_processor_count,
            memory=p.total_memory,
            driver_and_clocks=smi,
        )
    return found
