"""README blocks between `<!-- generated: NAME -->` and `<!-- end: NAME -->`, from the results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from questlib.errors import QuestError
from questlib.files import atomic_path
from reproduce import timing
from reproduce.datasets import DATASETS
from reproduce.figures import plots, style
from reproduce.provenance import machine
from reproduce.reporting import benchmarks, claims, report
from reproduce.reporting.benchmarks import machine_words
from reproduce.store import write_json
from reproduce.table_results import TableResults
from reproduce.tables.registry import all_tables
from reproduce.verdicts import verdict

BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", re.S)
PICTURE = "picture.png"
NOT_MEASURED = "not measured yet | not measured yet"


# ---- commands and their time ----


def commands(folder: Path) -> str:
    """The commands and how long they take, installation apart."""
    mini = folder / "mini"
    about_test = "lint, tests, all notebooks at smoke scale"
    lines = [
        "| command | what it does | measured | on |",
        "| --- | --- | --- | --- |",
        f"| `make test` | {about_test} | {_run(mini / 'test.json') or NOT_MEASURED} |",
    ]
    everything = []
    for name, table in all_tables().items():
        found = report.committed(name, folder)
        everything += [found] if table.in_paper else []
        took = _run(mini / name / "run.json") or _sum([found])
        lines.append(f"| `make {table.target}` | {table.title}, mini scale | {took} |")
    about = "the paper's tables and figures, all but the ablation; what they share is made once"
    took = _sessions(mini / "all-time", everything) or _sum(everything)
    return "\n".join([*lines, f"| `make reproduce-all` | {about} | {took} |"])


def _run(path: Path) -> str | None:
    """ "time of a whole run | machine", or None without one."""
    if not path.is_file():
        return None
    run = json.loads(path.read_text())
    return f"{run['seconds'] / 60:.1f} min | {machine_words(run['machine'])}"


def _machines(tables: Iterable[TableResults]) -> str:
    """Those that the rows' samples were drawn on."""
    made = (result.provenance[0] for results in tables for _, result in results.done)
    return "; ".join(sorted({machine_words(p["machine"]) for p in made}))


def _sessions(path: Path, tables: list[TableResults]) -> str | None:
    """What the Makefile noted of `make reproduce-all`, and the rows' machines.

    The time is that up to the first end with status 0. What came later is told where it took a
    minute. None without a whole run.
    """
    sessions = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    ends = [i for i, session in enumerate(sessions) if session[-1] == "0"]
    if not ends or sessions[0] == ["warm"]:
        return None
    counted = sessions[: ends[0] + 1]
    several = f" in {len(counted)} sessions" if len(counted) > 1 else ""
    whole = sum(int(session[0]) for session in counted) / 60
    later = sum(int(session[0]) for session in sessions[len(counted) :]) / 60
    again = f"; later, rows of newer code: {later:.1f} min" if later >= 1 else ""
    return f"{whole:.1f} min{several}{again} | {_machines(tables)}"


def _sum(tables: list[TableResults]) -> str:
    """ "time of the rows that were run | machines"."""
    done = [result for results in tables for _, result in results.done]
    if not done:
        return NOT_MEASURED
    runs = sum(len(result.seeds) for result in done)
    planned = sum(len(results.plan.scale.seeds) * len(results) for results in tables)
    rest = "" if runs == planned else f", {runs} of {planned}"
    minutes = sum(timing.stage_seconds(tables).values()) / 60
    return f"{minutes:,.0f} core min (sum over rows and seeds{rest}) | {_machines(tables)}"


# ---- tables and claims ----


def picture(folder: Path) -> str:
    """Samples of Table 3's chosen rows."""
    results = report.committed("table3", folder)
    shown = results.table.picture
    if not all(results[row_id].done for row_id in shown):
        return "The picture appears with the first full run of `make reproduce-table3`."
    names = " / ".join(results.table.row(row_id).title for row_id in shown)
    image = f"![{names}](results/mini/table3/{PICTURE})"
    return f"{image}\n\nTop to bottom, from the same noise: {names}."


def tables(folder: Path) -> str:
    """Every table, folded up: how much of it is there, and paper and ours side by side."""
    return "\n\n".join(_folded(report.committed(name, folder)) for name in all_tables())


def _folded(results: TableResults) -> str:
    """One table."""
    done = len(results.done)
    summary = f"<b>{results.table.title}</b>: {done} of {len(results)} rows done"
    agree, differ = _agreement(results)
    if agree or differ:
        counts = f"{agree} as in the paper, {differ} differs from the paper"
        summary += f"; verdicts between quantized rows: {counts}"
    reasons = "\n".join(f"- {line}" for line in report.reasons(results))
    text = report.markdown(results) if done else reasons
    return f"<details><summary>{summary}</summary>\n\n{text.rstrip()}\n\n</details>"


def _agreement(results: TableResults) -> tuple[int, int]:
    """How many verdicts agree with the paper, and how many differ.

    Only of quantized rows against quantized rows: that a baseline is worse than full precision
    says little of the paper.
    """
    rows = [
        row
        for row in results.table.rows
        if row.against is not None and not results.table.row(row.against).full_precision
    ]
    found = [verdict(results, row, metric) for row in rows for metric in report.reported(results)]
    agrees = [v.agrees for v in found if v is not None]
    return agrees.count(True), agrees.count(False)


def claims_block(folder: Path) -> str:
    """The paper's claims and whether they hold here."""
    found = {name: report.committed(name, folder) for name in all_tables()}
    lines = []
    for claim in claims.CLAIMS:
        judgement = claims.judge(claim, found)
        lines.append(
            {
                "the paper's claim": claim.text,
                "where": claim.where,
                "here": f"**{judgement}**",
                "measured": judgement.details,
            }
        )
    return report.as_markdown(pd.DataFrame(lines))


# ---- paper scale ----


def paper(folder: Path) -> str:
    """What `paper` scale needs and how it samples, by data set; and each table's command."""
    lines = [
        "| data | config | model at | reference or prompts | samples a row | sampler |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for data in DATASETS.values():
        setting = data.settings["paper"]
        reference = data.reference_env if data.has_reference else data.captions_env
        lines.append(
            f"| {data.title} | `{data.config}` | `${data.model_env}` | `${reference}` "
            f"| {setting.samples_per_seed:,} | {setting.sampling} |"
        )
    lines += ["", "| command | | data | rows |", "| --- | --- | --- | --- |"]
    for table in all_tables().values():
        names = ", ".join(dict.fromkeys(row.dataset for row in table.rows))
        command = f"python -m reproduce {table.name} --scale paper"
        lines.append(f"| `{command}` | {table.title} | {names} | {len(table.rows)} |")
    return "\n".join(lines)


# ---- the README ----

BLOCKS: dict[str, Callable[[Path], str]] = {
    "commands": commands,
    "picture": picture,
    "engines": benchmarks.engines,
    "full-size": benchmarks.full_size,
    "machines": benchmarks.machines,
    "paper": paper,
    "claims": claims_block,
    "tables": tables,
}


def render(text: str, folder: Path) -> str:
    """`text` with every block written again from the results in `folder`.

    Raises:
        QuestError: an unknown block, a block twice, or one that the README lacks.
        ResultError: a result file is damaged, or of an older layout.
    """
    names = [found.group(2) for found in BLOCK.finditer(text)]
    wrong = sorted(set(names) ^ set(BLOCKS))
    if not wrong and len(names) != len(set(names)):
        wrong = ["a block twice"]
    if wrong:
        raise QuestError(
            f"README: expected one block each of {', '.join(BLOCKS)}; "
            f"wrong or missing: {', '.join(wrong)}"
        )
    return BLOCK.sub(lambda m: f"{m.group(1)}{BLOCKS[m.group(2)](folder)}\n{m.group(3)}", text)


def update(readme: Path, folder: Path, work: Path) -> bool:
    """Write README's blocks, every table's markdown and HTML, and the picture.

    The time that `make test` left in `work` is kept in the results.

    Returns:
        Whether README changed.
    """
    if (test := work / "test-time.json").is_file():
        took = json.loads(test.read_text())
        about = {"command": "make test"} | took | {"machine": machine()}
        write_json(folder / "mini" / "test.json", about)
    for name in all_tables():
        results = report.committed(name, folder)
        if results.done:
            report.finish(results.plan)
    results = report.committed("table3", folder)
    if all(results[row_id].done for row_id in results.table.picture):
        style.save(plots.picture(results), results.plan.folder / PICTURE)
    old = readme.read_text()
    new = render(old, folder)
    with atomic_path(readme) as temporary:
        temporary.write_text(new)
    return new != old
