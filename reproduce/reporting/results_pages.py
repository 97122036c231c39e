"""One page a table or figure: pictures, numbers, verdicts, and how they were made."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from reproduce.reporting import report, what_we_see
from reproduce.table_results import TableResults
from reproduce.tables.base import Table
from reproduce.verdicts import LEGEND, between_quantized

FOLDER = "docs/results"
NOTE = "<!-- Written by `python -m reproduce readme`. Changes here are lost. -->"


def all_pages(folder: Path) -> dict[str, str]:
    """Markdown by path, with links as seen from the repository's root."""
    found = report.all_committed(folder)
    pages = {f"{FOLDER}/{name}.md": page(results) for name, results in found.items()}
    return {f"{FOLDER}/index.md": index(list(found.values()))} | pages


def index(tables: list[TableResults]) -> str:
    """All tables and figures, with how much of each agrees with the paper."""
    lines = [
        {
            "": f"[{results.table.title}]({FOLDER}/{results.table.name}.md)",
            "rows": f"{len(results.done)} of {len(results)}",
            "verdicts as in the paper": _agreed(results),
            "notebook": f"[{results.table.notebook}](notebooks/{results.table.notebook})",
        }
        for results in tables
    ]
    parts = [
        NOTE,
        "# Results",
        "Every table and figure at `mini` scale: the embedded models, on two CPU cores. "
        "Compare the order of the rows with the paper's, not the values "
        "([what the numbers are worth](docs/limits.md)). A *verdict* compares a quantized row with "
        "the row that the paper compares it with.",
        report.as_markdown(pd.DataFrame(lines)),
    ]
    return "\n\n".join(parts) + "\n"


def page(results: TableResults) -> str:
    """Everything that the results say of one table."""
    table = results.table
    parts = [
        NOTE,
        f"# {table.title}",
        f"Verdicts between quantized rows that are as in the paper: **{_agreed(results)}**. "
        f"The [notebook](notebooks/{table.notebook}) tells the story.",
        _commands(table),
        "## What we see",
        what_we_see.of_table(results).strip(),
    ]
    shown = [table.row(row_id).title for row_id in table.picture if results[row_id].done]
    if shown:
        picture = f"results/mini/{table.name}/{report.PICTURE}"
        parts += ["## Picture", f"![From the same noise: {', '.join(shown)}]({picture})"]
    if report.reported(results):
        parts += ["## Paper and here", report.as_markdown(report.side_by_side(results)), LEGEND]
    if results.done:
        parts += ["## All numbers", report.as_markdown(report.frame(results))]
    parts += ["## How they were made", report.as_text(report.conditions(results))]
    parts += [f"- {report.as_text(line)}" for line in report.reasons(results)]
    if results.done:
        parts.append("\n".join(f"- {line}" for line in report.made_by(results).splitlines()))
    return "\n\n".join(parts) + "\n"


def _commands(table: Table) -> str:
    target = table.target.removeprefix("reproduce-")
    show = [] if table.opens_checkpoints else [f"make show-{target}         # from these results"]
    return "\n".join(["```sh", *show, f"make reproduce-{target}    # anew", "```"])


def _agreed(results: TableResults) -> str:
    """How many verdicts between quantized rows are as in the paper, of those it gives."""
    found = between_quantized(results, report.reported(results))
    agrees = [v.agrees for v in found if v.agrees is not None]
    return f"{agrees.count(True)} of {len(agrees)}" if agrees else "none to compare"
