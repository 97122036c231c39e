"""Artifacts of stages, as folders that are named by a hash of what made them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from questlib.config import digest
from questlib.distributed import cpu_threads
from questlib.errors import CheckpointError, ConfigError
from questlib.files import atomic_path
from questlib.integrity import digest_of_json
from reproduce.provenance import provenance

STORE_FORMAT = 2  # of a work folder; 1, without a marker, named artifacts by hashes of the code
MARKER = "store.json"
DIGEST = "digest"  # of the other values of done.json


def write_json(path: Path, value: Any) -> None:
    """Write, or replace, a JSON file in one step. ValueError for NaN and infinity."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """What a file of an artifact's folder tells.

    Args:
        keys: what it must have.

    Raises:
        CheckpointError: it cannot be read, lacks a key, or is not what was written, which its
            digest tells where it has one.
    """
    advice = "remove it, and the same command makes it again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from error
    if not isinstance(values, dict) or not values.keys() >= set(keys):
        raise CheckpointError(f"{path}: expected {', '.join(keys)}; {advice}")
    digest = values.pop(DIGEST, None)
    if digest is not None and digest != digest_of_json(values):
        raise CheckpointError(f"{path}: not what was written; {advice}")
    return values


@dataclass(frozen=True)
class Artifact:
    """What one stage makes; it is complete when its done.json exists.

    The folder of an unfinished one is kept, so that the stage goes on from what it wrote there.
    """

    folder: Path
    hash: str

    @property
    def stage(self) -> str:
        """The stage that makes it."""
        return self.folder.parent.name

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return (self.folder / "done.json").is_file()

    @property
    def info(self) -> dict[str, Any]:
        """What its stage told, with the seconds it took and where it was made.

        Raises:
            CheckpointError: done.json is damaged.
        """
        return read_json(self.folder / "done.json", "seconds", "interrupted", "provenance", DIGEST)

    def make(self, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Run `build(folder)` unless done.

        Where another process makes the same artifact, this one waits for it. Work that was stopped
        goes on with as many CPU threads as it began with, on which its last bits depend.

        Returns:
            What `build` returned, with the seconds it took, interrupted tries included, and the
            provenance.
        """
        if self.done:
            return self.info
        with FileLock(self.folder / "lock"):
            return self.info if self.done else self._build(build)

    def _build(self, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        tries = self.folder / "tries.json"
        before = {"seconds": 0.0, "interrupted": 0, "threads": torch.get_num_threads()}
        if tries.is_file():
            before |= read_json(tries, "seconds", "interrupted")
        if before["threads"] != torch.get_num_threads():
            print(
                f"{self.folder}: goes on with {before['threads']} threads, as it began, "
                f"not with {torch.get_num_threads()}",
                file=sys.stderr,
            )
        # Written first, so that a try that is killed leaves a mark even though its seconds are
        # lost.
        now = before | {"interrupted": before["interrupted"] + 1}
        write_json(tries, now)
        start = time.perf_counter()
        with cpu_threads(before["threads"]):
            try:
                told = build(self.folder)
            finally:
                seconds = before["seconds"] + time.perf_counter() - start
                write_json(tries, now | {"seconds": seconds})
            info = {
                "seconds": seconds,
                "interrupted": before["interrupted"],
                "provenance": provenance(),
            } | told
        info = json.loads(json.dumps(info, allow_nan=False))
        write_json(self.folder / "done.json", info | {DIGEST: digest_of_json(info)})
        tries.unlink()
        return info


@dataclass(frozen=True)
class ArtifactStore:
    """A work folder: artifacts, in one subfolder for each stage."""

    root: Path

    def artifact(self, stage: str, key: dict[str, Any]) -> Artifact:
        """The artifact that `key` decides; nothing is made yet but its folder.

        Raises:
            ConfigError: the folder holds artifacts of another format.
        """
        name = digest(key)
        folder = self.root / stage / name
        if not (self.root / MARKER).is_file():
            check_store(self.root)
            write_json(self.root / MARKER, {"format": STORE_FORMAT})  # before the first artifact
        if not (folder / "key.json").is_file():
            write_json(folder / "key.json", key)
        return Artifact(folder, name)


def check_store(root: Path) -> None:
    """Check that a work folder is new or of this format; nothing is written or removed.

    Raises:
        ConfigError: the folder holds artifacts of another format.
    """
    advice = "name another folder (--work), or remove it"
    # Artifacts first: another process that has just made one wrote the marker before.
    has_artifacts = any(root.glob("*/*/key.json"))
    try:
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if has_artifacts:
            raise ConfigError(
                f"work folder {root}: found artifacts of a questlib before 0.2, "
                f"which this one cannot go on from; {advice}"
            ) from None
        return
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"work folder {root}: {MARKER} cannot be read; {advice}") from error
    found = marker.get("format") if isinstance(marker, dict) else None
    if found != STORE_FORMAT:
        raise ConfigError(
            f"work folder {root}: expected artifacts of format {STORE_FORMAT}, "
            f"found format {found}; {advice}"
        )
