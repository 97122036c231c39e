"""Tile sizes of the Triton product, chosen by timing at the first call of a shape class.

The choices are remembered on disk. `triton.autotune` does not serve here: a configuration with a
split reduction needs another grid and a buffer, so that what is timed and chosen is the whole
operator and not one launch; and the candidates depend on the estimate of
`fitting`, and on whether a CUDA graph is being captured.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from questlib.errors import StorageError
from questlib.files import atomic_path
from questlib.integer.triton import runtime

# Whether candidates are timed; otherwise the first that fits is taken.
TUNE = True


class Config(NamedTuple):
    """Of one launch of the product's kernel."""

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
MOST_SPLIT = 1024  # tiles of one product whose reductions are split
TRIALS = 6  # the candidates of least estimated time are timed
INTERPRETED = [Config(64, 64, 64, 4, 1), Config(64, 64, 32, 4, 1)]


class Gpu(NamedTuple):
    """What the choice of a tile depends on."""

    processors: int  # multiprocessors
    shared: int  # bytes of shared memory that a block can have
    wgmma: bool  # sm_90's products, whose operands take fewer registers

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """The GPU of a device."""
        has = torch.cuda.get_device_properties(device)
        return cls(has.multi_processor_count, has.shared_memory_per_block_optin, has.major == 9)


def serves(c: Config, o: int, packed: bool, gpu: Gpu) -> bool:
    """Whether a tile fits a multiprocessor: its shared memory, and the registers of its threads.

    Found by compiling them all (tests/gpu_emulation): more would spill. A split reduction takes
    more registers a value, and so do outputs that are no multiple of 16.

    Args:
        c: the tile.
        o: output channels.
        packed: whether a byte of w holds two codes.
        gpu: where it is to run.
    """
    most = 32 if o % 16 else 128 if gpu.wgmma else 64  # accumulators a thread
    if c.split > 1:
        most = min(most, 64)
    planes = 2 if packed else 1
    # Packed weights go through registers, and wait in one buffer less.
    buffers = c.stages * c.bm * planes + (c.stages - packed) * c.bn
    # In the end the int32 or float32 outputs are there instead.
    needed = max(buffers * c.bk, 4 * c.bm * c.bn)
    return c.bm * c.bn <= most * 32 * c.warps and needed <= gpu.shared


def fitting(
    m: int,
    o: int,
    span: int,
    taps: int,
    packed: bool,
    gpu: Gpu,
    longest: int = 128,
) -> list[Config]:
    """Candidates for a product, those of least estimated time first.

    Args:
        m: output pixels.
        o: output channels.
        span: bytes of w a tap.
        taps: of the window.
        packed: whether a byte of w holds two codes.
        gpu: where it is to run.
        longest: the largest `bk`.
    """
    planes = 2 if packed else 1  # bytes of a for one byte of w

    def tiles_of(c: Config) -> int:
        return -(-m // c.bm) * -(-o // c.bn)

    def cycles(c: Config) -> float:
        """The time of a wave of tiles: its steps, and then its stores.

        A step is bound by arithmetic (4096 products a cycle), by the L2 cache (28 bytes a cycle) or
        by latency. A split reduction leaves its shares in memory, and one program adds them up.
        """
        arithmetic = c.bm * c.bn * planes * c.bk / 4096
        cache = (c.bm * planes + c.bn) * c.bk / 28
        step = 60 + max(arithmetic, cache, 150)
        waves = -(-tiles_of(c) * c.split // gpu.processors)
        alone = min(64, 28 * gpu.processors / tiles_of(c))  # bytes a cycle of a tile's last program
        finish = 1500 + 4 * c.bm * c.bn * (1 / 28 + c.split / alone) if c.split > 1 else 0
        return waves * (taps * span / c.bk / c.split * step + 1500) + finish

    whole = [c for c in CANDIDATES if span % c.bk == 0 and c.bk <= longest]
    split = [c._replace(split=n) for c in whole for n in SPLITS if taps * span >= 4 * n * c.bk]
    split = [c for c in split if tiles_of(c) <= MOST_SPLIT]
    served = [c for c in whole + split if serves(c, o, packed, gpu)]
    return sorted(served, key=cycles)[:TRIALS]


def is_candidate(config: Config) -> bool:
    """Whether a configuration is one that the code chooses from."""
    return config._replace(split=1) in CANDIDATES and config.split in (1, *SPLITS)


class ConfigCache:
    """Chosen configurations by shape class, in the user's cache folder.

    There is one file for each GPU model, version of triton and version of the kernels.
    """

    def __init__(self) -> None:
        self.chosen: dict[str, Config] = {}
        self.path: Path | None = None
        self.about: dict[str, str] = {}  # what the choices are for

    def load(self) -> Path:
        """Read what earlier processes chose, and return the file's path."""
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
        # Other kernels are tuned anew.
        source = hashlib.sha256(Path(runtime.gemm_kernels.__file__).read_bytes()).hexdigest()[:8]
        version = runtime.triton.__version__
        path = root / "questlib" / f"triton-{version}-{source}-{gpu}.json"
        self.about = {"gpu": gpu, "triton": version, "kernels": source}
        self.chosen = self.stored(path) | self.chosen
        return path

    def stored(self, path: Path) -> dict[str, Config]:
        """What a file holds, nothing if there is none. A warning where it does not serve here."""
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (about := values["about"]) != self.about:
                raise ValueError(f"expected tiles of {self.about}, found {about}")
            found = {key: Config(*v) for key, v in values["tiles"].items()}
            if unknown := [c for c in found.values() if not is_candidate(c)]:
                raise ValueError(f"no such tile: {tuple(unknown[0])}")
            return found
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            warnings.warn(f"{path}: ignored ({error!r}); the kernels are tuned again", stacklevel=2)
            return {}

    def choose(
        self, key: str, candidates: Callable[[], list[Config]], run: Callable[[Config], object]
    ) -> Config:
        """The configuration of a shape class, timed when it is new.

        Args:
            key: of the shape class.
            candidates: gives the configurations to be timed.
            run: runs one of them.
        """
        if self.path is None:
            self.path = self.load()
        if key not in self.chosen:
            found = candidates()
            if len(found) == 1 or not TUNE or torch.cuda.is_current_stream_capturing():
                return found[0]
            self.chosen[key] = min(found, key=lambda c: self.seconds(c, run))
            self.save(self.path)
        return self.chosen[key]

    def seconds(self, config: Config, run: Callable[[Config], object]) -> float:
        """The median time of one configuration, infinite where the GPU is too small for it."""
        triton = runtime.triton
        try:
            return triton.testing.do_bench(
                lambda: run(config), warmup=2, rep=10, return_mode="median"
            )
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    def save(self, path: Path) -> None:
        """Write all choices, beside those that other processes have written since.

        A folder that cannot be written is no error.
        """
        self.chosen = self.stored(path) | self.chosen
        try:
            with atomic_path(path) as temporary:
                values = {"about": self.about, "tiles": self.chosen}
                temporary.write_text(json.dumps(values), encoding="utf-8")
        except StorageError as error:
            warnings.warn(
                f"{path}: not written ({error}); the next process tunes its kernels again",
                stacklevel=2,
            )


CACHE = ConfigCache()
