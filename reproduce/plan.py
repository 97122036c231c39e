"""A plan: one table at one scale, with all choices checked before any long work.

Results lie in two places. `PUBLISHED` holds those that come with the package, and is only read. A
run writes into a folder of its own, runs/results, unless a maintainer names `PUBLISHED`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from questlib.config import QuantConfig
from questlib.errors import ConfigError
from questlib.files import check_writable
from questlib.integer.engines import ENGINES as INTEGER_ENGINES
from reproduce.choices import Choices, option_name
from reproduce.datasets import DATASETS, Setting
from reproduce.models.embedded import embedded_models
from reproduce.provenance import ROOT
from reproduce.scales import Scale, get_scale
from reproduce.store import check_store
from reproduce.tables.base import Row, Table
from reproduce.tables.registry import get_table

# Sampling uses seed + 1000, of which `questlib.diffusion.sampling` takes no more than 4293.
MAX_SEED = 999

PUBLISHED = ROOT / "results"
WORK = ROOT / "runs"  # where nothing else is chosen: in a notebook, wherever it lies


@dataclass(frozen=True)
class Plan:
    """A table, a scale, and the choices about them. `make_plan` checks them."""

    table: Table
    scale: Scale
    choices: Choices

    def choose(self, **changes: Any) -> Plan:
        """The same plan with other choices, which are not checked against the table again."""
        return replace(self, choices=replace(self.choices, **changes))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that were asked for, in the table's order."""
        wanted = self.choices.rows
        return tuple(row for row in self.table.rows if wanted is None or row.id in wanted)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of each row, ascending: a row's picture and commit are its first seed's."""
        seeds = self.scale.seeds if self.choices.seeds is None else self.choices.seeds
        return tuple(sorted(seeds))

    @property
    def engine(self) -> str:
        """What draws the images of quantized rows; see `row_engine`."""
        return self.choices.engine or self.scale.engine

    @property
    def results(self) -> Path:
        """Folder of the result files of all tables that this plan writes."""
        return self.choices.results or self.work / "results"

    @property
    def work(self) -> Path:
        """Folder of the stages' artifacts."""
        return self.choices.work or WORK

    @property
    def folder(self) -> Path:
        """Folder that this table's results are written to.

        An integer engine that was named has a folder of its own, beside the tables' usual one.
        """
        return self.results / self._place

    @property
    def source(self) -> Path:
        """Folder that this table's rows are read from.

        It is `folder`. With `stored` it is the published one where no folder of results was
        chosen, or where that has no row.
        """
        choices = self.choices
        own = not choices.stored or (choices.results is not None and self._has_rows(self.folder))
        return self.folder if own else PUBLISHED / self._place

    @property
    def _place(self) -> Path:
        named = self.engine in INTEGER_ENGINES
        name = f"{self.table.name}-{self.engine}" if named else self.table.name
        return Path(self.scale.name, name)

    def _has_rows(self, folder: Path) -> bool:
        return any((folder / f"{row.id}.json").is_file() for row in self.table.rows)

    @property
    def is_published(self) -> bool:
        """Whether the rows are read from the published results."""
        return self.source.resolve() == (PUBLISHED / self._place).resolve()

    @property
    def published(self) -> Plan | None:
        """The plan that reads the same rows of the published results; None where it has none."""
        plan = self.choose(results=PUBLISHED, stored=False)
        return plan if plan._has_rows(plan.folder) else None

    def row_file(self, row: str) -> Path:
        """Where the result of the row with this id is kept."""
        return self.source / f"{row}.json"

    @property
    def as_it_is(self) -> bool:
        """Whether nothing but scale, rows and engine was chosen."""
        chosen = set(self.choices.chosen_for_a_run()) - {"seeds"}
        return self.seeds == tuple(sorted(self.scale.seeds)) and not chosen

    @property
    def command(self) -> str:
        """The command that makes this plan again, without folders."""
        return self.choices.command(self.table.name)

    @property
    def words(self) -> str:
        """The plan in one line."""
        whose = "the published ones" if self.is_published else "your own"
        what = f"shown, {whose}" if self.choices.stored else "to run"
        return f"{self.table.title}: {len(self.table.rows)} rows, {len(self.rows)} {what}"

    def setting(self, row: Row) -> Setting:
        """The row's model, and how it is sampled for calibration."""
        choices = self.choices
        setting = DATASETS[row.dataset].setting(
            self.scale.name, choices.model, choices.reference, choices.captions
        )
        features = choices.features or setting.features or self.scale.features
        setting = replace(setting, features=features)
        return setting if setting.takes_features else replace(setting, reference=None)

    def drawing(self, row: Row) -> Setting:
        """The row's setting as its images are drawn, which `Row.sampling` may change."""
        return replace(self.setting(row), **row.sampling)

    def missing(self, row: Row) -> str | None:
        """Why the row cannot run here, or None."""
        return DATASETS[row.dataset].missing(self.setting(row))

    def overrides(self, row: Row) -> dict[str, Any]:
        """What the row's data set, and the row itself, change in its preset."""
        presets = DATASETS[row.dataset].presets
        own = {} if row.preset is None else presets.get(row.preset, {})
        return dict(own) | dict(row.overrides)

    def config(self, row: Row, seed: int) -> QuantConfig:
        """The row's preset at this scale.

        The scale's numbers replace the preset's, but what is 0 (off) in the preset stays 0. Only
        save_memory, which is no part of a method, is switched on.

        Raises:
            ConfigError: a full-precision row, or a key that `QuantConfig` does not have.
        """
        if row.preset is None:
            raise ConfigError(f"{row.id}: a full-precision row has no configuration")
        setting = self.setting(row)
        preset = QuantConfig.preset(
            row.preset, row.weight_bits, row.act_bits, **self.overrides(row)
        )
        wanted = {
            **self.scale.overrides,
            **self.scale.preset_overrides.get(row.preset, {}),
            **setting.overrides,
        }
        changes = {
            key: value
            for key, value in wanted.items()
            if key not in row.overrides and (key == "save_memory" or preset.get(key) != 0)
        }
        groups = changes.get("step_groups", preset.ranges.step_groups)
        changes["step_groups"] = min(groups, setting.num_inference_steps)
        return preset.replace(**with_budget(changes, preset, row.budget), seed=seed)


# Iterations of the stages, each with the learning rate that goes with them. Finetuning keeps its
# own rate: ten times as much broke W8A8 rows.
BUDGETED: dict[str, str | None] = {
    "adaround_iters": "adaround_lr",
    "act_iters": "act_lr",
    "tla_iters": None,
    "cma_iters": None,
}


def with_budget(changes: dict[str, Any], preset: QuantConfig, factor: float) -> dict[str, Any]:
    """A scale's changes of a preset, with `factor` times the iterations in every stage.

    A stage has at least one iteration, and at most as many as the preset. A learning rate that
    goes with them changes the other way, so that their product stays, but not below the preset's.

    Args:
        changes: the scale's values by name.
        preset: what the scale changes.
        factor: above 0; 1 leaves everything as it is.
    """
    if factor == 1:
        return changes
    found = dict(changes)
    for name, rate in BUDGETED.items():
        iterations = changes.get(name, preset.get(name))
        if iterations:
            found[name] = min(max(1, round(iterations * factor)), preset.get(name))
        if rate is not None:
            found[rate] = max(changes.get(rate, preset.get(rate)) / factor, preset.get(rate))
    return found


def make_plan(table: str, choices: Choices | None = None, *, dry: bool = False) -> Plan:
    """Check every choice before any long work.

    Args:
        table: name of a table.
        choices: what was chosen (default: nothing).
        dry: nothing will be written, so that no folder is made or tried.

    Raises:
        ConfigError: a choice that is not known, or that contradicts the table or another choice.

    Example:
        >>> make_plan("table3", Choices(scale="smoke", rows=["bedrooms-fp"]), dry=True).words
        'Table 3, LSUN-Bedrooms: ... 25 rows, 1 to run'
    """
    choices = choices or Choices()
    plan = Plan(table=get_table(table), scale=get_scale(choices.scale), choices=choices)
    for row_id in choices.rows or ():
        plan.table.row(row_id)
    _check_seeds(plan)
    if choices.stored and (useless := choices.chosen_for_a_run()):
        raise ConfigError(
            "--stored: rows are shown as they are, nothing is run; "
            f"expected no {', '.join(map(option_name, useless))} (a notebook runs rows with "
            "STORED = False)"
        )
    _check_files(plan)
    for row in plan.rows:
        _check_features(plan, row)
        if not row.full_precision:
            plan.config(row, plan.seeds[0])  # an unknown key in a scale or a table shows here
    if dry:
        return plan
    if choices.stored and not plan._has_rows(plan.source):
        raise ConfigError(
            f"--stored: expected rows of {plan.table.name} at {plan.scale.name} scale, found none, "
            f"neither your own nor published ones; run them: {plan.choose(stored=False).command}"
        )
    if choices.stored and choices.results is None:
        return plan  # writes nothing
    check_writable(plan.folder)
    check_writable(plan.work)
    check_store(plan.work)
    return plan


def _check_seeds(plan: Plan) -> None:
    seeds = plan.seeds
    distinct = len(set(seeds)) == len(seeds)
    if not seeds or not distinct or not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise ConfigError(
            f"seeds: expected different numbers in 0..{MAX_SEED}, found {list(seeds)}"
        )


def _check_files(plan: Plan) -> None:
    """Whether a model, reference or captions file can be used by the rows."""
    choices = plan.choices
    data = sorted({row.dataset for row in plan.rows})
    if len(data) > 1 and (choices.model or choices.reference):
        raise ConfigError(
            f"--model and --reference are of one data set, these rows are of {', '.join(data)}: "
            "choose some (--rows)"
        )
    if choices.captions and not any(DATASETS[name].has_captions for name in data):
        raise ConfigError(f"--captions: no use for prompts, these rows are of {', '.join(data)}")


def _check_features(plan: Plan, row: Row) -> None:
    """Whether the row's reference has the features that its metrics take."""
    setting = plan.setting(row)
    if plan.choices.reference and not setting.takes_features:
        raise ConfigError(
            f"--reference: {row.dataset} takes no features at {plan.scale.name} scale, "
            "add --features inception"
        )
    if setting.features == "inception" and setting.reference in embedded_models():
        raise ConfigError(
            f"features inception: {setting.reference} ships mini features only, "
            "give --reference IMAGES_OR_NPZ"
        )
