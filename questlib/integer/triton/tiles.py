"""Tile sizes of the Triton product, chosen by timing at the first call of a shape class.

What they are chosen from is a table for each architecture (`tile_table`). The choices are
remembered on disk. `triton.autotune` does not serve here: a configuration with a split reduction
needs another grid and a buffer, so that what is timed and chosen is the whole operator and not one
launch; and the candidates depend on the estimate of `fitting`, and on whether a CUDA graph is being
captured.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from questlib.errors import StorageError
from questlib.files import atomic_path
from questlib.integer.graph_capture import capturing
from questlib.integer.triton import runtime
from questlib.integer.triton.tile_table import Config, TileTable, table_of
from questlib.integrity import digest_of_json

# Whether candidates are timed; otherwise the first that fits is taken.
TUNE = True
SPLITS = (2, 4, 8)
MOST_SPLIT = 1024  # tiles of one product whose reductions are split
TRIALS = 6  # the candidates of least estimated time are timed
# What a damaged file of choices raises.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError)
INTERPRETED = [Config(64, 64, 64, 4, 1), Config(64, 64, 32, 4, 1)]


class Gpu(NamedTuple):
    """What the choice of a tile depends on."""

    processors: int  # multiprocessors
    shared: int  # bytes of shared memory that a block can have
    table: TileTable  # of its architecture

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        """The GPU of a device."""
        has = torch.cuda.get_device_properties(device)
        table = table_of((has.major, has.minor))
        return cls(has.multi_processor_count, has.shared_memory_per_block_optin, table)


def serves(c: Config, o: int, packed: bool, gpu: Gpu) -> bool:
    """Whether a tile fits a multiprocessor: its shared memory, and the registers of its threads.

    Args:
        c: the tile.
        o: output channels.
        packed: whether a byte of w holds two codes.
        gpu: where it is to run.
    """
    planes = 2 if packed else 1
    # Packed weights go through registers, and wait in one buffer less.
    buffers = c.stages * c.bm * planes + (c.stages - packed) * c.bn
    # In the end the int32 or float32 outputs are there instead.
    needed = max(buffers * c.bk, 4 * c.bm * c.bn)
    return gpu.table.holds(c, o) and needed <= gpu.shared


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

    whole = [c for c in gpu.table.tiles if span % c.bk == 0 and c.bk <= longest]
    split = [c._replace(split=n) for c in whole for n in SPLITS if taps * span >= 4 * n * c.bk]
    split = [c for c in split if tiles_of(c) <= MOST_SPLIT]
    served = [c for c in whole + split if serves(c, o, packed, gpu)]
    return sorted(served, key=cycles)[:TRIALS]


class ConfigCache:
    """Chosen configurations by shape class, in the user's cache folder.

    There is one file for each GPU model, version of triton and version of the kernels.
    """

    def __init__(self) -> None:
        self.chosen: dict[str, Config] = {}
        self.path: Path | None = None
        self.about: dict[str, str] = {}  # what the choices are for
        self.known: tuple[Config, ...] = ()  # what could have been chosen there

    def load(self) -> Path:
        """Read what earlier processes chose, and return the file's path."""
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
        # Other kernels are tuned anew.
        source = hashlib.sha256(Path(runtime.gemm_kernels.__file__).read_bytes()).hexdigest()[:8]
        version = runtime.triton.__version__
        path = root / "questlib" / f"triton-{version}-{source}-{gpu}.json"
        self.about = {"gpu": gpu, "triton": version, "kernels": source}
        whole = table_of(torch.cuda.get_device_capability()).tiles
        self.known = tuple(c._replace(split=n) for c in whole for n in (1, *SPLITS))
        self.chosen = self.stored(path) | self.chosen
        return path

    def stored(self, path: Path) -> dict[str, Config]:
        """What a file holds, nothing if there is none. A warning where it does not serve here."""
        if not path.exists():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("digest") != digest_of_json(values):
                raise ValueError("not what was saved")
            if (about := values["about"]) != self.about:
                raise ValueError(f"expected tiles of {self.about}, found {about}")
            found = {key: Config(*v) for key, v in values["tiles"].items()}
            if unknown := [c for c in found.values() if c not in self.known]:
                raise ValueError(f"no such tile: {tuple(unknown[0])}")
            return found
        except DAMAGE as error:
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
            if len(found) == 1 or not TUNE or capturing():
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
                values: dict[str, Any] = {"about": self.about, "tiles": self.chosen}
                values["digest"] = digest_of_json(values)
                temporary.write_text(json.dumps(values), encoding="utf-8")
        except StorageError as error:
            warnings.warn(
                f"{path}: not written ({error}); the next process tunes its kernels again",
                stacklevel=2,
            )


CACHE = ConfigCache()
