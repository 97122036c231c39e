"""From result JSON to tables: terminal, markdown, HTML. Every number comes from a result file or from the table's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from reproduce.plan import Plan, make_plan
from reproduce.results import stored_result
from reproduce.store import write_atomically, write_json
from reproduce.tables.base import Number
from reproduce.verdicts import verdict

JUDGED = ("fid", "sfid", "kid", "inception_score", "clip_score")
HEADS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "IS",
    "clip_score": "CLIP score x100",
    "kid": "KID x1000",
    "psnr_to_fp": "PSNR to FP, dB",
    "feature_distance_to_fp": "distance to FP",
}
IF_REPORTED = ("inception_score", "clip_score")  # shown where the paper's table has them
PAIRED = "feature_distance_to_fp"  # compared with the order of the paper's FIDs: it resolves what few samples' FID cannot
FACTORS = {"kid": 1000.0}


def load_results(plan: Plan) -> list[dict[str, Any]]:
    """One result per cell of the whole table, in its order; a cell without a file is "not run", with the reason."""
    return with_verdicts(plan, [stored_result(cell, plan) for cell in plan.table.cells])


def with_verdicts(plan: Plan, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same results, each metric that the paper's tables use with its verdict."""
    by_id = {r["cell"]: r for r in results}
    for cell in plan.table.cells:
        base = None if cell.against is None else plan.table.cell(cell.against)
        for metric, entry in by_id[cell.id]["metrics"].items():
            other = None if base is None else by_id[base.id]
            if metric in JUDGED:
                entry["verdict"] = verdict(metric, cell, base, by_id[cell.id], other)
            elif metric == PAIRED and base is not None and base.preset is not None:
                entry["verdict"] = verdict(
                    metric, cell, base, by_id[cell.id], other, claim=plan.table.claim
                )
    return results


def finish(plan: Plan) -> list[dict[str, Any]]:
    """Write verdicts into the result files, and the table as markdown and HTML. Call it when all cells are there."""
    results = load_results(plan)
    for result in results:
        path = plan.row_file(result["cell"])
        if path.is_file():
            write_json(path, result)
    write_atomically(plan.folder / "table.md", markdown(plan, results))
    write_atomically(plan.folder / "table.html", html(plan, results))
    return results


def _ours(result: dict[str, Any], metric: str) -> str:
    entry = result["metrics"][metric]
    if result["status"] != "done":
        return result["status"]
    if entry["value"] is None:
        return "-"
    factor = FACTORS.get(metric, 1.0)
    digits = 3 if metric == "feature_distance_to_fp" else 2
    spread = "" if entry["std"] is None else f" ± {entry['std'] * factor:.{digits}f}"
    return f"{entry['value'] * factor:.{digits}f}{spread}"


def _paper(value: Number, note: str) -> str:
    if value is None and note.startswith("the paper has no such row"):
        return "not in the paper"
    return "not reported" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _quantity(value: float | None, unit: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def quantize_seconds(r: dict[str, Any]) -> float | None:
    """Of calibrating, quantizing, finetuning; None for full precision and for rows without a result."""
    if r["preset"] is None or r["status"] != "done":
        return None
    return sum(v for k, v in r["seconds"].items() if k not in ("sample", "evaluate"))


def _trained(r: dict[str, Any]) -> float | None:
    """The share of the quantized layers' weights that finetuning trains; None where nothing is finetuned."""
    return (
        next((s["finetune"]["trained_fraction"] for s in r["per_seed"] if s.get("finetune")), None)
        or None
    )


def reported(results: list[dict[str, Any]]) -> list[str]:
    """The metrics that the paper's table has."""
    return [
        m for m in HEADS if any(r["metrics"].get(m, {}).get("paper") is not None for r in results)
    ]


def bits(r: dict[str, Any]) -> str:
    """Of a row's weights and activations, as `Cell.bits` has it."""
    return "32/32" if r["preset"] is None else f"W{r['weight_bits']}A{r['act_bits']}"


def _name(r: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, str]:
    """The columns that say which row this is; the data set where the table has several."""
    several = len({x["dataset"] for x in results}) > 1
    return ({"data": r["dataset"]} if several else {}) | {"bits": bits(r), "method": r["label"]}


def frame(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Our numbers: mean ± sample standard deviation over the seeds."""
    heads = {m: head for m, head in HEADS.items() if m not in IF_REPORTED or m in reported(results)}
    rows = []
    for r in results:
        row = _name(r, results)
        row |= {"preset": r["preset"] or "-"} | {
            head: _ours(r, metric) for metric, head in heads.items()
        }
        if any(_trained(x) is not None for x in results):
            row["weights trained"] = "-" if _trained(r) is None else f"{_trained(r):.0%}"
        row["size MB"] = _quantity(r["size_bytes"], 1e6, 2)
        row["quantize s"] = _quantity(quantize_seconds(r), 1, 0)
        row["memory MB"] = _quantity(r["peak_bytes"], 1e6, 0)
        rows.append(row)
    return pd.DataFrame(rows)


def side_by_side(results: list[dict[str, Any]]) -> pd.DataFrame:
    """Paper, independent re-runs and ours, with the verdict; metrics that the paper's table has."""
    metrics = reported(results)
    rows = []
    for r in results:
        row = _name(r, results)
        for m in metrics:
            entry = r["metrics"][m]
            others = ", ".join(
                f"{name} {value:.2f}" for name, value in entry["independent"].items()
            )
            row |= {
                f"{HEADS[m]} paper": _paper(entry["paper"], r["note"]),
                f"{HEADS[m]} others": others or "-",
                f"{HEADS[m]} ours": _ours(r, m),
            }
            row[f"{HEADS[m]} verdict"] = entry["verdict"]
        row |= _sizes(r, results) | _costs(r, results)
        row["verdict by distance to FP"] = r["metrics"][PAIRED]["verdict"] or "-"
        row = {
            k: v
            for k, v in row.items()
            if not k.endswith(" others")
            or any(x["metrics"][m]["independent"] for x in results for m in metrics)
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _sizes(r: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, str]:
    """The checkpoint's size as a share of full precision's, where the paper's table has sizes."""
    full = next(
        (
            x
            for x in results
            if x["preset"] is None and x["dataset"] == r["dataset"] and x["paper_size_mb"]
        ),
        None,
    )
    if full is None:
        return {}
    mb = {
        "paper": (r["paper_size_mb"], full["paper_size_mb"]),
        "ours": (r["size_bytes"], full["size_bytes"]),
    }
    unit = {"paper": 1.0, "ours": 1e6}
    return {
        f"size {who}": f"{own / unit[who]:.1f} MB ({own / whole:.1%})" if own and whole else "-"
        for who, (own, whole) in mb.items()
    }


def _costs(r: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, str]:
    """Hours and memory of quantizing beside the paper's, where its table has them (Tables 6 and 8)."""
    costs: dict[str, str] = {}
    ours = {
        "hours": _quantity(quantize_seconds(r), 3600, 3),
        "memory_mb": _quantity(r["peak_bytes"], 1e6, 0),
    }
    ours["iterations"] = _quantity(r["iterations"], 1, 0)
    for key, head in (("hours", "hours"), ("memory_mb", "memory MB"), ("iterations", "iterations")):
        if any(x["paper_costs"][key] is not None for x in results):
            value = r["paper_costs"][key]
            costs[f"{head} paper"] = "not reported" if value is None else f"{value:g}"
            costs[f"{head} ours"] = ours[key]
    return costs


def reasons(results: list[dict[str, Any]]) -> list[str]:
    """Why cells have no numbers, one line a reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if r["status"] != "done":
            found.setdefault((r["status"], r["reason"]), []).append(r["cell"])
    return [f"{status} ({', '.join(cells)}): {reason}" for (status, reason), cells in found.items()]


def sampling_words(r: dict[str, Any]) -> str:
    guidance = f", guidance {r['guidance_scale']:g}" if r["guidance_scale"] != 1 else ""
    return f"{r['sampler'].upper()} {r['num_inference_steps']} steps, eta {r['eta']:g}{guidance}"


def conditions(plan: Plan, results: list[dict[str, Any]]) -> str:
    """How the numbers were made, from the results themselves; also what stands between them and the paper's."""
    done = [r for r in results if r["status"] == "done"]
    if not done:
        return f"Scale {plan.scale.name}: nothing was measured here. {plan.table.note}"
    kinds = sorted(
        {
            f"{r['model']['id']}, {sampling_words(r)}, {r['n_samples'] // len(r['seeds'])} samples a seed, seeds "
            f"{', '.join(map(str, r['seeds']))}, {r['features'].replace('none', 'no')} features, "
            + (f"reference {r['reference']}" if r["reference"] else "no reference")
            + ("" if plan.engine == "fake" else f", quantized models run by engine {plan.engine}")
            for r in done
        }
    )
    words = f"Scale {plan.scale.name}: {'; '.join(kinds)}. Values: mean ± standard deviation over the seeds. "
    if plan.scale.name != "paper":
        words += "The paper's numbers are of its own model and data: compare orders, not values. "
        words += "Few samples bias FID upwards, for all rows alike, and a row may come out below full precision by chance: "
        words += "the distance to the full-precision images from the same noise tells rows apart that FID cannot. "
    if shared := [f"{r['cell']} ({r['same_as']})" for r in done if r.get("same_as")]:
        words += f"Taken from an earlier run of another table, which may show a later one, of another machine: {', '.join(shared)}. "
    return words + plan.table.note


def made_by(results: list[dict[str, Any]]) -> str:
    """Commits, torch and machines of the rows that are there; a commit with changes beside it is named so."""
    made = [r["provenance"] for r in results if r["status"] == "done"]
    lines = dict.fromkeys(
        f"made at commit {p['commit']}{' with changes' if p['dirty'] else ''}, torch {p['versions']['torch']}, "
        f"{p['machine']['cpu']}, {p['machine']['cores']} cores"
        for p in made
    )
    return "\n".join(lines) or "nothing was made"


def as_markdown(data: pd.DataFrame) -> str:
    cells = [
        list(map(str, data.columns)),
        ["---"] * len(data.columns),
        *data.astype(str).values.tolist(),
    ]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells)


def markdown(plan: Plan, results: list[dict[str, Any]]) -> str:
    parts = [f"### {plan.table.title}", conditions(plan, results), as_markdown(frame(results))]
    parts += [f"- {line}" for line in reasons(results)]
    return "\n\n".join([*parts, "Paper and ours:", as_markdown(side_by_side(results))]) + "\n"


def html(plan: Plan, results: list[dict[str, Any]]) -> str:
    style = "<style>body{font:15px sans-serif;max-width:75em;margin:2em auto}td,th{padding:.3em .7em;text-align:left}</style>"
    notes = "".join(f"<li>{line}</li>" for line in reasons(results))
    with pd.option_context("display.max_colwidth", None):  # verdicts are whole sentences
        tables = [
            data.to_html(index=False, border=0) for data in (frame(results), side_by_side(results))
        ]
    return (
        f"<!doctype html><meta charset='utf-8'><title>{plan.table.title}</title>{style}<h1>{plan.table.title}</h1>"
        f"<p>{conditions(plan, results)}</p>{tables[0]}<ul>{notes}</ul><h2>Paper and ours</h2>{tables[1]}\n"
    )


def terminal(plan: Plan, results: list[dict[str, Any]]) -> str:
    wide = {"index": False, "justify": "left"}
    parts = [
        plan.table.title,
        conditions(plan, results),
        frame(results).to_string(**wide),
        *reasons(results),
    ]
    return "\n\n".join([*parts, side_by_side(results).to_string(**wide)])


def as_json(plan: Plan, results: list[dict[str, Any]]) -> str:
    about = {
        "table": plan.table.name,
        "title": plan.table.title,
        "scale": plan.scale.name,
        "note": plan.table.note,
    }
    return json.dumps(about | {"results": results}, indent=1, allow_nan=False)


def committed(table: str, results: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """Plan and results of a full mini run under `results`, where nothing is written; for the README and the site."""
    plan = make_plan(table, scale="mini", results=results, work=results, dry=True)
    return plan, load_results(plan)
