"""A plan: one table at one scale, with all choices checked before any long work."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from questlib.config import QuantConfig
from questlib.errors import ConfigError, check_writable
from questlib.integer.convert import ENGINES as INTEGER_ENGINES
from reproduce.scales import Scale, get_scale
from reproduce.tables import Cell, Table, get_table

FEATURES = ("mini", "inception")
ENGINES = ("fake", *INTEGER_ENGINES)  # simulated, or integers
MAX_SEED = 999  # sampling uses seed + 1000, and questlib.sampling keeps noise distinct below 2000


@dataclass(frozen=True)
class Plan:
    table: Table
    scale: Scale
    cells: tuple[Cell, ...]  # asked for, in the table's order
    seeds: tuple[int, ...]
    features: str
    engine: str  # what runs the quantized models
    model: str | None  # embedded name, folder or hub id; None: there is none at this scale, see `missing`
    reference: str | None
    results: Path  # result JSON, tables, pictures
    work: Path  # products of the stages
    command: str  # what to type to get this again

    @property
    def folder(self) -> Path:
        name = self.table.name if self.engine == "fake" else f"{self.table.name}-{self.engine}"
        return self.results / self.scale.name / name

    @property
    def missing(self) -> str | None:
        """Why nothing of this plan can run here, or None."""
        needs = []
        if self.model is None:
            needs.append(f"{self.table.weights} (--model FOLDER_OR_HUB_ID or ${self.table.model_env})")
        if self.reference is None:
            needs.append(f"FID reference images or statistics (--reference PATH or ${self.table.reference_env})")
        return f"needs {' and '.join(needs)}" if needs else None

    def config(self, cell: Cell, seed: int) -> QuantConfig:
        """The cell's preset at this scale: the scale's numbers replace the preset's, but what is 0 there stays 0 (off)."""
        preset = QuantConfig.preset(cell.preset, cell.weight_bits, cell.act_bits, **cell.overrides).to_dict()
        wanted = {**self.scale.overrides, **self.scale.preset_overrides.get(cell.preset, {})}
        changes = {key: value for key, value in wanted.items() if preset.get(key, "unknown") != 0 and key not in cell.overrides}
        groups = min(changes.get("step_groups", preset["step_groups"]), self.scale.num_inference_steps)
        return QuantConfig.from_dict(preset | changes | {"step_groups": groups, "seed": seed})


def make_plan(
    table: str, *, scale: str = "mini", cells: Sequence[str] | None = None, seeds: Sequence[int] | None = None,
    features: str | None = None, engine: str | None = None, model: str | None = None, reference: str | None = None,
    results: str | Path | None = None, work: str | Path | None = None,
) -> Plan:  # fmt: skip
    """Check every choice; ConfigError names what is known. `results` or `work` None: in a new temporary folder."""
    the_table, the_scale = get_table(table), get_scale(scale)
    wanted = None if cells is None else {the_table.cell(c).id for c in cells}
    if wanted == set():
        raise ConfigError("cells: expected at least one")
    the_seeds = tuple(the_scale.seeds if seeds is None else seeds)
    if not the_seeds or len(set(the_seeds)) < len(the_seeds) or not all(0 <= s <= MAX_SEED for s in the_seeds):
        raise ConfigError(f"seeds: expected different numbers in 0..{MAX_SEED}, found {list(the_seeds)}")
    if features not in (None, *FEATURES):
        raise ConfigError(f"features: expected one of {', '.join(FEATURES)}, found {features!r}")
    if engine not in (None, *ENGINES):
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    the_features = features or the_scale.features
    the_reference = reference or the_scale.reference or os.environ.get(the_table.reference_env)
    if the_features == "inception" and the_reference == the_scale.reference and the_reference is not None:
        raise ConfigError(f"features inception: {the_reference} ships mini features only, give --reference IMAGES_OR_NPZ")
    options = [table, "--scale", scale]
    chosen = {"cells": cells, "seeds": seeds, "features": features, "engine": engine, "model": model, "reference": reference}
    for name, value in chosen.items():
        if value is not None:
            options += [f"--{name}", value if isinstance(value, str) else ",".join(map(str, value))]
    temporary = None if results and work else Path(tempfile.mkdtemp(prefix="quest-"))
    plan = Plan(
        table=the_table,
        scale=the_scale,
        cells=tuple(c for c in the_table.cells if wanted is None or c.id in wanted),
        seeds=the_seeds,
        features=the_features,
        engine=engine or "fake",
        model=model or the_scale.model or os.environ.get(the_table.model_env),
        reference=the_reference,
        results=Path(results) if results else temporary / "results",
        work=Path(work) if work else temporary / "work",
        command=f"python -m reproduce {shlex.join(options)}",
    )
    for cell in plan.cells:
        if cell.preset is not None:
            plan.config(cell, plan.seeds[0])  # an unknown key in a scale or a table shows here
    check_writable(plan.folder)
    check_writable(plan.work)
    return plan
