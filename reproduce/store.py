"""Products of stages as folders named by a hash of what made them. A product is complete when its done.json exists."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from reproduce.provenance import provenance

BY_VALUE = {"questlib", "questlib.config", "questlib.errors"}  # see code_hash


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
        before = json.loads(tries.read_text()) if tries.is_file() else {"seconds": 0.0, "interrupted": 0}
        # Written first, so that a try that is killed leaves a mark even though its seconds are lost.
        write_json(tries, before | {"interrupted": before["interrupted"] + 1})
        start = time.perf_counter()
        try:
            info = build(self.folder)
        finally:
            seconds = before["seconds"] + time.perf_counter() - start
            write_json(tries, {"seconds": seconds, "interrupted": before["interrupted"] + 1})
        info = {"seconds": seconds, "interrupted": before["interrupted"], "provenance": provenance()} | info
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
        if not (folder / "key.json").is_file():
            write_json(folder / "key.json", key)
        return Product(folder, name)


def code_hash(*functions: Callable) -> str:
    """Hash of the modules that define `functions` and of all of questlib that they import; comments and format do not count.

    Config and errors are left out: what a preset decides enters a product's key by value.
    """
    seen: dict[str, str] = {}
    todo = [function.__module__ for function in functions]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen[name], imported = _source(name)
        todo += imported
    return digest(sorted(seen.items()))


@cache
def _source(name: str) -> tuple[str, list[str]]:
    """(hash of the module's syntax tree without docstrings, the questlib modules that it imports)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no source for module {name}", name=name)
    tree = ast.parse(Path(spec.origin).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("questlib"):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("questlib.")}
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = ""  # a docstring
    # The package's own __init__ only gathers names: what a module uses, it imports by module here.
    modules = sorted(n for n in names - BY_VALUE if _is_module(n))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), modules


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # name's parent is a module, not a package: name is a function or a class in it
        return False
