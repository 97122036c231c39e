"""A folder of samples, written in shards of fixed index ranges by any number of processes, and read back in order.

    run.json                      what was asked for; a folder never mixes two runs
    000000-100.safetensors        samples 0..99: images uint8 [n, 3, H, W], latents float32 [n, C, h, w]
    000000-100.part               being written; the writer holds a lock on it, which ends with its process, however that ends

A shard gets its name when it is complete and on the disk. The ranges follow from the run alone, so each sample is drawn in the
same batch, and has the same bits, whatever the number of processes and however often they were killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from questlib.diffusion.sampling import index_ranges
from questlib.errors import QuestError


class Samples(NamedTuple):
    images: torch.Tensor  # uint8 [N, 3, H, W]
    latents: torch.Tensor  # float32 [N, C, h, w], before decoding


def shard_file(folder: Path, indices: range) -> Path:
    return folder / f"{indices.start:06d}-{len(indices)}.safetensors"


def read_run(folder: str | Path) -> dict[str, Any]:
    """run.json: num_samples, batch_size, seed, steps, labels or prompts, and so on. QuestError when there is none."""
    try:
        return json.loads((Path(folder) / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise QuestError(
            f"{folder}: not a folder of samples: run.json cannot be read ({error})"
        ) from error


def _digest(run: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


@contextmanager
def _opened(shard: Path, digest: str) -> Iterator[Any]:
    """A finished shard, checked: whole (safetensors compares header and file size), and of this run."""
    try:
        with safe_open(shard, "pt") as f:
            if (f.metadata() or {}).get("run") != digest:
                raise QuestError(
                    f"sampling: {shard} belongs to another run than the run.json beside it"
                )
            yield f
    except (SafetensorError, OSError) as error:
        raise QuestError(
            f"sampling: {shard} is damaged ({error}); remove it and sample again"
        ) from error


def read_samples(folder: str | Path) -> Iterator[Samples]:
    """The samples of a finished folder in the order of their indices, a shard at a time.

    QuestError when shards are missing (says how many), damaged, or of another run.
    """
    folder = Path(folder)
    run = read_run(folder)
    shards = [
        shard_file(folder, indices)
        for indices in index_ranges(run["num_samples"], run["batch_size"])
    ]
    missing = sum(not shard.exists() for shard in shards)
    if missing:
        raise QuestError(
            f"{folder}: not finished: {missing} of {len(shards)} shards are missing; sample again to go on"
        )
    for shard in shards:
        with _opened(shard, _digest(run)) as f:
            yield Samples(f.get_tensor("images"), f.get_tensor("latents"))


def write_samples(
    folder: str | Path,
    run: dict[str, Any],
    draw: Callable[[range], Samples],
    *,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = False,
) -> None:
    """Draw what `folder` lacks of `run`. Every process calls this; shards of processes that died are taken over.

    Process 0 returns when all shards are there; the others when nothing is left to begin. No messages pass between processes.
    QuestError when the folder holds another run or cannot be written (finished shards are kept; the same call goes on).
    """
    folder = Path(folder)
    _open_run(folder, run)
    ranges, digest = index_ranges(run["num_samples"], run["batch_size"]), _digest(run)
    own = ranges[process_index::num_processes]
    others = [r for r in ranges if r not in own]
    first = process_index == 0
    # Own share first; then what others have not begun; then, for process 0, what others have begun and perhaps died of.
    todo = [(r, False) for r in own + others] + [(r, True) for r in ranges if first]
    for indices, wait in tqdm(todo, desc="sample", disable=not progress, mininterval=2):
        shard = shard_file(folder, indices)
        with _claimed(shard, wait) as file:
            if file is None:
                continue
            _write(file, shard, save(draw(indices)._asdict(), {"run": digest}))
    if first:
        for indices in ranges:
            with _opened(shard_file(folder, indices), digest):
                pass
        for stale in (*folder.glob("*.part"), *folder.glob("run.json.*")):
            stale.unlink(missing_ok=True)


def _open_run(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json, or compare with the one that is there."""
    path = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shards = any(
            folder.glob("*.safetensors")
        )  # looked for first: whoever writes shards has written run.json before
        if not path.exists():
            if shards:
                raise QuestError(
                    f"sampling: {folder} holds files of something else (no run.json); name another folder"
                )
            tmp = folder / f"run.json.{os.uname().nodename}-{os.getpid()}"
            tmp.write_text(json.dumps(run))
            os.replace(tmp, path)
    except OSError as error:
        raise QuestError(f"sampling: cannot write to {folder}: {error.strerror}") from error
    found, asked = read_run(folder), json.loads(json.dumps(run))
    differ = sorted(k for k in {*found, *asked} if found.get(k) != asked.get(k))
    if differ:
        what = "; ".join(
            f"{k}: expected {str(asked.get(k))[:60]}, found {str(found.get(k))[:60]}"
            for k in differ
        )
        raise QuestError(f"sampling: {folder} belongs to another run ({what})")


@contextmanager
def _claimed(shard: Path, wait: bool) -> Iterator[Any]:
    """The open, locked .part file of a shard that is to be drawn; None when it is finished, or (wait off) another is at it."""
    part = shard.with_suffix(".part")
    while not shard.exists():
        try:
            file = open(
                part, "r+b" if part.exists() else "x+b", buffering=0
            )  # unbuffered: no second error at close
        except (FileNotFoundError, FileExistsError):
            continue  # another process was faster
        except OSError as error:
            raise QuestError(f"sampling: cannot write {part}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            except OSError as error:
                raise QuestError(
                    f"sampling: {part.parent} is on a file system without file locks ({error.strerror})"
                ) from error
            # Before the lock was ours, another may have finished the shard under this very file, or given it up.
            if shard.exists() or not _is_at(file, part):
                continue
            try:
                yield file
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            return
    yield None


def _is_at(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write(file: Any, shard: Path, data: bytes) -> None:
    """Fill the locked file, bring it to the disk, and give it the shard's name."""
    try:
        file.seek(0)
        file.truncate()
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
        os.replace(file.name, shard)
    except OSError as error:
        raise QuestError(
            f"sampling: cannot write {shard}: {error.strerror}; finished shards are kept, the same command goes on from them"
        ) from error
