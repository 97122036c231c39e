"""Tile sizes of the Triton kernels: candidates, chosen by timing at the first call of a shape class, remembered on disk."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    from questlib.integer.triton import attention_kernels, kernels
except ImportError:  # CPU builds of torch come without triton
    triton = kernels = attention_kernels = None

# the interpreter must be chosen before triton is first imported: its own library functions are decorated then
INTERPRET = (
    triton is not None
    and not isinstance(kernels.gemm, triton.JITFunction)
    and not isinstance(tl.zeros, triton.JITFunction)
)
TUNE = True  # time the candidates at the first call of a shape class; False: the first candidate that fits


class Config(NamedTuple):
    bm: int  # output pixels a tile
    bn: int  # output channels a tile
    bk: int  # bytes of w a step
    warps: int
    stages: int
    split: int = 1  # programs that share one tile's reduction


CANDIDATES = [
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(256, 128, 128, 8, 3),
    Config(128, 128, 128, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 64, 4, 4),
    Config(128, 64, 64, 4, 4),
    Config(64, 128, 128, 8, 3),
    Config(64, 64, 128, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(32, 64, 64, 4, 5),
    Config(16, 64, 128, 4, 4),
    Config(16, 64, 64, 4, 5),
    Config(128, 256, 32, 8, 4),
    Config(256, 128, 32, 8, 4),
    Config(128, 128, 32, 8, 5),
    Config(128, 64, 32, 4, 5),
    Config(64, 64, 32, 4, 5),
    Config(16, 64, 32, 4, 5),
]
SPLITS = (2, 4, 8)
TRIALS = 6  # the candidates of least estimated time are timed
INTERPRETED = [Config(64, 64, 64, 4, 1), Config(64, 64, 32, 4, 1)]


def fitting(
    m: int, o: int, span: int, taps: int, packed: bool, sms: int, bk: int = 128
) -> list[Config]:
    """Candidates for m pixels and o channels, best estimates first. sms: the GPU's multiprocessors; bk: the longest step."""
    planes = 2 if packed else 1  # bytes of a for one byte of w

    def cycles(c: Config) -> float:
        """A wave of tiles: its steps, bound by arithmetic (4096 products a cycle), by the L2 cache (28 bytes) or by latency, then
        its stores; a split reduction adds to memory and needs a second kernel."""
        step = 60 + max(c.bm * c.bn * planes * c.bk / 4096, (c.bm * planes + c.bn) * c.bk / 28, 150)
        waves = -(-(-(-m // c.bm) * -(-o // c.bn) * c.split) // sms)
        store = 1500 + (c.bm * c.bn / 4 if c.split > 1 else 0)
        return waves * (taps * span / c.bk / c.split * step + store) + (
            3000 + m * o / 300 if c.split > 1 else 0
        )

    whole = [c for c in CANDIDATES if span % c.bk == 0 and c.bk <= bk]
    split = [c._replace(split=n) for c in whole for n in SPLITS if taps * span >= 4 * n * c.bk]
    return sorted(whole + split, key=cycles)[:TRIALS]


class ConfigCache:
    """Chosen configurations by shape class, kept in the user's cache folder, one file for each GPU model, triton and kernels."""

    def __init__(self) -> None:
        self.chosen: dict[str, Config] = {}
        self.path: Path | None = None

    def load(self) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
        source = hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()[
            :8
        ]  # other kernels are tuned anew
        self.path = root / "questlib" / f"triton-{triton.__version__}-{source}-{gpu}.json"
        if self.path.exists():
            try:
                self.chosen = {
                    key: Config(*values)
                    for key, values in json.loads(self.path.read_text()).items()
                } | self.chosen
            except (ValueError, TypeError, AttributeError) as error:
                warnings.warn(
                    f"{self.path}: not readable ({error}); the kernels are tuned again",
                    stacklevel=2,
                )

    def choose(
        self, key: str, candidates: Callable[[], list[Config]], run: Callable[[Config], object]
    ) -> Config:
        if self.path is None:
            self.load()
        if key not in self.chosen:
            found = candidates()
            if len(found) == 1 or not TUNE or torch.cuda.is_current_stream_capturing():
                return found[0]
            self.chosen[key] = min(found, key=lambda c: self.seconds(c, run))
            self.save()
        return self.chosen[key]

    def seconds(self, config: Config, run: Callable[[Config], object]) -> float:
        try:
            return triton.testing.do_bench(
                lambda: run(config), warmup=2, rep=10, return_mode="median"
            )
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    def save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(self.chosen))
            draft.replace(self.path)
        except OSError as error:
            warnings.warn(
                f"{self.path}: not written ({error}); the next process tunes its kernels again",
                stacklevel=2,
            )


CACHE = ConfigCache()
