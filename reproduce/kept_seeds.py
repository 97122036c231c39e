"""Seeds of an earlier run that stay in a row's result (`--keep-seeds`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from questlib.errors import ConfigError
from reproduce.plan import Plan
from reproduce.results import Conditions, Result
from reproduce.table_results import planned_conditions, stored_result
from reproduce.tables.base import Row


def kept_result(row: Row, plan: Plan, model_sha256: str) -> Result | None:
    """The row's earlier result with those of its seeds that are not asked for.

    They may come from another version of the code, which the row's provenance says.

    Returns:
        None when no such seeds are to be kept.

    Raises:
        ConfigError: these seeds were made with another configuration or model, drawn in another
            way, or measured with something else; such seeds do not belong in one row.
    """
    path = plan.row_file(row.id)
    if not plan.choices.keep_seeds or not path.is_file():
        return None
    stored = stored_result(row, plan)
    kept = tuple(s for s in stored.seeds if s.seed not in plan.seeds)
    if not kept:
        return None
    expected = _named(planned_conditions(row, plan, model_sha256))
    found = _named(stored.conditions)
    for seed in kept:
        name = f"configuration of seed {seed.seed}"
        expected[name] = None if row.preset is None else plan.config(row, seed.seed).hash()
        found[name] = seed.config_hash
    for name, value in expected.items():
        if found[name] != value:
            raise ConfigError(
                f"--keep-seeds: {path.name}: {name}: expected {value}, found {found[name]}"
            )
    return dataclasses.replace(stored, seeds=kept)


def _named(conditions: Conditions) -> dict[str, Any]:
    """Each condition by name; those of the sampler one by one."""
    values = dataclasses.asdict(conditions)
    return values | values.pop("sampling")
