"""One row of a table as a result: without numbers, or the sum of its seeds, those of an earlier run among them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from questlib.errors import ConfigError
from reproduce.plan import Plan
from reproduce.provenance import provenance, row_processors
from reproduce.store import digest
from reproduce.tables.base import COSTS, Cell

if TYPE_CHECKING:
    from reproduce.pipeline import SeedRun

METRICS = (
    "fid",
    "sfid",
    "kid",
    "inception_score",
    "clip_score",
    "psnr_to_fp",
    "feature_distance_to_fp",
    "latent_snr_db",
)


def empty_result(cell: Cell, plan: Plan, status: str, reason: str | None) -> dict[str, Any]:
    """A result without numbers of ours; the paper's stand in their own place only."""
    setting = plan.drawing(cell)
    numbers = {
        m: {
            "value": None,
            "std": None,
            "paper": cell.paper.get(m),
            "independent": _independent(cell, m),
            "verdict": None,
        }
        for m in METRICS
    }
    return {
        "table": plan.table.name,
        "cell": cell.id,
        "scale": plan.scale.name,
        "status": status,
        "reason": reason,
        "label": cell.label,
        "preset": cell.preset,
        "weight_bits": cell.weight_bits,
        "act_bits": cell.act_bits,
        "overrides": plan.overrides(cell),
        "note": cell.note,
        "engine": None,
        "model": {"id": None, "sha256": None},
        "n_samples": 0,
        "seeds": list(plan.seeds),
        "dataset": cell.dataset,
        "sampler": setting.sampler,
        "num_inference_steps": setting.num_inference_steps,
        "eta": setting.eta,
        "guidance_scale": setting.guidance_scale,
        "features": setting.features,
        "reference": None,
        "captions": None,
        "clip": None,
        "metrics": numbers,
        "paper_costs": {k: cell.paper.get(k) for k in COSTS},
        "iterations": _iterations(cell, plan),
        "size_bytes": None,
        "paper_size_mb": cell.paper_size_mb,
        "peak_bytes": None,
        "seconds": {},
        "per_seed": [],
        "provenance": None,
    }


def stored_result(cell: Cell, plan: Plan) -> dict[str, Any]:
    """The row as its file has it; without one it is "not run", with the reason."""
    path = plan.row_file(cell.id)
    reason = (
        plan.missing(cell)
        or f"not run yet: python -m reproduce {plan.table.name} --scale {plan.scale.name}"
    )
    stored = json.loads(path.read_text()) if path.is_file() else {}
    empty = empty_result(
        cell, plan, "not run", reason
    )  # an older file lacks what was not known then
    return empty | stored | {"metrics": empty["metrics"] | stored.get("metrics", {})}


def _iterations(cell: Cell, plan: Plan) -> int | None:
    """Of finetuning, both stages; None for full precision."""
    if cell.preset is None:
        return None
    config = plan.config(cell, plan.seeds[0])
    return (config.te == "finetune") * config.finetuning.tla_iters + (
        config.finetuning.cma_layers != "none"
    ) * config.finetuning.cma_iters


def _independent(cell: Cell, metric: str) -> dict[str, float]:
    return {
        source: values[metric] for source, values in cell.independent.items() if metric in values
    }


def public_name(name: str) -> str:
    """An embedded name or hub id as it is; of a file or folder only its last part, no machine's paths."""
    return Path(name).name if Path(name).exists() else name


def measured_with(cell: Cell, plan: Plan, model_sha256: str) -> dict[str, Any]:
    """The files of a row, by public name; None: it has no use for one."""
    setting = plan.setting(cell)
    clip = None if setting.captions is None else setting.clip.removeprefix("local-dir:")
    files = {"reference": setting.reference, "captions": setting.captions, "clip": clip}
    names = {kind: None if file is None else public_name(file) for kind, file in files.items()}
    return names | {"model": {"id": public_name(setting.model), "sha256": model_sha256}}


def kept_result(cell: Cell, plan: Plan, model_sha256: str) -> dict[str, Any] | None:
    """The row's earlier result, if `plan.keep_seeds` and it holds seeds that are not asked for: `per_seed` has just these.

    They may come from another version of the code, which the row's provenance says. ConfigError where they were made with
    another configuration or model, drawn in another way, or measured with something else: those do not belong in one row.
    """
    path = plan.row_file(cell.id)
    stored = (
        json.loads(path.read_text()) if plan.keep_seeds and path.is_file() else {"status": None}
    )
    kept = [s for s in stored.get("per_seed", ()) if s["seed"] not in plan.seeds]
    if stored["status"] != "done" or not kept:
        return None
    drawing = plan.drawing(cell)
    expected = {
        name: getattr(drawing, name)
        for name in ("sampler", "num_inference_steps", "eta", "guidance_scale", "features")
    }
    expected |= measured_with(cell, plan, model_sha256)
    expected |= {"n_samples": plan.setting(cell).samples_per_seed * len(stored["per_seed"])}
    found = {
        name: stored.get(name) for name in expected
    }  # None: of before the prompts and the CLIP model were recorded
    for s in kept:
        config = None if cell.preset is None else plan.config(cell, s["seed"]).hash()
        (
            expected[f"configuration of seed {s['seed']}"],
            found[f"configuration of seed {s['seed']}"],
        ) = config, s["config_hash"]
    for name, value in expected.items():
        if found[name] != value:
            raise ConfigError(
                f"--keep-seeds: {path.name}: {name}: expected {value}, found {found[name]}"
            )
    return stored | {"per_seed": [{"processors": row_processors(stored)} | s for s in kept]}


def provenance_of(runs: list[SeedRun], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Of the first seed's samples, as of when they were made; `others`: what other products of the row were made by."""
    made = [p for run in runs for p in run.made] or [provenance()]
    if earlier is not None:
        before = earlier["provenance"]
        own = {k: v for k, v in before.items() if k in made[0]}
        kept = [own, *before.get("others", ())]
        made = kept + made if earlier["per_seed"][0]["seed"] < runs[0].seed else made + kept
    others = [p for i, p in enumerate(made) if p not in made[:i] and p != made[0]]
    return made[0] | ({"others": others} if others else {})


def summarize(
    cell: Cell,
    plan: Plan,
    runs: list[SeedRun],
    seeds: list[dict[str, Any]],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, the earlier result's among them; size and memory: of the largest; seconds:
    of the mean seed."""
    result, setting = empty_result(cell, plan, "done", None), plan.setting(cell)
    seeds = sorted(
        [*(earlier["per_seed"] if earlier is not None else ()), *seeds], key=lambda s: s["seed"]
    )
    for metric, entry in result["metrics"].items():
        values = [s["metrics"].get(metric) for s in seeds]
        if None not in values:
            entry["value"] = statistics.fmean(values)
            entry["std"] = statistics.stdev(values) if len(values) > 1 else None
    peaks = [s["peak_bytes"] for s in seeds if s["peak_bytes"] is not None]
    stages = seeds[0]["seconds"]
    return result | {
        "engine": plan.engine if cell.preset is not None else "full precision",
        **measured_with(cell, plan, runs[0].model_sha256),
        "n_samples": setting.samples_per_seed * len(seeds),
        "size_bytes": max(s["size_bytes"] for s in seeds),
        "peak_bytes": max(peaks) if peaks else None,
        "peak_bytes_is": "largest rise of resident memory (CPU) or allocated memory (CUDA) while quantizing and finetuning",
        "seconds": {
            stage: statistics.fmean(s["seconds"][stage] for s in seeds) for stage in stages
        },
        "seconds_are": "mean of a seed, as first measured, also where a product was read from the cache",
        "seeds": [s["seed"] for s in seeds],
        "per_seed": seeds,
        "provenance": provenance_of(runs, earlier)
        | {
            "config_hash": digest([s["config_hash"] for s in seeds]),
            "calibration_hash": digest([s["calibration_hash"] for s in seeds]),
            "command": plan.command,
        },
    }
