"""Where a number comes from: commit, versions, machine; and the memory that a stage needs."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "torch-fidelity", "safetensors", "numpy", "questlib")


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def processors(made: Iterable[Mapping[str, Any]]) -> list[str]:
    """The processors that products were made on, by the provenance of each."""
    return sorted({p["machine"]["cpu"] for p in made if "machine" in p})


def row_processors(result: Mapping[str, Any]) -> list[str]:
    """Those of a whole row."""
    made = result.get("provenance") or {}
    return processors((made, *made.get("others", ())))


@cache
def provenance() -> dict[str, Any]:
    """Commit and versions. `dirty` looks at the code alone: results and notebooks change while a table runs."""
    changed = _git("status", "--porcelain", "--", "questlib", "reproduce")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in PACKAGES},
        "machine": machine(),
    }


@cache
def machine() -> dict[str, Any]:
    """The machine in words that do not name it: processor, cores, memory, accelerators."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu
        )
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.system(),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpus,
    }


class PeakMemory:
    """Context: `.bytes` is the largest rise while inside, of resident memory (CPU) or of allocated GPU memory (CUDA)."""

    def __init__(self, interval: float = 0.02):
        self.bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._process = psutil.Process()

    def _rss(self) -> int:
        return self._process.memory_info().rss

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.bytes = max(self.bytes, self._rss() - self._start)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(
                0
            )  # otherwise memory freed by earlier cells hides what this one needs
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._cuda_start = torch.cuda.memory_allocated()
        self._start = self._rss()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, self._rss() - self._start)
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._cuda_start
