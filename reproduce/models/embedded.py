"""The models that ship with this package, by name; nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path

MINI = Path(__file__).parent / "minis" / "weights"  # written by reproduce.models.minis.export
CLASSES = "classes.json"  # in the folder of a class-conditional model


def embedded_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(path.parent.name for path in MINI.glob("*/model_index.json"))


def class_names(model: str) -> list[str]:
    """What the labels 0, 1, ... of a class-conditional embedded model stand for; else nothing."""
    path = MINI / model / CLASSES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
