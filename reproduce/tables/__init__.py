"""The paper's tables: one file each, with its cells, their presets, the paper's numbers and independent re-runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from questlib.errors import ConfigError

FAILED = "N/A"  # the paper: generation failed
Number = float | str | None  # a number, FAILED, or None = not reported


@dataclass(frozen=True)
class Cell:
    """One row of a table: how to make it, and what the paper and others report. `preset` None is the full-precision model."""

    id: str
    label: str
    preset: str | None
    weight_bits: int = 32
    act_bits: int = 32
    overrides: Mapping[str, Any] = field(default_factory=dict)  # QuantConfig keys, they win over the scale's
    paper: Mapping[str, Number] = field(default_factory=dict)  # by metric
    independent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by source, by metric
    paper_size_mb: float | None = None
    against: str | None = None  # id of the row that the paper's claim compares this one with
    note: str = ""

    @property
    def bits(self) -> str:
        return "32/32" if self.preset is None else f"W{self.weight_bits}A{self.act_bits}"


@dataclass(frozen=True)
class Table:
    """A table of the paper and the notebook that tells its story."""

    name: str
    title: str
    notebook: str  # file name in notebooks/
    cells: tuple[Cell, ...]
    picture: tuple[str, ...]  # cells whose samples, from the same noise, are shown one above the other
    note: str
    weights: str = "the LSUN-Bedrooms LDM-4 weights"  # what `paper` scale needs
    model_env: str = "QUEST_BEDROOMS"  # folder or hub id of those weights
    reference_env: str = "QUEST_BEDROOMS_REFERENCE"  # file with the reference statistics

    def cell(self, cell_id: str) -> Cell:
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        raise ConfigError(f"{self.name}: cells are {', '.join(c.id for c in self.cells)}; found {cell_id!r}")


def get_table(name: str) -> Table:
    tables = all_tables()
    if name not in tables:
        raise ConfigError(f"table: expected one of {', '.join(tables)}, found {name!r}")
    return tables[name]


def all_tables() -> dict[str, Table]:
    from reproduce.tables.ablation import ABLATION  # here: the table files import Cell and Table from this one
    from reproduce.tables.table2 import TABLE2
    from reproduce.tables.table3 import TABLE3

    return {table.name: table for table in (TABLE2, TABLE3, ABLATION)}
