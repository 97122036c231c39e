"""Results made up for tests, as a run would have made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from reproduce.datasets import Sampling
from reproduce.plan import Plan
from reproduce.provenance import Provenance
from reproduce.results import (
    FULL_PRECISION,
    Conditions,
    Model,
    Result,
    SeedResult,
    Status,
)
from reproduce.table_results import TableResults

STAGES = ("calibrate", "ranges", "reconstruct", "finetune", "sample", "evaluate")
CONDITIONS = Conditions(
    model=Model(id="mini-ldm4", sha256="0" * 64),
    dataset="bedrooms",
    sampling=Sampling("ddim", 20, 0.0, 1.0),
    samples_per_seed=1000,
    features="mini",
    reference="mini-ldm4",
    captions=None,
    clip=None,
)


def made_on(cpu: str) -> Provenance:
    """The provenance of an artifact that was made on this processor."""
    return {
        "commit": "c" * 40,
        "dirty": False,
        "versions": {"torch": "2.0"},
        "machine": {"system": "Linux", "cpu": cpu, "cores": 2, "memory_gib": 24, "gpus": []},
    }


def seed_result(seed: int = 0, **changes: Any) -> SeedResult:
    """One seed of a quantized row."""
    given: dict[str, Any] = dict(
        seed=seed,
        metrics={},
        seconds=dict.fromkeys(STAGES, 0.0),
        size_bytes=1,
        peak_bytes=1,
        ranges_cached=False,
        reconstruct_cached=False,
        trained_weights=0,
        trained_fraction=0.0,
        interrupted=0,
        config_hash="0",
        calibration_hash="0",
        about={},
        artifacts={"sample": "0", "evaluate": "0", "checkpoint": "0", "calibrate": "0"},
        processors=("A",),
    )
    return SeedResult(**(given | changes))


def made_result(
    metrics: Mapping[str, Sequence[float | None]], first_seed: int = 0, **changes: Any
) -> Result:
    """A row with these metrics, each by seed; seeds count from `first_seed`."""
    by_seed = [
        dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)
    ]
    seeds = [seed_result(i, metrics=found) for i, found in enumerate(by_seed, first_seed)]
    given: dict[str, Any] = dict(
        table="table3",
        row="row",
        scale="mini",
        status=Status.DONE,
        engine="fake",
        conditions=CONDITIONS,
        seeds=tuple(seeds),
        provenance=(made_on("A"),),
        command="python -m reproduce table3",
    )
    return Result(**(given | changes))


def not_made(status: Status = Status.NOT_RUN, reason: str = "needs weights") -> Result:
    """A row without numbers."""
    result = made_result({})
    return dataclasses.replace(result, status=status, reason=reason, engine=None, provenance=())


def made_table(plan: Plan, results: Mapping[str, Result]) -> TableResults:
    """The results of a plan's table; rows that `results` does not have were not run."""
    found = {}
    for row in plan.table.rows:
        result = results.get(row.id, not_made())
        engine = FULL_PRECISION if row.full_precision and result.done else result.engine
        names = dict(table=plan.table.name, row=row.id, scale=plan.scale.name, engine=engine)
        found[row.id] = dataclasses.replace(result, **names)
    return TableResults(plan, found)
