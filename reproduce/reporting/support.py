"""Which diffusers pipelines work, from `tests/support/support_table.py`."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from reproduce.reporting import report
from reproduce.results import ResultError

FILE = "support.json"
SIGNS = {"works": "✅ works", "refused": "🟡 refused", "fails": "❌ fails"}
FIGURES = ("minmax", "quest", "finetune")
COLUMNS = ["pipeline", "", "min-max W8A8", "QuEST W8A8", "QuEST W4A4"]


def read(folder: Path) -> list[dict[str, Any]]:
    """What came of each pipeline; nothing before the first run. ResultError for a damaged file."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8")).values())
        if not all(row["outcome"] in SIGNS and row["group"] and row["name"] for row in rows):
            raise ResultError(f"{path}: expected outcome, group and name in each entry")
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: {type(error).__name__}: {error}") from error


def counts(folder: Path) -> str:
    """How many pipelines work, are refused, and fail."""
    outcomes = [row["outcome"] for row in read(folder)]
    if not outcomes:
        return "No pipeline was tried yet: `python tests/support/support_table.py --write`."
    works, refused, fails = (outcomes.count(name) for name in SIGNS)
    return (
        f"Of {len(outcomes)} kinds of diffusers pipelines, built from small random parts, {works} "
        f"go through every stage, {refused} are refused with a reason, and "
        f"{f'{fails} fail' if fails else 'none fails'}."
    )


def table(folder: Path) -> str:
    """A line for each pipeline, and why some do not work."""
    rows = read(folder)
    lines = []
    for group, members in groupby(rows, key=lambda row: row["group"]):
        lines.append([f"**{group}**"] + [""] * (len(COLUMNS) - 1))
        for row in members:
            figures = [f"{row[name]:.1f}" if name in row else "-" for name in FIGURES]
            lines.append([row["name"], SIGNS[row["outcome"]], *figures])
    reasons = [
        f"- {row['group']}, {row['name']}: {_why(row['stage'], row['reason'])}"
        for row in rows
        if row.get("reason")
    ]
    parts = [counts(folder), report.as_markdown(pd.DataFrame(lines, columns=COLUMNS))]
    if reasons:
        parts += ["Those that are refused say why:", "\n".join(reasons)]
    return "\n\n".join(parts)


def _why(stage: str, reason: str) -> str:
    """A reason in one line, which begins with its stage."""
    said = reason.removeprefix(f"{stage}: ")
    return report.as_text(f"{stage}: {said}").replace("\n", " ")
