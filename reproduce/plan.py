"""A plan: one table at one scale, with all choices checked before any long work."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from questlib.config import QuantConfig
from questlib.errors import ConfigError
from questlib.files import check_writable
from questlib.integer.engines import ENGINES as INTEGER_ENGINES
from reproduce.datasets import DATASETS, Setting
from reproduce.models.loading import embedded_models
from reproduce.scales import Scale, get_scale
from reproduce.store import check_store
from reproduce.tables.base import Cell, Table
from reproduce.tables.registry import get_table

FEATURES = ("mini", "inception")
ENGINES = ("fake", *INTEGER_ENGINES)  # simulated, or integers
MAX_SEED = 999  # sampling uses seed + 1000, and questlib.diffusion.sampling keeps noise distinct below 2000


@dataclass(frozen=True)
class Plan:
    table: Table
    scale: Scale
    cells: tuple[Cell, ...]  # asked for, in the table's order
    seeds: tuple[int, ...]
    features: str | None  # chosen; None: the data set's or the scale's. Likewise:
    model: str | None  # embedded name, folder or hub id
    reference: str | None  # for FID
    captions: str | None  # prompts
    engine: str  # what runs the quantized models
    results: Path  # result JSON, tables, pictures
    work: Path  # products of the stages
    keep_seeds: bool  # seeds of a row's earlier result that are not asked for stay in it
    stored: bool  # rows are shown as `results` has them, and nothing is run
    command: str  # what to type to get this again

    @property
    def folder(self) -> Path:
        name = self.table.name if self.engine == "fake" else f"{self.table.name}-{self.engine}"
        return self.results / self.scale.name / name

    def row_file(self, row: str) -> Path:
        """Where the result of the row with this id is kept."""
        return self.folder / f"{row}.json"

    @property
    def as_it_is(self) -> bool:
        """Whether nothing but scale, rows and engine was chosen."""
        chosen = self.keep_seeds or self.features or self.model or self.reference or self.captions
        return self.seeds == self.scale.seeds and not chosen

    @property
    def words(self) -> str:
        rows, what = len(self.cells), "shown from their results" if self.stored else "to run"
        return f"{self.table.title}: {len(self.table.cells)} rows, {rows} {what}"

    def setting(self, cell: Cell) -> Setting:
        """The cell's model, and how it is sampled here."""
        setting = DATASETS[cell.dataset].setting(
            self.scale.name, self.model, self.reference, self.captions
        )
        features = self.features or setting.features or self.scale.features
        setting = replace(setting, features=features)
        return setting if setting.takes_features else replace(setting, reference=None)

    def drawing(self, cell: Cell) -> Setting:
        """The cell's setting as its images are drawn: `Cell.sampling` may differ from what was calibrated."""
        return replace(self.setting(cell), **cell.sampling)

    def missing(self, cell: Cell) -> str | None:
        """Why the cell cannot run here, or None."""
        return DATASETS[cell.dataset].missing(self.setting(cell))

    def overrides(self, cell: Cell) -> dict[str, Any]:
        """What the cell's data set, and the cell itself, change in its preset."""
        return dict(DATASETS[cell.dataset].presets.get(cell.preset, {})) | dict(cell.overrides)

    def config(self, cell: Cell, seed: int) -> QuantConfig:
        """The cell's preset at this scale: the scale's numbers replace the preset's, but what is 0 there stays 0 (off).

        save_memory is no part of a method: it alone is switched on.
        """
        setting = self.setting(cell)
        preset = QuantConfig.preset(
            cell.preset, cell.weight_bits, cell.act_bits, **self.overrides(cell)
        ).to_dict()
        wanted = {
            **self.scale.overrides,
            **self.scale.preset_overrides.get(cell.preset, {}),
            **setting.overrides,
        }
        on = {key for key in wanted if preset.get(key, "unknown") != 0 or key == "save_memory"}
        changes = {
            key: value for key, value in wanted.items() if key in on and key not in cell.overrides
        }
        groups = min(changes.get("step_groups", preset["step_groups"]), setting.num_inference_steps)
        return QuantConfig.from_dict(preset | changes | {"step_groups": groups, "seed": seed})


def make_plan(
    table: str,
    *,
    scale: str = "mini",
    cells: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    features: str | None = None,
    engine: str | None = None,
    model: str | None = None,
    reference: str | None = None,
    captions: str | None = None,
    results: str | Path | None = None,
    work: str | Path | None = None,
    keep_seeds: bool = False,
    stored: bool = False,
    dry: bool = False,
) -> Plan:
    """Check every choice; ConfigError names what is known. `results` or `work` None: in a new temporary folder.

    stored: rows are shown as `results` has them, so nothing may be chosen that only a run can follow.
    dry: nothing will be written, and no folder is made or tried.
    """
    the_table, the_scale = get_table(table), get_scale(scale)
    wanted = None if cells is None else {the_table.cell(c).id for c in cells}
    if wanted == set():
        raise ConfigError("cells: expected at least one")
    the_seeds = tuple(the_scale.seeds if seeds is None else seeds)
    if (
        not the_seeds
        or len(set(the_seeds)) < len(the_seeds)
        or not all(0 <= s <= MAX_SEED for s in the_seeds)
    ):
        raise ConfigError(
            f"seeds: expected different numbers in 0..{MAX_SEED}, found {list(the_seeds)}"
        )
    if features not in (None, *FEATURES):
        raise ConfigError(f"features: expected one of {', '.join(FEATURES)}, found {features!r}")
    if engine not in (None, *ENGINES):
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    options = [table, "--scale", scale]
    chosen = {
        "cells": cells,
        "seeds": seeds,
        "features": features,
        "engine": engine,
        "model": model,
        "reference": reference,
    }
    chosen |= {"captions": captions}
    for name, value in chosen.items():
        if value is not None:
            options += [f"--{name}", value if isinstance(value, str) else ",".join(map(str, value))]
    options += ["--keep-seeds"] if keep_seeds else []
    if stored:
        if useless := [
            o for o in options if o.startswith("--") and o not in ("--scale", "--cells", "--engine")
        ]:
            raise ConfigError(
                f"--stored: rows are shown as they are, nothing is run; expected no {', '.join(useless)}"
            )
        options.append("--stored")
    temporary = None if (results and work) or dry else Path(tempfile.mkdtemp(prefix="quest-"))
    plan = Plan(
        table=the_table,
        scale=the_scale,
        cells=tuple(c for c in the_table.cells if wanted is None or c.id in wanted),
        seeds=tuple(sorted(the_seeds)),  # a row's picture and commit are its first seed's
        features=features,
        model=model,
        reference=reference,
        captions=captions,
        engine=engine or "fake",
        results=Path(results or (temporary or Path()) / "results"),
        work=Path(work or (temporary or Path()) / "work"),
        keep_seeds=keep_seeds,
        stored=stored,
        command=f"python -m reproduce {shlex.join(options)}",
    )
    data = sorted({c.dataset for c in plan.cells})
    if len(data) > 1 and (model or reference):
        raise ConfigError(
            f"--model and --reference are of one data set, these cells are of {', '.join(data)}: choose some (--cells)"
        )
    if captions and not any(DATASETS[d].has_captions for d in data):
        raise ConfigError(f"--captions: no use for prompts, these cells are of {', '.join(data)}")
    for cell in plan.cells:
        setting = plan.setting(cell)
        if reference and not setting.takes_features:
            raise ConfigError(
                f"--reference: {cell.dataset} takes no features at {scale} scale, add --features inception"
            )
        if setting.features == "inception" and setting.reference in embedded_models():
            raise ConfigError(
                f"features inception: {setting.reference} ships mini features only, give --reference IMAGES_OR_NPZ"
            )
        if cell.preset is not None:
            plan.config(cell, plan.seeds[0])  # an unknown key in a scale or a table shows here
    if not dry:
        check_writable(plan.folder)
        check_writable(plan.work)
        check_store(plan.work)
    return plan
