"""How long each command took, as the results and the Makefile noted it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from reproduce import timing
from reproduce.reporting import report
from reproduce.reporting.benchmarks import machine_words
from reproduce.table_results import TableResults
from reproduce.tables.registry import all_tables

NOT_MEASURED = "not measured yet"


class RunTime(NamedTuple):
    """The time of one command."""

    minutes: float | None
    words: str
    """The minutes, with what they count."""

    machine: str


MISSING = RunTime(None, NOT_MEASURED, NOT_MEASURED)


def test_time(folder: Path) -> RunTime:
    """The time of `make test`."""
    return _whole_run(folder / "mini" / "test.json") or MISSING


def table_time(name: str, folder: Path) -> RunTime:
    """The time of a table: of a whole run where there is one, otherwise the sum over its rows."""
    whole = _whole_run(folder / "mini" / name / "run.json")
    return whole or _sum([report.committed(name, folder)])


def time_of_all(folder: Path) -> RunTime:
    """The time of `make reproduce-all`."""
    tables = [report.committed(name, folder) for name, t in all_tables().items() if t.in_paper]
    return _sessions(folder / "mini" / "all-time", tables) or _sum(tables)


def commands(folder: Path) -> str:
    """Every command and how long it takes, installation apart."""
    lines = ["| command | what it does | time | machine |", "| --- | --- | --- | --- |"]
    about_all = "the paper's tables and figures, all but the ablation; what they share is made once"
    found = [
        ("make test", "lint, tests, all notebooks", test_time(folder)),
        *(
            (f"make {table.target}", table.title, table_time(name, folder))
            for name, table in all_tables().items()
        ),
        ("make reproduce-all", about_all, time_of_all(folder)),
    ]
    lines += [f"| `{name}` | {about} | {t.words} | {t.machine} |" for name, about, t in found]
    return "\n".join(lines)


def _whole_run(path: Path) -> RunTime | None:
    """The time that a whole run wrote, or None without one."""
    if not path.is_file():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    minutes = run["seconds"] / 60
    return RunTime(minutes, f"{minutes:.1f} min", machine_words(run["machine"]))


def _machines(tables: Iterable[TableResults]) -> str:
    """Those that the rows' samples were drawn on."""
    made = (result.provenance[0] for results in tables for _, result in results.done)
    return "; ".join(sorted({machine_words(p["machine"]) for p in made}))


def _sessions(path: Path, tables: list[TableResults]) -> RunTime | None:
    """What the Makefile noted of `make reproduce-all`, and the rows' machines.

    The time is that up to the first end with status 0. What came later is told where it took a
    minute. None without a whole run.
    """
    sessions = (
        [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        if path.is_file()
        else []
    )
    ends = [i for i, session in enumerate(sessions) if session[-1] == "0"]
    if not ends or sessions[0] == ["warm"]:
        return None
    counted = sessions[: ends[0] + 1]
    several = f" in {len(counted)} sessions" if len(counted) > 1 else ""
    whole = sum(int(session[0]) for session in counted) / 60
    later = sum(int(session[0]) for session in sessions[len(counted) :]) / 60
    again = f"; later, rows of newer code: {later:.1f} min" if later >= 1 else ""
    return RunTime(whole, f"{whole:.1f} min{several}{again}", _machines(tables))


def _sum(tables: list[TableResults]) -> RunTime:
    """The sum over the stages of the rows that were run."""
    done = [result for results in tables for _, result in results.done]
    if not done:
        return MISSING
    runs = sum(len(result.seeds) for result in done)
    planned = sum(len(results.plan.scale.seeds) * len(results) for results in tables)
    rest = "" if runs == planned else f", {runs} of {planned}"
    minutes = sum(timing.stage_seconds(tables).values()) / 60
    words = f"{minutes:,.0f} core min (sum over rows and seeds{rest})"
    return RunTime(minutes, words, _machines(tables))
