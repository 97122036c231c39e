"""A folder of what the stages of post-training quantization made, so that runs can share it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from questlib.errors import CheckpointError
from questlib.integrity import Tensors, check_like, read_tensors, write_tensors
from questlib.versions import STAGE_VERSIONS

SECONDS = "seconds"  # a file's tensor beside those of its stage

SAVE_SECONDS = 20.0  # between two savings of a part's work that has begun


class Filled(NamedTuple):
    """How tensors were filled."""

    seconds: float
    """Time that computing them took: now, or when the file was written."""
    cached: bool
    """Whether they were read from a file."""
    record: Any
    """What the computation reported, as JSON holds it."""


class Unfinished:
    """The state of work that has begun: a file that is written again every `SAVE_SECONDS`.

    Args:
        path: the file; None: nothing is kept.
        model: digest of the full-precision model; see `StageCache`.
    """

    def __init__(self, path: Path | None = None, model: str | None = None) -> None:
        self.path = path
        self.model = model
        self.seconds_before = 0.0
        """Time that the stopped run took to come to the state that was loaded."""
        self._start = self._saved = time.perf_counter()

    def load(self, like: Tensors) -> Tensors | None:
        """The tensors that a stopped run left, or None.

        Args:
            like: tensors of the names, shapes and types that they must have.

        Raises:
            CheckpointError: the file cannot be read, or does not fit.
        """
        if self.path is None or not self.path.exists():
            return None
        found, self.seconds_before, _ = _open(self.path, self.model)
        try:
            check_like(self.path, found, like)
        except CheckpointError as error:
            raise _damaged(error) from error
        return found

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and time.perf_counter() - self._saved >= SAVE_SECONDS

    def save(self, tensors: Tensors) -> None:
        """Write the file."""
        if self.path is not None:
            seconds = self.seconds_before + time.perf_counter() - self._start
            _write(self.path, tensors, Filled(seconds, False, None), self.model)
            self._saved = time.perf_counter()

    def remove(self) -> None:
        """Remove the file: the work is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Parts:
    """Finished parts of a stage, a file each, so that a stopped stage goes on after the last one.

    A long part can keep the state of its work, too, in a file beside its own.

    Args:
        folder: where the files are; None: nothing is kept.
        model: digest of the full-precision model; see `StageCache`.
    """

    def __init__(self, folder: Path | None = None, model: str | None = None) -> None:
        self.folder = folder
        self.model = model
        self.seconds_before = 0.0
        """Time that the parts took which were read from files."""

    def fill(
        self, name: str, tensors: dict[str, torch.Tensor], compute: Callable[[Unfinished], Any]
    ) -> Filled:
        """Fill `tensors` in place: from the part's file, or by `compute`, and then write the file.

        Args:
            name: of the part.
            tensors: those that `compute` writes to.
            compute: does the part's work, and may keep its state; returns what it reports, in
                values that JSON holds.

        Raises:
            CheckpointError: the file cannot be read, or does not fit.
        """
        if self.folder is None:
            return computed(lambda: compute(Unfinished()))
        path = self._path(self.folder, name)
        if path.exists():
            filled = _read(path, tensors, self.model)
            self.seconds_before += filled.seconds
            return filled
        unfinished = Unfinished(self._path(self.folder, f"{name}.unfinished"), self.model)
        filled = computed(lambda: compute(unfinished))
        filled = filled._replace(seconds=filled.seconds + unfinished.seconds_before)
        self.seconds_before += unfinished.seconds_before
        _write(path, tensors, filled, self.model)
        unfinished.remove()
        return filled

    def keep(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors of a part: from its file, or by `compute`, and then write the file.

        Args:
            name: of the part.
            compute: does the part's work; returns tensors whose shapes may follow from it.

        Raises:
            CheckpointError: the file cannot be read, or is of another model.
        """
        if self.folder is None:
            return compute()
        path = self._path(self.folder, name)
        if path.exists():
            tensors, seconds, _ = _open(path, self.model)
            self.seconds_before += seconds
            return tensors
        done = computed(compute)
        _write(path, done.record, done._replace(record=None), self.model)
        return done.record

    def remove(self) -> None:
        """Remove all parts: the stage is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"


class StageCache:
    """Results of stages, one file each.

    A file is named by its stage, the version of the stage's numbers, the key of the choices that
    decide them, and the calibration. While a stage is computed, its finished parts stand in a
    folder of that name.

    Args:
        folder: where the files are; None: nothing is cached, everything is computed.
        calibration: `Calibration.hash()` of the run.
        model: digest of the full-precision model; a file of another one is refused. Files of
            before do not name theirs.
    """

    def __init__(self, folder: str | Path | None, calibration: str, model: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.calibration = calibration
        self.model = model

    def fill(
        self,
        stage: str,
        key: str,
        tensors: dict[str, torch.Tensor],
        compute: Callable[[Parts], Any],
    ) -> Filled:
        """Fill `tensors` in place: from the stage's file, or by `compute`, and then write the file.

        Another process that wants the same file waits until it is there.

        Args:
            stage: a name in `STAGE_VERSIONS`.
            key: digest of the choices that decide the result (`QuantConfig.range_key`).
            tensors: those that `compute` writes to, by the names that the file gives them.
            compute: does the stage's work, and may keep finished parts of it; returns what it
                reports, in values that JSON holds.

        Raises:
            CheckpointError: a file cannot be read, or does not fit.
        """
        if self.folder is None:
            return computed(lambda: compute(Parts()))
        name = f"{stage}-v{STAGE_VERSIONS[stage]}-{key}-{self.calibration}"
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.exists():
                return _read(path, tensors, self.model)
            parts = Parts(self.folder / name, self.model)
            filled = computed(lambda: compute(parts))
            filled = filled._replace(seconds=filled.seconds + parts.seconds_before)
            _write(path, tensors, filled, self.model)
            parts.remove()
        return filled


def computed(compute: Callable[[], Any]) -> Filled:
    """Run `compute`: the time it took, and what it returned."""
    start = time.perf_counter()
    record = compute()
    return Filled(time.perf_counter() - start, False, record)


def _write(path: Path, tensors: dict[str, torch.Tensor], filled: Filled, model: str | None) -> None:
    seconds = torch.tensor(filled.seconds, dtype=torch.float64)
    about = {"record": json.dumps(filled.record)} | ({} if model is None else {"model": model})
    write_tensors(path, {**tensors, SECONDS: seconds}, about)


def _read(path: Path, tensors: dict[str, torch.Tensor], model: str | None) -> Filled:
    """Copy a file's values into `tensors`, once it is clear that all of them fit."""
    found, seconds, record = _open(path, model)
    try:
        check_like(path, found, tensors)
    except CheckpointError as error:
        raise _damaged(error) from error
    for name, tensor in tensors.items():
        tensor.copy_(found[name])
    return Filled(seconds, True, record)


def _open(path: Path, model: str | None) -> tuple[Tensors, float, Any]:
    """A file's tensors, seconds and record. CheckpointError where it is of another model."""
    try:
        found, about = read_tensors(path)
        seconds = found.pop(SECONDS, torch.tensor([]))
        check_like(path, {SECONDS: seconds}, {SECONDS: torch.empty((), dtype=torch.float64)})
        record = json.loads(about.get("record", "null"))
    except (CheckpointError, ValueError, RecursionError) as error:
        raise _damaged(error) from error
    if about.get("model", model) != model:
        raise CheckpointError(
            f"quantize: {path} is of another model (weights {about['model']}); name another folder"
        )
    return found, float(seconds), record


def _damaged(error: Exception) -> CheckpointError:
    return CheckpointError(f"quantize: {error}; remove it to make it again")
