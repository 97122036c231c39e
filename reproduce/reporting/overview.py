"""The short view of the results: README's blocks, and the claims in full."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from reproduce.datasets import DATASETS
from reproduce.reporting import benchmarks, report, run_times
from reproduce.reporting.claims import CLAIMS, Claim, Holds, by_chance, judge
from reproduce.table_results import TableResults
from reproduce.tables.registry import all_tables

SIGNS = {
    Holds.HOLDS: "✅",
    Holds.IN_PART: "🟡",
    Holds.UNCLEAR: "➖",
    Holds.NOT: "❌",
    Holds.NOT_RUN: "⬜",
}


# ---- README's picture, and what quantizing takes ----


def picture(folder: Path) -> str:
    """Samples of Table 3's chosen rows."""
    results = report.committed("table3", folder)
    shown = results.table.picture
    if not all(results[row_id].done for row_id in shown):
        return "The picture appears with the first full run of `make reproduce-table3`."
    names = [results.table.row(row_id).title for row_id in shown]
    image = f"![From the same noise: {', '.join(names)}](results/mini/table3/{report.PICTURE})"
    return f"{image}\n\n*From the same noise, top to bottom: {'; '.join(names)}.*"


def budget(folder: Path) -> str:
    """What it takes to quantize: the embedded model as measured, Stable Diffusion as counted."""
    lines = [
        "| model | machine | time | memory |",
        "| --- | --- | --- | --- |",
    ]
    row = report.committed("table5", folder)["sd-w4a4-quest"]
    if row.done and row.quantize_seconds and row.peak_bytes:
        time = f"{row.quantize_seconds / 60:.1f} min"
        machine = benchmarks.machine_words(row.provenance[0]["machine"])
        lines.append(
            f"| `mini-sd`, at the tables' budget | one core of {machine} "
            f"| {time} | {row.peak_bytes / 1e9:.1f} GB |"
        )
    else:
        lines.append(f"| `mini-sd`, at the tables' budget | | {run_times.NOT_MEASURED} | |")
    return "\n".join([*lines, *benchmarks.finetuning_memory(folder)])


# ---- the paper's claims ----


@dataclass(frozen=True)
class Part:
    """Claims that are told together."""

    words: str
    prefix: str
    """Of the claims' texts."""

    several: str = "models"
    """What the claims are about, one each."""

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The claims that it is about."""
        return tuple(claim for claim in CLAIMS if claim.text.startswith(self.prefix))


# The paper's story in seven lines.
STORY: dict[str, tuple[Part, ...]] = {
    "QuEST beats Q-Diffusion at W4A4": (
        Part("our preset `quest`", "QuEST beats Q-Diffusion at W4A4"),
        Part("the text's own settings (`quest-paper`)", "QuEST by the text's settings"),
    ),
    "… and at 8-bit activations": (Part("`quest`", "QuEST beats Q-Diffusion at W8A8"),),
    "QuEST beats EfficientDM": (Part("`quest`", "QuEST beats EfficientDM"),),
    "The global loss helps": (Part("both TLA and CMA", "The global loss helps", "stages"),),
    "The local loss helps beside it": (Part("TLA", "For TLA both losses"),),
    "Finetuning few layers beats finetuning all": (
        Part("`quest`", "QuEST beats finetuning all weights"),
    ),
    "QuEST takes less time than Q-Diffusion": (Part("`quest`", "All of QuEST takes less time"),),
}


def main_claims(folder: Path) -> str:
    """The paper's story in seven lines, and a count of all claims."""
    results = report.all_committed(folder)
    lines = ["| the paper's claim | here, at `mini` scale |", "| --- | --- |"]
    for text, parts in STORY.items():
        answer = "<br>".join(_told(part, results) for part in parts)
        lines.append(f"| {text} | {answer} |")
    judged = [judge(claim, results) for claim in CLAIMS]
    found = Counter(judgement.holds for judgement in judged)
    counts = f"{found[Holds.HOLDS]} hold, {found[Holds.IN_PART]} hold in part, "
    counts += f"{found[Holds.NOT]} do not hold, {found[Holds.UNCLEAR]} cannot be told"
    counts += f", {found[Holds.NOT_RUN]} were not run" if found[Holds.NOT_RUN] else ""
    total = f"Of all {len(CLAIMS)} claims {counts}: [the list with numbers](docs/claims.md). "
    total += by_chance(judged)
    return "\n".join([*lines, "", total])


def _told(part: Part, results: Mapping[str, TableResults]) -> str:
    """One part: a sign, and how many of the claims hold, or what was measured for one claim."""
    judged = [judge(claim, results) for claim in part.claims]
    holds = [judgement.holds for judgement in judged]
    sign = SIGNS[next((h for h in Holds if set(holds) == {h}), Holds.IN_PART)]
    if set(holds) == {Holds.NOT_RUN}:
        words = str(Holds.NOT_RUN)
    elif len(judged) == 1:
        compared = judged[0].comparisons
        better = sum(c.holds for c in compared)
        several = f"better in {better} of {len(compared)} comparisons"
        words = judged[0].details if len(compared) <= 2 else several
    else:
        words = f"on {holds.count(Holds.HOLDS)} of {len(holds)} {part.several}"
        words += f", in part on {n}" if (n := holds.count(Holds.IN_PART)) else ""
        words += f", not to be told on {n}" if (n := holds.count(Holds.UNCLEAR)) else ""
        words += f", {n} not run" if (n := holds.count(Holds.NOT_RUN)) else ""
    return f"{sign} {part.words}: {words}"


def all_claims(folder: Path) -> str:
    """Every claim, whether it holds here, and the numbers."""
    results = report.all_committed(folder)
    judged = {claim: judge(claim, results) for claim in CLAIMS}
    lines = []
    for claim, judgement in judged.items():
        lines.append(
            {
                "the paper's claim": claim.text,
                "where": f"[{claim.where}](docs/results/{claim.table}.md)",
                "here": f"{SIGNS[judgement.holds]} {judgement}",
                "measured": judgement.details,
            }
        )
    return f"{report.as_markdown(pd.DataFrame(lines))}\n\n{by_chance(judged.values())}"


# ---- how to reproduce ----


def reproduce(folder: Path) -> str:
    """The commands that make tables, with the time that each took."""
    table2, everything = run_times.table_time("table2", folder), run_times.time_of_all(folder)
    lines = [
        ("make reproduce-table2", _duration(table2)),
        ("make reproduce-all", _duration(everything)),
        ("make reproduce-table3 SCALE=smoke", "minutes; the numbers mean nothing"),
    ]
    code = [f"{command:36}# {about}" for command, about in lines]
    return "\n".join(["```sh", *code, "```"])


def _duration(time: run_times.RunTime) -> str:
    """Minutes or hours, and on how many cores."""
    if time.minutes is None:
        return time.words
    cores = re.search(r"\d+ cores?", time.machine)
    long = time.minutes >= 120
    words = f"{time.minutes / 60:.0f} hours" if long else f"{time.minutes:.0f} min"
    return f"{words} on {cores[0]}" if cores else words


def paper_scale(folder: Path) -> str:
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
