"""What a command takes: the time of a whole run, or the sum over the stages of runs in several goes."""

from __future__ import annotations

import os
from typing import Any

from reproduce.plan import Plan, make_plan
from reproduce.provenance import machine
from reproduce.store import write_json


def record_time(plan: Plan, results: list[dict[str, Any]], seconds: float, fresh: bool) -> None:
    """run.json: how long a full run takes that finds no products of earlier ones, with no other table beside it.

    `stage_seconds` is for the others.
    """
    alone = os.environ.get("QUEST_JOBS", "1") == "1"  # the Makefile sets it for reproduce-all
    ran = plan.as_it_is and not plan.stored and len(plan.cells) == len(plan.table.cells)
    whole = ran and all(r["status"] == "done" for r in results)
    if not (fresh and alone and whole):
        return
    target = f"make {plan.table.target}" + (
        "" if plan.scale.name == "mini" else f" SCALE={plan.scale.name}"
    )
    target = target if plan.engine == "fake" else plan.command
    write_json(
        plan.folder / "run.json",
        {"command": target, "seconds": round(seconds, 1), "machine": machine()},
    )


def stage_seconds(results: list[dict[str, Any]]) -> dict[tuple, float]:
    """Seconds of each stage's product that one command would make for all these rows, by stage and what decides the product.

    What rows share is there once, also where different versions of the code, or machines, measured it: the longest counts.
    Activation scales that were reconstructed after AdaRound are in one number with it; they are told apart by a row of the
    same calibration and weights that has AdaRound alone. Without such a row AdaRound counts again.
    """
    plans = {
        key: make_plan(key[0], scale=key[1], dry=True)
        for key in {(r["table"], r["scale"]) for r in results}
    }
    found: dict[tuple, float] = {}
    reconstructed: list[
        tuple
    ] = []  # (seconds, calibration product, AdaRound's key, key of the scales or None)

    def count(key: tuple, seconds: float) -> None:
        found[key] = max(found.get(key, 0.0), seconds)

    for r in results:
        plan = plans[r["table"], r["scale"]]
        cell = plan.table.cell(r["cell"])
        drawn = (r["sampler"], r["num_inference_steps"], r["eta"], r["guidance_scale"], r["engine"])
        for seed in r["per_seed"]:
            seconds, start = (
                seed["seconds"],
                (r["scale"], r["dataset"], r["model"]["sha256"], seed["seed"]),
            )
            own = (
                None if plan.table.shares else seed["config_hash"]
            )  # made again, also where another table has it
            samples = (*start, seed["config_hash"], *drawn, own)
            count(("sample", *samples), seconds["sample"])
            count(("evaluate", *samples, r["features"]), seconds["evaluate"])
            if cell.preset is None:
                continue
            count(("calibrate", *start), seconds["calibrate"])
            config = plan.config(cell, seed["seed"])
            count(("ranges", *start, config.range_key(), own), seconds["ranges"])
            count(
                ("checkpoint", *start, seed["config_hash"], own),
                seconds["finetune"] + seconds.get("correction", 0.0),
            )
            if seconds["reconstruct"]:
                scales = (
                    ("act scales", *start, seed["config_hash"], own)
                    if config.act_recon.enabled
                    else None
                )
                weights = ("adaround", *start, config.adaround_key(), own)
                reconstructed.append(
                    (seconds["reconstruct"], seed["products"]["calibrate"], weights, scales)
                )
    alone = {entry[1:3]: entry[0] for entry in reconstructed if entry[3] is None}
    for seconds, calibration, weights, scales in reconstructed:
        if scales is None:
            count(weights, seconds)
        else:
            count(scales, seconds - alone.get((calibration, weights), 0.0))
    return found
