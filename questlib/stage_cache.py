"""A folder of what the stages of post-training quantization made, so that runs can share it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from questlib.errors import CheckpointError
from questlib.files import atomic_path
from questlib.versions import STAGE_VERSIONS


class Filled(NamedTuple):
    """How `StageCache.fill` filled the tensors."""

    seconds: float
    """Time that computing them took: now, or when the cached file was written."""
    cached: bool
    """Whether they were read from the cache."""


class StageCache:
    """Results of stages, one file each.

    A file is named by its stage, the version of the stage's numbers, the key of the choices that
    decide them, and the calibration.

    Args:
        folder: where the files are; None: nothing is cached, everything is computed.
        calibration: `Calibration.hash()` of the run.
    """

    def __init__(self, folder: str | Path | None, calibration: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.calibration = calibration

    def fill(
        self, stage: str, key: str, tensors: dict[str, torch.Tensor], compute: Callable[[], None]
    ) -> Filled:
        """Fill `tensors` in place: from the stage's file, or by `compute`, and then write the file.

        Another process that wants the same file waits until it is there.

        Args:
            stage: a name in `STAGE_VERSIONS`.
            key: digest of the choices that decide the result (`QuantConfig.range_key`).
            tensors: those that `compute` writes to, by the names that the file gives them.
            compute: does the stage's work.

        Raises:
            CheckpointError: the file cannot be read, or does not fit.
        """
        if self.folder is None:
            return Filled(seconds_of(compute), False)
        name = f"{stage}-v{STAGE_VERSIONS[stage]}-{key}-{self.calibration}.safetensors"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return Filled(_read(path, tensors), True)
            seconds = seconds_of(compute)
            kept = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
            kept["seconds"] = torch.tensor(seconds, dtype=torch.float64)
            with atomic_path(path) as temporary:
                save_file(kept, temporary)
        return Filled(seconds, False)


def seconds_of(compute: Callable[[], None]) -> float:
    """Run `compute` and return the time it took."""
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def _read(path: Path, tensors: dict[str, torch.Tensor]) -> float:
    """Copy a file's values into `tensors`; returns the seconds that computing them took."""
    try:
        kept = load_file(path)
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
        return float(kept["seconds"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"quantize: {path} cannot be read ({error!r}); remove it to make it again"
        ) from error
