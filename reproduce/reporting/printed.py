"""What a run of a table prints: the report for a terminal, its last lines, and JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from reproduce.agreement import compare_with_published
from reproduce.reporting import report
from reproduce.results import Result
from reproduce.table_results import TableResults
from reproduce.tables.base import Row
from reproduce.verdicts import LEGEND, PAIRED, verdict

WIDTH = 100  # columns of a terminal
LABEL = 36  # of a row's label; longer ones take several lines
GAP = "  "
NAMES = ("data", "bits", "method")  # columns that say which row it is


# ---- a table in a terminal ----


def aligned(data: pd.DataFrame) -> str:
    """A data frame of texts as plain text, at most WIDTH columns wide.

    Numbers and their heads stand at the right of their column, all else at the left. Columns that
    have no room stand below, after the row's names once more.
    """
    names = [name for name in data.columns if name in NAMES]
    widths = {name: _width(data, name) for name in data.columns}
    blocks: list[list[str]] = [[]]
    for name in data.columns.drop(names):
        columns = [*names, *blocks[-1], name]
        taken = sum(widths[column] for column in columns) + len(GAP) * (len(columns) - 1)
        if taken > WIDTH and blocks[-1]:
            blocks.append([])
        blocks[-1].append(name)
    return "\n\n".join(_block(data[[*names, *block]], widths) for block in blocks)


def _width(data: pd.DataFrame, name: str) -> int:
    longest = max([len(name), *(len(str(cell)) for cell in data[name])])
    return min(longest, LABEL) if name in ("method", "against") else longest


def _block(data: pd.DataFrame, widths: Mapping[str, int]) -> str:
    """The lines of columns that have room beside each other."""
    right = {name: report.is_numeric(data[name]) for name in data.columns}
    lines = [_line(dict(zip(data.columns, data.columns, strict=True)), right, widths)]
    before: tuple[str, ...] = ()
    for texts in data.astype(str).to_numpy().tolist():
        cells = dict(zip(data.columns, texts, strict=True))
        group = tuple(cells[name] for name in NAMES[:2] if name in cells)
        if group != before:
            lines.append("")
        elif "bits" in cells:
            cells |= {name: "" for name in NAMES[:2] if name in cells}
        before = group
        lines += _wrapped(cells, right, widths)
    return "\n".join(lines)


def _wrapped(
    cells: dict[str, str], right: Mapping[str, bool], widths: Mapping[str, int]
) -> list[str]:
    """A row's line, and one for each further line of its longest label."""
    parts = {name: textwrap.wrap(text, widths[name]) or [""] for name, text in cells.items()}
    return [
        _line({k: v[i] if i < len(v) else "" for k, v in parts.items()}, right, widths)
        for i in range(max(map(len, parts.values())))
    ]


def _line(cells: dict[str, str], right: Mapping[str, bool], widths: Mapping[str, int]) -> str:
    return GAP.join(
        text.rjust(widths[name]) if right[name] else text.ljust(widths[name])
        for name, text in cells.items()
    ).rstrip()


# ---- the report ----


def terminal(results: TableResults) -> str:
    """The whole report as plain text. The verdicts come last, where a reader looks first."""
    frame = report.frame(results)
    both = report.side_by_side(results)
    judged = report.judged(results)
    costs = [c for c in both.columns if c.startswith(("size ", *report.COST_HEADS.values()))]
    shown = {"preset", *(report.HEADS[metric] for metric in judged)}
    shown |= {"size MB"} if costs else set()
    parts = [results.table.title, _filled(report.conditions(results))]
    parts += ["More numbers:", aligned(frame[[c for c in frame if c not in shown]])]
    if costs:
        parts += ["Cost, in the paper and here:", aligned(both[[*_names(both), *costs]])]
    parts += [_filled(line) for line in report.reasons(results)]
    for metric in reversed(judged):
        parts += [f"{report.HEADS[metric]}:", aligned(_judged(both, report.HEADS[metric]))]
    parts += [_filled(LEGEND)] if judged else []
    agreement = compare_with_published(results)
    if agreement is not None:
        parts.append("\n".join(_filled(line) for line in str(agreement).splitlines()))
    return "\n\n".join(parts)


def _judged(both: pd.DataFrame, head: str) -> pd.DataFrame:
    """The columns of one metric, under short names."""
    first = [c for c in (f"{head} paper", f"{head} here", f"{head} verdict") if c in both]
    data = both[[*_names(both), *first, "against", f"{head} difference", f"{head} p"]]
    return data.rename(columns=lambda column: column.removeprefix(f"{head} "))


def _names(data: pd.DataFrame) -> list[str]:
    return [name for name in NAMES if name in data]


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def closing(results: TableResults, seconds: float) -> str:
    """The last three lines: what was run and how long, what it shows, where to look.

    Args:
        seconds: that the command took.
    """
    plan = results.plan
    done = sum(results[row.id].done for row in plan.rows)
    made = "shown from their results" if plan.choices.stored else "made"
    took = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
    files = (report.PICTURE, plan.table.notebook)
    there = [str(plan.folder / name) for name in files if (plan.folder / name).is_file()]
    return "\n".join(
        [
            f"{done} of {len(plan.rows)} rows {made} at {plan.scale.name} scale in {took}.",
            f"It shows: {_shows(results)}.",
            f"Look at: {', '.join(there) or 'no file, since nothing was made'}",
        ]
    )


def _shows(results: TableResults) -> str:
    """In a line what the table's most telling row says; that is the last one of its picture."""
    if not results.done:
        return "nothing, since no row has numbers"
    if results.plan.scale.name == "smoke":
        return "that the code runs; at smoke scale the numbers mean nothing"
    for row_id in reversed(results.table.picture):
        row = results.table.row(row_id)
        for metric in (PAIRED, results.table.claim):
            found = verdict(results, row, metric)
            if found is not None and found.measured:
                return f"{row.title} is {found}, by {report.HEADS[metric]}"
    return "numbers without a verdict"


# ---- JSON ----


def as_json(results: TableResults) -> str:
    """The whole report as JSON: each row's specification, result and verdicts."""
    table = results.table
    about = {
        "table": table.name,
        "title": table.title,
        "scale": results.plan.scale.name,
        "note": table.note,
    }
    agreement = compare_with_published(results)
    rows = [_row_json(row, result, results) for row, result in results]
    whole = {"agreement": None if agreement is None else agreement.as_json(), "rows": rows}
    return json.dumps(about | whole, indent=1, allow_nan=False)


def _row_json(row: Row, result: Result, results: TableResults) -> dict[str, Any]:
    """What is known of one row."""
    judged = {metric: verdict(results, row, metric) for metric in report.HEADS}
    return {
        "specified": _plain(dataclasses.asdict(row)) | {"bits": row.bits},
        "result": dataclasses.asdict(result),
        "metrics": {metric: result.metric(metric)._asdict() for metric in report.HEADS},
        "size_bytes": result.size_bytes,
        "peak_bytes": result.peak_bytes,
        "layers": result.layers,
        "seconds": result.seconds,
        "verdicts": {
            metric: dataclasses.asdict(found) | {"text": str(found)}
            for metric, found in judged.items()
            if found is not None
        },
    }


def _plain(value: Any) -> Any:
    """Mappings of any kind as dicts, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
