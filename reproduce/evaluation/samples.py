"""A folder of samples, written in shards by any number of processes, and read back in order.

    run.json                      what was asked for; a folder never mixes two runs
    000000-100.safetensors        samples 0..99: images uint8 [n, 3, H, W],
                                  latents float32 [n, C, h, w]
    000000-100.lock               held by the process that draws these samples

A lock ends with its process, however that ends. A shard gets its name when it is complete and on
the disk. The index ranges follow from the run alone, so that each sample is drawn in the same
batch, and has the same bits, whatever the number of processes and however often they were killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from tqdm import tqdm

from questlib.diffusion.drawing import Samples
from questlib.diffusion.sampling import index_ranges
from questlib.errors import QuestError, StorageError
from questlib.files import atomic_path
from questlib.integrity import (
    Known,
    check_digests,
    check_finite,
    fail_if_any,
    opened,
    with_digests,
)

KEPT = "finished shards are kept, the same command goes on from them"

# What a finished folder does not need: locks, and what killed processes were writing.
LEFT_OVER = ("*.lock", "*.safetensors.*.tmp", "run.json.*.tmp")


def shard_file(folder: Path, indices: range) -> Path:
    """Where the samples with these indices are kept."""
    return folder / f"{indices.start:06d}-{len(indices)}.safetensors"


def read_run(folder: str | Path) -> dict[str, Any]:
    """What run.json holds: num_samples, batch_size, seed, steps, labels or prompts, and so on.

    Raises:
        QuestError: there is none, or it is damaged.
    """
    path = Path(folder) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        counts = [run["num_samples"], run["batch_size"]]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise QuestError(
            f"{folder}: not a folder of samples: run.json cannot be read ({error!r})"
        ) from error
    if not all(type(count) is int and 0 < count < 2**40 for count in counts):
        raise QuestError(f"{path}: expected num_samples and batch_size from 1, found {counts}")
    return run


def read_samples(folder: str | Path) -> Iterator[Samples]:
    """The samples of a finished folder in the order of their indices, a shard at a time.

    Raises:
        QuestError: shards are missing (it says how many), damaged, or of another run.

    Example:
        >>> images = torch.cat([shard.images for shard in read_samples("runs/samples")])
    """
    folder = Path(folder)
    run = read_run(folder)
    # Counted first: a damaged number can ask for more shards than can be listed.
    count = -(-run["num_samples"] // run["batch_size"])
    missing = count - sum(1 for _ in folder.glob("*.safetensors"))
    if missing <= 0:
        ranges = index_ranges(run["num_samples"], run["batch_size"])
        shards = [shard_file(folder, indices) for indices in ranges]
        missing = sum(not shard.exists() for shard in shards)
    if missing > 0:
        raise QuestError(
            f"{folder}: not finished: {missing} of {count} shards are missing; "
            "sample again to go on"
        )
    for shard, indices in zip(shards, ranges, strict=True):
        with _opened(shard, _digest(run)) as (file, known):
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        check_digests(shard, tensors, known, DamagedShard)
        _check_samples(shard, tensors, len(indices))
        yield Samples(**tensors)


def write_samples(
    folder: str | Path,
    run: dict[str, Any],
    draw: Callable[[range], Samples],
    *,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = False,
) -> None:
    """Draw what `folder` lacks of `run`. Every process calls this; no messages pass between them.

    Process 0 returns when all shards are there, the others when nothing is left to begin. The
    shards of processes that died are taken over.

    Args:
        run: what decides the samples: num_samples, batch_size and more, as JSON can hold it.
        draw: gives the samples with these indices.

    Raises:
        QuestError: the folder holds another run, or cannot be written. Finished shards are kept,
            and the same call goes on from them.
    """
    folder = Path(folder)
    _open_run(folder, run)
    ranges = index_ranges(run["num_samples"], run["batch_size"])
    digest = _digest(run)
    own = ranges[process_index::num_processes]
    others = [indices for indices in ranges if indices not in own]
    # The own share first; then what the others have not begun; then, in process 0, what they have
    # begun and perhaps died of.
    todo = [(indices, False) for indices in own + others]
    if process_index == 0:
        todo += [(indices, True) for indices in ranges]
    for indices, wait in tqdm(todo, desc="sample", disable=not progress, mininterval=2):
        shard = shard_file(folder, indices)
        with _claimed(shard, wait) as is_mine:
            if is_mine:
                tensors = draw(indices)._asdict()
                _write(shard, save(tensors, with_digests(tensors, {"run": digest})))
    if process_index == 0:
        for indices in ranges:
            with _opened(shard_file(folder, indices), digest):
                pass
        _clean(folder)


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


class DamagedShard(QuestError):
    """A shard does not hold what was written."""

    def __init__(self, what: str) -> None:
        super().__init__(f"sampling: a damaged shard: {what}; remove it and sample again")


@contextmanager
def _opened(shard: Path, digest: str) -> Iterator[tuple[Any, Known]]:
    """A finished shard: it is of this run, and as long as its header says."""
    with opened(shard, DamagedShard) as (file, known):
        if known.about.get("run") != digest:
            raise QuestError(
                f"sampling: {shard} belongs to another run than the run.json beside it"
            )
        yield file, known


def _check_samples(shard: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """QuestError unless these are samples, as many as the shard has."""
    fail_if_any(
        shard,
        {
            "missing": {"images", "latents"} - tensors.keys(),
            "unexpected": tensors.keys() - {"images", "latents"},
        },
        DamagedShard,
    )
    images = tensors["images"]
    latents = tensors["latents"]
    fit = images.ndim == 4 and images.shape[:2] == (count, 3) and images.dtype == torch.uint8
    if not fit or latents.shape[:1] != (count,) or latents.dtype != torch.float32:
        raise DamagedShard(
            f"{shard}: expected {count} samples, uint8 images [n, 3, H, W] and float32 latents, "
            f"found {images.dtype} {list(images.shape)} and {latents.dtype} {list(latents.shape)}"
        )
    check_finite(shard, tensors, DamagedShard)


def _open_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json, or compare with the one that is there."""
    path = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Looked for before run.json: whoever writes shards has written run.json earlier.
        has_shards = any(folder.glob("*.safetensors"))
        if not path.exists():
            if has_shards:
                raise QuestError(
                    f"sampling: {folder} holds files of something else (no run.json); "
                    "name another folder"
                )
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(run), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"sampling: cannot write to {folder}: {error.strerror}") from error
    found = read_run(folder)
    asked = json.loads(json.dumps(run))
    differ = sorted(k for k in {*found, *asked} if found.get(k) != asked.get(k))
    if differ:
        what = "; ".join(
            f"{k}: expected {str(asked.get(k))[:60]}, found {str(found.get(k))[:60]}"
            for k in differ
        )
        raise QuestError(f"sampling: {folder} belongs to another run ({what})")


@contextmanager
def _claimed(shard: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of a shard that is to be drawn.

    False when the shard is finished, or when another process is at it and `wait` is off. The lock's
    file stays: were it removed, two processes could hold one lock each.
    """
    if shard.exists():
        yield False
        return
    lock = FileLock(shard.with_suffix(".lock"), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        raise QuestError(f"sampling: cannot lock {lock.lock_file} ({error})") from error
    try:
        # Before the lock was ours, another process may have finished the shard.
        yield not shard.exists()
    finally:
        lock.release()


def _write(shard: Path, data: bytes) -> None:
    """Write a shard, bring it to the disk, and only then give it its name."""
    with atomic_path(shard, KEPT) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _clean(folder: Path) -> None:
    """Remove what a finished folder does not need.

    Nobody begins a shard that is there, so that a lock can go although another process may have
    just opened it. Windows refuses to remove it then.
    """
    for pattern in LEFT_OVER:
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError, PermissionError):
                path.unlink()
