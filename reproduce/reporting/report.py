"""From results to tables, in markdown and HTML. For the terminal see `printed`.

Every number comes from a result file or from the table's own file.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import pandas as pd

from questlib.files import atomic_path
from reproduce.agreement import compare_with_published, write_agreement
from reproduce.choices import Choices
from reproduce.figures import strips, style
from reproduce.plan import Plan, make_plan
from reproduce.results import IF_REPORTED, Result, Status
from reproduce.row_engine import INTEGERS, INTEGERS_BESIDE_FLOAT
from reproduce.scales import SIMULATED
from reproduce.table_results import TableResults
from reproduce.tables.base import COSTS, FAILED, UNKNOWN, Number, Row
from reproduce.tables.registry import all_tables
from reproduce.verdicts import LEGEND, PAIRED, p_in_words, verdict

HEADS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "clip_score": "CLIP score x100",
    "kid": "KID x1000",
    "psnr_to_fp": "PSNR to FP, dB",
    PAIRED: "distance to FP",
}
COST_HEADS = {"hours": "time", "memory_mb": "memory MB", "iterations": "iterations"}
PICTURE = "picture.png"
FACTORS = {"kid": 1000.0}
DIGITS = {PAIRED: 3}


def finish(plan: Plan) -> TableResults:
    """Write the table as markdown, as HTML and as a picture beside its results.

    The results are only read.

    Where these are not the published ones, agreement.md and agreement.json say how they compare.

    A row whose file is damaged has failed, and its reason names the file.
    """
    results = TableResults.stored(plan)
    for name, text in (("table.md", markdown(results)), ("table.html", html(results))):
        with atomic_path(plan.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if any(results[row_id].done for row_id in plan.table.picture):
        style.save(strips.picture(results), plan.folder / PICTURE)
    write_agreement(plan, compare_with_published(results))
    return results


def committed(table: str, folder: Path) -> TableResults:
    """The results of a full mini run under `folder`, where nothing is written.

    Raises:
        ResultError: a result file is damaged, or of an older layout.
    """
    choices = Choices(scale="mini", results=folder, work=folder)
    return TableResults.stored(make_plan(table, choices, dry=True), strict=True)


def all_committed(folder: Path) -> dict[str, TableResults]:
    """The same of every table, by name."""
    return {name: committed(name, folder) for name in all_tables()}


# ---- numbers as text ----


def _here(result: Result, metric: str) -> str:
    """Mean ± deviation, or why there is none."""
    if not result.done:
        return str(result.status)
    value, std = result.metric(metric)
    if value is None:
        return "-"
    spread = "" if std is None else f" ± {_number(std, metric)}"
    return f"{_number(value, metric)}{spread}"


def _number(value: float | None, metric: str, sign: str = "") -> str:
    """A metric's value in its unit."""
    if value is None:
        return "-"
    return f"{value * FACTORS.get(metric, 1.0):{sign}.{DIGITS.get(metric, 2)}f}"


def _paper(value: Number) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.2f}"


def _quantity(value: float | None, unit: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


# ---- tables ----


def reported(results: TableResults) -> list[str]:
    """The metrics that the paper's table has."""
    rows = results.table.rows
    return [m for m in HEADS if any(row.paper.get(m) is not None for row in rows)]


def _name(row: Row, results: TableResults) -> dict[str, str]:
    """The columns that say which row this is; the data set where the table has several."""
    several = len({r.dataset for r in results.table.rows}) > 1
    data = {"data": row.dataset} if several else {}
    return data | {"bits": row.bits, "method": row.label}


def frame(results: TableResults) -> pd.DataFrame:
    """The numbers measured here: mean ± sample standard deviation over the seeds."""
    shown = [m for m in HEADS if m not in IF_REPORTED or m in results.told]
    trains = any(result.trained_fraction is not None for _, result in results)
    lines = []
    for row, result in results.ordered():
        line = _name(row, results) | {"preset": row.preset or "-"}
        line |= {HEADS[metric]: _here(result, metric) for metric in shown}
        if trains:
            trained = result.trained_fraction
            line["trained"] = "-" if trained is None else f"{trained:.0%}"
        line["size MB"] = _quantity(result.size_bytes, 1e6, 2)
        if results.table.tells_layers:
            line |= _layers(result)
        line["minutes"] = _quantity(result.quantize_seconds, 60)
        line["memory MB"] = _quantity(result.peak_bytes, 1e6, 0)
        lines.append(line)
    return pd.DataFrame(lines)


def _layers(result: Result) -> dict[str, str]:
    """How many layers ran in integers, and how many of these need floating point beside them."""
    heads = ("layers in integers", "of these beside float")
    if result.layers is None:
        return dict.fromkeys(heads, "-")
    beside = result.layers.get(INTEGERS_BESIDE_FLOAT, 0)
    integers = result.layers.get(INTEGERS, 0) + beside
    words = (f"{integers} of {sum(result.layers.values())}", str(beside))
    return dict(zip(heads, words, strict=True))


def judged(results: TableResults) -> list[str]:
    """The metrics that have verdicts: the paper's, and the distance to full precision."""
    found = reported(results)
    rows = results.table.rows
    paired = any(verdict(results, row, PAIRED) is not None for row in rows)
    return [*found, PAIRED] if paired and PAIRED not in found else found


def side_by_side(results: TableResults) -> pd.DataFrame:
    """The paper's numbers beside those from here, with the verdict on each row.

    `reproduce.verdicts.LEGEND` explains the signs. A difference is the row's value minus that of
    the row that it is compared with, which the column "against" names.
    """
    rows = results.table.rows
    metrics = judged(results)
    others = any(_independent(row, m) != "-" for row in rows for m in metrics)
    lines = []
    for row, result in results.ordered():
        line = _name(row, results)
        line["against"] = "-" if row.against is None else results.table.row(row.against).label
        for metric in metrics:
            head = HEADS[metric]
            if metric in reported(results):
                line[f"{head} paper"] = _paper(row.paper.get(metric))
                if others:
                    line[f"{head} others"] = _independent(row, metric)
            line[f"{head} here"] = _here(result, metric)
            found = verdict(results, row, metric)
            line[f"{head} verdict"] = "" if found is None else found.sign
            difference, p = (None, None) if found is None else (found.difference, found.p)
            line[f"{head} difference"] = _number(difference, metric, "+")
            line[f"{head} p"] = "-" if p is None else p_in_words(p).removeprefix("p ")
        lines.append(line | _sizes(row, result, results) | _costs(row, result, results))
    return pd.DataFrame(lines)


def _independent(row: Row, metric: str) -> str:
    """Numbers of independent runs, each after its source."""
    found = ((name, values[metric]) for name, values in row.independent.items() if metric in values)
    return ", ".join(f"{name} {value:.2f}" for name, value in found) or "-"


def _sizes(row: Row, result: Result, results: TableResults) -> dict[str, str]:
    """The checkpoint's size as a share of full precision's, where the paper's table has sizes."""
    full = next(
        (
            (whole_row, whole)
            for whole_row, whole in results
            if whole_row.full_precision
            and whole_row.dataset == row.dataset
            and whole_row.paper_size_mb
        ),
        None,
    )
    if full is None:
        return {}
    return {
        "size paper": _share(row.paper_size_mb, full[0].paper_size_mb, 1.0),
        "size here": _share(result.size_bytes, full[1].size_bytes, 1e6),
    }


def _share(own: float | None, whole: float | None, unit: float) -> str:
    return f"{own / unit:.1f} MB ({own / whole:.1%})" if own and whole else "-"


def _costs(row: Row, result: Result, results: TableResults) -> dict[str, str]:
    """Time, memory and iterations beside the paper's, where its table has them (Tables 6, 8)."""
    plan = results.plan
    iterations = None if row.full_precision else plan.config(row, plan.seeds[0]).iterations
    minutes = _quantity(result.quantize_seconds, 60)
    here = {
        "hours": minutes if minutes == "-" else f"{minutes} min",
        "memory_mb": _quantity(result.peak_bytes, 1e6, 0),
        "iterations": _quantity(iterations, 1, 0),
    }
    units = {"hours": " h"}
    costs: dict[str, str] = {}
    for key in COSTS:
        if any(r.paper.get(key) is not None for r in results.table.rows):
            value = row.paper.get(key)
            papers = "-" if value is None else f"{value:g}{units.get(key, '')}"
            costs |= {f"{COST_HEADS[key]} paper": papers, f"{COST_HEADS[key]} here": here[key]}
    return costs


# ---- what stands around them ----


def reasons(results: TableResults) -> list[str]:
    """Why rows have no numbers, one line a reason."""
    found: dict[tuple[str, str | None], list[str]] = {}
    for row, result in results:
        if not result.done:
            found.setdefault((result.status, result.reason), []).append(row.id)
    return [f"{status} ({', '.join(rows)}): {reason}" for (status, reason), rows in found.items()]


def _conditions_of(result: Result) -> str:
    """How one row's numbers were made."""
    how = result.conditions
    seeds = ", ".join(str(s.seed) for s in result.seeds)
    model = "" if how.model is None else how.model.id
    features = "no" if how.features == "none" else how.features
    reference = f"reference {how.reference}" if how.reference else "no reference"
    return (
        f"{model}, {how.sampling}, {how.samples_per_seed} samples a seed, seeds {seeds}, "
        f"{features} features, {reference}"
    )


def _engines(results: TableResults) -> list[str]:
    """What drew the images of the quantized rows, as a sentence; none where all were simulated."""
    rows: dict[str, list[str]] = {}
    for row, result in results.done:
        if result.engine is not None and not row.full_precision:
            rows.setdefault(result.engine, []).append(row.id)
    integers = [engine for engine in rows if engine != SIMULATED]
    if not integers:
        return []
    words = [f"{len(rows[engine])} in integers (engine {engine})" for engine in integers]
    if SIMULATED in rows:
        words += [f"{len(rows[SIMULATED])} by simulation ({', '.join(rows[SIMULATED])})"]
    return [f"Images of quantized rows were drawn: {', '.join(words)}."]


def conditions(results: TableResults) -> str:
    """How the numbers were made, and what stands between them and the paper's."""
    plan = results.plan
    if not results.done:
        return f"Scale {plan.scale.name}: nothing was measured here. {plan.table.note}"
    kinds = sorted({_conditions_of(result) for _, result in results.done})
    words = [
        f"Scale {plan.scale.name}: {'; '.join(kinds)}.",
        *_engines(results),
        "Values: mean ± standard deviation over the seeds.",
    ]
    if plan.scale.name != "paper":
        words += [
            "The paper's numbers are of its own model and data: compare orders, not values.",
            "Few samples bias FID upwards, for all rows alike, and a row may come out below full "
            "precision by chance: the distance to the full-precision images from the same noise "
            "tells rows apart that FID cannot.",
        ]
    return " ".join([*words, plan.table.note])


def made_by(results: TableResults) -> str:
    """Commits, torch and machines of the rows that are there.

    A commit that had changes beside it is named so.
    """
    lines: dict[str, None] = {}
    for _, result in results.done:
        made = result.provenance[0]
        changed = " with changes" if made["dirty"] else ""
        machine = made["machine"]
        line = (
            f"made at commit {made['commit']}{changed}, torch {made['versions']['torch']}, "
            f"{machine['cpu']}, {machine['cores']} cores"
        )
        lines[line] = None
    return "\n".join(lines) or "nothing was made"


# ---- whole reports ----

# A number, with its spread, its unit, and its share of a whole; and what stands in place of one.
NUMBER = re.compile(r"[-+]?[\d.,]+%?( ± [\d.,]+)?( (MB|GB|min|h|s))?( \([\d.]+%\))?")
NO_NUMBER = ("-", "", FAILED, UNKNOWN, *Status)


def is_numeric(cells: pd.Series) -> bool:
    """Whether a column holds numbers, which stand at the right, as text."""
    texts = [str(cell) for cell in cells if cell not in NO_NUMBER]
    return bool(texts) and all(NUMBER.fullmatch(text) for text in texts)


def as_markdown(data: pd.DataFrame) -> str:
    """A data frame as a markdown table."""
    rule = ["---:" if is_numeric(data.iloc[:, i]) else "---" for i in range(data.shape[1])]
    lines = [list(map(str, data.columns)), rule]
    lines += data.astype(str).to_numpy().tolist()
    escaped = ([text.replace("|", "\\|") for text in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def as_text(text: str) -> str:
    """A text of names and messages in markdown: what looks like HTML in it is none."""
    return escape(text, quote=False)


def markdown(results: TableResults) -> str:
    """The whole report in markdown."""
    parts = [
        f"### {results.table.title}",
        as_text(conditions(results)),
        as_markdown(frame(results)),
        *(f"- {as_text(line)}" for line in reasons(results)),
        f"Paper and here ({LEGEND}):",
        as_markdown(side_by_side(results)),
    ]
    return "\n\n".join(parts) + "\n"


STYLE = """<style>
body {font: 15px sans-serif; max-width: 75em; margin: 2em auto}
table {border-collapse: collapse; display: block; overflow-x: auto}
td, th {padding: .3em .7em; text-align: right; white-space: nowrap}
td:nth-child(-n+2), th:nth-child(-n+2) {text-align: left}
tr:nth-child(even) {background: #f4f4f4}
</style>"""


def html(results: TableResults) -> str:
    """The whole report as a page."""
    title = escape(results.table.title)
    notes = "".join(f"<li>{escape(line)}</li>" for line in reasons(results))
    with pd.option_context("display.max_colwidth", None):
        here, both = (
            data.to_html(index=False, border=0) for data in (frame(results), side_by_side(results))
        )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{title}</title>{STYLE}<h1>{title}</h1>"
        f"<p>{escape(conditions(results))}</p>{here}<ul>{notes}</ul>"
        f"<h2>Paper and here</h2><p>{escape(LEGEND)}</p>{both}\n"
    )
