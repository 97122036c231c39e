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
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NotRequired  # pydantic needs it before Python 3.12

import psutil
import torch
from typing_extensions import TypedDict

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "torch-fidelity", "safetensors", "numpy", "questlib")


class Machine(TypedDict):
    """A machine in words that do not name it."""

    system: str
    cpu: str
    cores: int | None
    memory_gib: int
    gpus: list[str]


class Provenance(TypedDict):
    """Where a number comes from."""

    commit: str | None
    dirty: bool | None
    """Whether the code had changes beside the commit; None without git or a repository."""

    versions: dict[str, str]
    machine: Machine
    threads: NotRequired[int]
    """Of a CPU, on which the last bits depend; results of before do not tell."""


def _git(*arguments: str) -> str | None:
    """What git prints about this package's folder; None without git, or where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _is_repository() -> bool:
    """Whether git's repository is this package's own, not one that a copy of it lies in."""
    top = _git("rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == ROOT


def processors(made: Iterable[Provenance]) -> tuple[str, ...]:
    """The processors that artifacts were made on, by the provenance of each."""
    return tuple(sorted({p["machine"]["cpu"] for p in made}))


def provenance() -> Provenance:
    """Commit, versions and machine of this process, and the CPU threads it computes with now."""
    return {**_of_process(), "threads": torch.get_num_threads()}


@cache
def _of_process() -> Provenance:
    """`dirty` looks at the code alone: results and notebooks change while a table runs."""
    own = _is_repository()
    changed = _git("status", "--porcelain", "--", "questlib", "reproduce") if own else None
    python = {"python": platform.python_version()}
    return {
        "commit": _git("rev-parse", "HEAD") if own else None,
        "dirty": None if changed is None else bool(changed),
        "versions": python | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": machine(),
    }


@cache
def machine() -> Machine:
    """Processor, cores, memory and accelerators of this machine."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        cpu = next(names, cpu)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.system(),
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


class PeakMemory:
    """Measures memory inside a `with` block.

    `.bytes` is the largest rise, of resident memory (CPU) or of allocated GPU memory (CUDA).
    """

    def __init__(self, interval: float = 0.02) -> None:
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
            # Otherwise memory that earlier rows freed hides what this one needs.
            ctypes.CDLL(None).malloc_trim(0)
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
