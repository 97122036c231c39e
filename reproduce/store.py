"""Products of stages as folders named by a hash of what made them. A product is complete when its done.json exists."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from questlib.errors import ConfigError
from reproduce.provenance import provenance

STORE_FORMAT = 2  # of a work folder; 1, without a marker, named products by hashes of the code
MARKER = "store.json"


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Product:
    """One stage's product. The folder of an unfinished one is kept, so that the stage can go on from what it wrote there."""

    folder: Path
    hash: str

    @property
    def done(self) -> bool:
        return (self.folder / "done.json").is_file()

    @property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "done.json").read_text())

    def make(self, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Run `build(folder)` unless done; its dict is kept with the seconds it took, those of interrupted tries included.

        Where another process makes the same product, this one waits for it.
        """
        if self.done:
            return self.info
        with FileLock(self.folder / "lock"):
            return self.info if self.done else self._make(build)

    def _make(self, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        tries = self.folder / "tries.json"
        before = (
            json.loads(tries.read_text()) if tries.is_file() else {"seconds": 0.0, "interrupted": 0}
        )
        # Written first, so that a try that is killed leaves a mark even though its seconds are lost.
        write_json(tries, before | {"interrupted": before["interrupted"] + 1})
        start = time.perf_counter()
        try:
            info = build(self.folder)
        finally:
            seconds = before["seconds"] + time.perf_counter() - start
            write_json(tries, {"seconds": seconds, "interrupted": before["interrupted"] + 1})
        info = {
            "seconds": seconds,
            "interrupted": before["interrupted"],
            "provenance": provenance(),
        } | info
        write_json(self.folder / "done.json", info)
        tries.unlink()
        return info


@dataclass(frozen=True)
class Store:
    """A folder of products, one subfolder a stage."""

    root: Path

    def product(self, stage: str, key: dict[str, Any]) -> Product:
        name = digest(key)
        folder = self.root / stage / name
        if not (self.root / MARKER).is_file():
            check_store(self.root)
            write_json(self.root / MARKER, {"format": STORE_FORMAT})  # before the first product
        if not (folder / "key.json").is_file():
            write_json(folder / "key.json", key)
        return Product(folder, name)


def check_store(root: Path) -> None:
    """ConfigError when `root` holds products of another store format. Nothing is written or removed."""
    advice = "name another folder (--work), or remove it"
    # Products first: another process that has just made one wrote the marker before.
    has_products = any(root.glob("*/*/key.json"))
    try:
        marker = json.loads((root / MARKER).read_text())
    except FileNotFoundError:
        if has_products:
            raise ConfigError(
                f"work folder {root}: found products of a questlib before 0.2, "
                f"which this one cannot go on from; {advice}"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"work folder {root}: {MARKER} cannot be read; {advice}") from error
    found = marker.get("format") if isinstance(marker, dict) else None
    if found != STORE_FORMAT:
        raise ConfigError(
            f"work folder {root}: expected products of format {STORE_FORMAT}, "
            f"found format {found}; {advice}"
        )
