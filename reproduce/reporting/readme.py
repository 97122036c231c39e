"""README blocks between `<!-- generated: NAME -->` and `<!-- end: NAME -->`, written from the committed results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from questlib.errors import QuestError
from reproduce import timing
from reproduce.datasets import DATASETS
from reproduce.figures import engine, plots
from reproduce.reporting import claims, report
from reproduce.scales import SCALES
from reproduce.store import write_atomically, write_json
from reproduce.tables.registry import all_tables

BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", re.S)
PICTURE = "picture.png"
UNKNOWN = "not measured yet | not measured yet"


def _machine(about: dict[str, Any]) -> str:
    cores = f"{about['cores']} core{'s' if about['cores'] > 1 else ''}"
    return ", ".join([about["cpu"], cores, f"{about['memory_gib']} GiB", *about["gpus"]])


def commands(results: Path) -> str:
    """The commands and their time, install apart: of a whole run, or the sum over stages that were run in several goes."""
    lines = ["| command | what it does | measured | on |", "| --- | --- | --- | --- |"]
    lines.append(
        f"| `make test` | lint, tests, all notebooks at smoke scale | {_run(results / 'mini' / 'test.json') or UNKNOWN} |"
    )
    everything = []
    for name, table in all_tables().items():
        _, found = report.committed(name, results)
        everything += found if table.in_paper else []
        took = _run(results / "mini" / name / "run.json") or _sum(found)
        lines.append(f"| `make {table.target}` | {table.title}, mini scale | {took} |")
    about = "the paper's tables and figures, all but the ablation; what they share is made once"
    lines.append(
        f"| `make reproduce-all` | {about} | {_goes(results / 'mini' / 'all-time', everything) or _sum(everything)} |"
    )
    return "\n".join(lines)


def _run(path: Path) -> str | None:
    """ "time of a whole run | machine"."""
    if not path.is_file():
        return None
    run = json.loads(path.read_text())
    return f"{run['seconds'] / 60:.1f} min | {_machine(run['machine'])}"


def _machines(found: list[dict[str, Any]]) -> str:
    return "; ".join(
        sorted({_machine(r["provenance"]["machine"]) for r in found if r["status"] == "done"})
    )


def _goes(path: Path, found: list[dict[str, Any]]) -> str | None:
    """What the Makefile noted of `make reproduce-all`, up to its first end with status 0, what came later where it took a minute,
    and the rows' machines; None without a whole run."""
    goes = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    ends = [i for i, go in enumerate(goes) if go[-1] == "0"]
    if not ends or goes[0] == ["warm"]:
        return None
    counted = goes[: ends[0] + 1]
    several = f" in {len(counted)} goes" if len(counted) > 1 else ""
    whole, later = (sum(int(go[0]) for go in part) / 60 for part in (counted, goes[len(counted) :]))
    again = f"; later, rows of newer code: {later:.1f} min" if later >= 1 else ""
    return f"{whole:.1f} min{several}{again} | {_machines(found)}"


def _sum(found: list[dict[str, Any]]) -> str:
    """ "time of the rows that were run | machines"."""
    done = [r for r in found if r["status"] == "done"]
    if not done:
        return UNKNOWN
    runs, of = sum(len(r["per_seed"]) for r in done), sum(len(SCALES["mini"].seeds) for _ in found)
    rest = "" if runs == of else f", {runs} of {of}"
    minutes = sum(timing.stage_seconds(done).values()) / 60
    return f"{minutes:,.0f} core min (sum over rows and seeds{rest}) | {_machines(done)}"


def picture(results: Path) -> str:
    plan, found = report.committed("table3", results)
    if any(r["status"] != "done" for r in found if r["cell"] in plan.table.picture):
        return "The picture appears with the first full run of `make reproduce-table3`."
    names = " / ".join(
        plan.table.cell(c).label
        + ("" if plan.table.cell(c).preset is None else " " + plan.table.cell(c).bits)
        for c in plan.table.picture
    )
    return (
        f"![{names}](results/mini/table3/{PICTURE})\n\nTop to bottom, from the same noise: {names}."
    )


def tables(results: Path) -> str:
    """Every table, folded up: how much of it is there, and paper and ours side by side."""
    parts = []
    for name in all_tables():
        plan, found = report.committed(name, results)
        done = sum(r["status"] == "done" for r in found)
        # Of quantized rows against quantized rows: that a baseline is worse than full precision says little of the paper.
        rows = [
            r
            for c, r in zip(plan.table.cells, found, strict=True)
            if c.against and plan.table.cell(c.against).preset
        ]
        verdicts = [r["metrics"][m]["verdict"] or "" for r in rows for m in report.reported(found)]
        counts = {
            w: sum(w in v for v in verdicts) for w in ("as in the paper", "differs from the paper")
        }
        summary = f"<b>{plan.table.title}</b>: {done} of {len(found)} rows done"
        if any(counts.values()):
            summary += f"; verdicts between quantized rows: {', '.join(f'{n} {w}' for w, n in counts.items())}"
        text = (
            report.markdown(plan, found)
            if done
            else "\n".join(f"- {line}" for line in report.reasons(found))
        )
        parts.append(f"<details><summary>{summary}</summary>\n\n{text.rstrip()}\n\n</details>")
    return "\n\n".join(parts)


def claims_block(results: Path) -> str:
    found = {name: report.committed(name, results)[1] for name in all_tables()}
    rows = []
    for claim in claims.CLAIMS:
        word, words = claims.judge(claim, found)
        rows.append(
            {
                "the paper's claim": claim.text,
                "where": claim.where,
                "here": f"**{word}**",
                "measured": words,
            }
        )
    return report.as_markdown(pd.DataFrame(rows))


def equality(found: dict[str, Any]) -> list[str]:
    first = found["results"][0]
    counts = f"{first['metrics']['cpu']['n_samples']} images; reference and float64: {first['cpu_against_reference']['samples']}"
    heading = f"`python benchmarks/equality.py CHECKPOINTS` ({found['model']}, {counts}):"
    return [heading, report.as_markdown(engine.equality_table(found))]


def speed(found: dict[str, Any]) -> list[str]:
    parts = []
    for model, about in found["models"].items():
        where = f"{model}, batch {about['batch']}, {_machine(about['provenance']['machine'])}"
        parts += [
            f"`python benchmarks/cpu_unet.py` ({where}):",
            report.as_markdown(engine.speed_table(found, model)),
        ]
    return parts


def engines(results: Path) -> str:
    """The integer engine: is it equal, and how fast; from benchmarks/results beside `results`."""
    parts = []
    for name, write in (("equality", equality), ("cpu_unet", speed)):
        path = results.parent / "benchmarks" / "results" / f"{name}.json"
        parts += (
            write(json.loads(path.read_text()))
            if path.is_file()
            else [f"`benchmarks/{name}.py`: not measured yet."]
        )
    return "\n\n".join(parts)


def full_size(results: Path) -> str:
    """Full-size models: time and memory of quantization on this machine, and what finetuning takes on a GPU."""
    folder, parts = results.parent / "benchmarks" / "results", []
    for name, rows_of in (("full_size", quantized_row), ("finetune_memory", finetune_row)):
        path = folder / f"{name}.json"
        if path.is_file():
            table = pd.DataFrame(
                [
                    rows_of(model, found)
                    for model, found in json.loads(path.read_text())["models"].items()
                ]
            )
            parts.append(f"`python benchmarks/{name}.py`:\n\n{report.as_markdown(table)}")
        else:
            parts.append(f"`benchmarks/{name}.py`: not measured yet.")
    return "\n\n".join(parts)


def quantized_row(model: str, r: dict[str, Any]) -> dict[str, str]:
    row = {
        "model": model,
        "parameters, M": f"{r['parameters'] / 1e6:.1f}",
        "fp32, MB": f"{r['fp32_bytes'] / 1e6:.0f}",
    }
    row |= {
        "W4A4 on disk, MB": f"{r['checkpoint_bytes'] / 1e6:.0f}",
        "peak memory, GB": f"{r['peak_bytes'] / 1e9:.1f}",
    }
    row |= {
        f"{stage}, s": f"{r['seconds'][stage]:.0f}"
        for stage in ("calibrate", "quantize", "finetune", "save")
    }
    return row | {"on": f"{_machine(r['provenance']['machine'])}, {r['threads']} thread(s)"}


def finetune_row(model: str, counts: list[dict[str, Any]]) -> dict[str, str]:
    name = {False: "", True: ", save_memory"}
    return {"model": model} | {
        f"batch {c['batch_size']}{name[c['save_memory']]}, GB": f"{c['bytes'] / 1e9:.1f}"
        for c in counts
    }


def machines(results: Path) -> str:
    """The same seeds on two machines; from benchmarks/results beside `results`."""
    path = results.parent / "benchmarks" / "results" / "machines.json"
    if not path.is_file():
        return "`benchmarks/machines.py`: not measured yet."
    found = json.loads(path.read_text())
    names, rows = [_machine(run["machine"]) for run in found["runs"]], []
    for metric in found["between_seeds"]:
        spread = {k: f"{found[k][metric]:.2f}" for k in ("between_machines", "between_seeds")}
        far = max(found["rows"], key=lambda r: abs(r[metric][0] - r[metric][1]))
        most = f"{far[metric][0]:.2f} and {far[metric][1]:.2f} ({far['cell']}, seed {far['seed']})"
        rows.append(
            {
                "metric": report.HEADS[metric],
                "one seed, two machines: RMS difference": spread["between_machines"],
                "two seeds, one machine: RMS difference": spread["between_seeds"],
                "pairs": len(found["rows"]),
                "largest": most,
            }
        )
    heading = f"`python benchmarks/machines.py RESULTS` ({found['table']}; {' | '.join(names)}):"
    return f"{heading}\n\n{report.as_markdown(pd.DataFrame(rows))}"


def paper(results: Path) -> str:
    """What `paper` scale needs and how it samples, by data set; and each table's command."""
    parts = [
        "| data | config | model at | reference or prompts | samples a row | sampler |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for d in DATASETS.values():
        s = d.settings["paper"]
        reference = d.reference_env if d.has_reference else d.captions_env
        how = report.sampling_words(vars(s))
        parts.append(
            f"| {d.title} | `{d.config}` | `${d.model_env}` | `${reference}` | {s.samples_per_seed:,} | {how} |"
        )
    parts += ["", "| command | | data | rows |", "| --- | --- | --- | --- |"]
    for t in all_tables().values():
        data = ", ".join(dict.fromkeys(c.dataset for c in t.cells))
        command = f"python -m reproduce {t.name} --scale paper"
        parts.append(f"| `{command}` | {t.title} | {data} | {len(t.cells)} |")
    return "\n".join(parts)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "commands": commands,
    "picture": picture,
    "engines": engines,
    "full-size": full_size,
    "machines": machines,
    "paper": paper,
    "claims": claims_block,
    "tables": tables,
}


def render(text: str, results: Path) -> str:
    """`text` with every block written again. QuestError for an unknown block, or one that the README lacks."""
    names = [m.group(2) for m in BLOCK.finditer(text)]
    wrong = sorted(set(names) ^ set(BLOCKS)) or (
        len(names) != len(set(names)) and ["a block twice"]
    )
    if wrong:
        raise QuestError(
            f"README: expected one block each of {', '.join(BLOCKS)}; wrong or missing: {', '.join(wrong)}"
        )
    return BLOCK.sub(lambda m: m.group(1) + BLOCKS[m.group(2)](results) + "\n" + m.group(3), text)


def update(readme: Path, results: Path, work: Path) -> bool:
    """Write README's blocks, all verdicts, the picture, the time that `make test` left in `work`; True if README changed."""
    from reproduce.provenance import machine

    if (test := work / "test-time.json").is_file():
        took = json.loads(test.read_text())
        write_json(
            results / "mini" / "test.json", {"command": "make test"} | took | {"machine": machine()}
        )
    for name in all_tables():
        plan, found = report.committed(name, results)
        if any(r["status"] == "done" for r in found):
            report.finish(plan)  # verdicts and tables follow from the result files, too
    plan, found = report.committed("table3", results)
    if all(r["status"] == "done" for r in found if r["cell"] in plan.table.picture):
        plots.save(plots.picture(plan, found), plan.folder / PICTURE)
    old = readme.read_text()
    new = render(old, results)
    write_atomically(readme, new)
    return new != old
