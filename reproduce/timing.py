"""How long commands take: a whole run's time, or the sum over the stages of several runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from questlib.config import QuantConfig
from reproduce.provenance import machine
from reproduce.results import SeedResult
from reproduce.store import write_json
from reproduce.table_results import TableResults

Key = tuple[object, ...]  # a stage, and what decides its artifact


def record_time(results: TableResults, seconds: float, fresh: bool) -> None:
    """Write run.json: how long a full run takes, with no other table beside it.

    Nothing is written for other runs; `stage_seconds` is for these.

    Args:
        fresh: whether the run found no artifacts of earlier ones.
    """
    plan = results.plan
    alone = os.environ.get("QUEST_JOBS", "1") == "1"  # the Makefile sets it for reproduce-all
    ran = plan.as_it_is and not plan.choices.stored and len(plan.rows) == len(results)
    whole = ran and len(results.done) == len(results)
    if not (fresh and alone and whole):
        return
    scale = "" if plan.scale.name == "mini" else f" SCALE={plan.scale.name}"
    target = f"make {plan.table.target}{scale}"
    run = {
        "command": target if plan.choices.engine is None else plan.command,
        "seconds": round(seconds, 1),
        "machine": machine(),
    }
    write_json(plan.folder / "run.json", run)


class _Longest(dict[Key, float]):
    """Seconds by key; of several for one key the longest."""

    def count(self, key: Key, seconds: float) -> None:
        self[key] = max(self.get(key, 0.0), seconds)


class _Reconstruction(NamedTuple):
    """Seconds of AdaRound, together with those of activation scales after it."""

    seconds: float
    calibration: str
    weights: Key
    scales: Key | None


def stage_seconds(tables: Iterable[TableResults]) -> dict[Key, float]:
    """Seconds of each artifact that one command would make for all rows of these tables.

    What rows share is there once. Where different versions of the code, or machines, measured it,
    the longest counts.

    Activation scales that were reconstructed after AdaRound are in one number with it. They are
    told apart by a row of the same calibration and weights that has AdaRound alone; without such
    a row AdaRound counts again.

    Returns:
        Seconds by stage and what decides its artifact.
    """
    found = _Longest()
    reconstructions: list[_Reconstruction] = []
    for results in tables:
        plan = results.plan
        for row, result in results.done:
            how = result.conditions
            model = None if how.model is None else how.model.sha256
            for seed in result.seeds:
                start = (plan.scale.name, how.dataset, model, seed.seed)
                # Made again, also where another table has it.
                own = None if plan.table.shares else seed.config_hash
                samples = (*start, seed.config_hash, how.sampling, result.engine, own)
                found.count(("sample", *samples), seed.seconds["sample"])
                found.count(("evaluate", *samples, how.features), seed.seconds["evaluate"])
                if row.full_precision:
                    continue
                config = plan.config(row, seed.seed)
                _count_quantizing(found, seed, config, start, own)
                if seed.seconds["reconstruct"]:
                    reconstructions.append(_reconstruction(seed, config, start, own))
    _count_reconstructions(found, reconstructions)
    return dict(found)


def _count_quantizing(
    found: _Longest, seed: SeedResult, config: QuantConfig, start: Key, own: str | None
) -> None:
    """Count the stages before sampling, but for the reconstruction."""
    seconds = seed.seconds
    found.count(("calibrate", *start), seconds["calibrate"])
    found.count(("ranges", *start, config.range_key(), own), seconds["ranges"])
    found.count(
        ("checkpoint", *start, seed.config_hash, own),
        seconds["finetune"] + seconds.get("correction", 0.0),
    )


def _reconstruction(
    seed: SeedResult, config: QuantConfig, start: Key, own: str | None
) -> _Reconstruction:
    scales = ("act scales", *start, seed.config_hash, own)
    return _Reconstruction(
        seed.seconds["reconstruct"],
        seed.artifacts["calibrate"],
        ("adaround", *start, config.adaround_key(), own),
        scales if config.act_recon.enabled else None,
    )


def _count_reconstructions(found: _Longest, reconstructions: list[_Reconstruction]) -> None:
    """Count AdaRound and activation scales, told apart where a row has AdaRound alone."""
    alone = {(r.calibration, r.weights): r.seconds for r in reconstructions if r.scales is None}
    for r in reconstructions:
        if r.scales is None:
            found.count(r.weights, r.seconds)
        else:
            found.count(r.scales, r.seconds - alone.get((r.calibration, r.weights), 0.0))
