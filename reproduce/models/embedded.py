"""The models that ship with this package, by name; nothing is loaded."""

from __future__ import annotations

from pathlib import Path

MINI = Path(__file__).parent / "minis" / "weights"  # written by reproduce.models.minis.export


def embedded_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(path.parent.name for path in MINI.glob("*/model_index.json"))
