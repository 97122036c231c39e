"""The paper's tables: one file each, with its cells, their presets, the paper's numbers and independent re-runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from questlib.errors import ConfigError

FAILED = "N/A"  # the paper: generation failed
UNKNOWN = "not available"  # the paper has a number, but this project does not know it
# names of `make` targets by table; the others are named as their table. `make reproduce-table3` runs both of the first two
TARGETS = {
    "table3": "bedrooms",
    "table3-churches": "churches",
    "table4": "imagenet",
    "table5": "sd",
}
Number = float | str | None  # a number, FAILED, UNKNOWN, or None = not reported
COSTS = ("hours", "memory_mb", "iterations")  # keys of Cell.paper beside metrics


@dataclass(frozen=True)
class Cell:
    """One row of a table: how to make it, and what the paper and others report. `preset` None is the full-precision model."""

    id: str
    label: str
    preset: str | None
    weight_bits: int = 32
    act_bits: int = 32
    overrides: Mapping[str, Any] = field(
        default_factory=dict
    )  # QuantConfig keys, they win over the scale's
    dataset: str = "bedrooms"  # name in reproduce.datasets: the model, and how it is sampled
    sampling: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys of its Setting: images are drawn otherwise than calibrated
    paper: Mapping[str, Number] = field(default_factory=dict)  # by metric, or one of COSTS
    independent: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # by source, by metric
    paper_size_mb: float | None = None
    against: str | None = None  # id of the row that the paper's claim compares this one with
    paper_order: Mapping[str, str] = field(
        default_factory=dict
    )  # by metric, "better" | "worse", from the text
    note: str = ""

    @property
    def bits(self) -> str:
        return "32/32" if self.preset is None else f"W{self.weight_bits}A{self.act_bits}"


@dataclass(frozen=True)
class Table:
    """A table, or figure, of the paper and the notebook that tells its story."""

    name: str
    title: str
    notebook: str  # file name in notebooks/
    cells: tuple[Cell, ...]
    picture: tuple[
        str, ...
    ]  # cells whose samples, from the same noise, are shown one above the other
    note: str
    in_paper: bool = True
    opens_checkpoints: bool = False  # its notebook does, so rows alone do not show it
    shares: bool = True  # False: its rows read no ranges and weights that another row made, so their memory is of all stages
    claim: str = (
        "fid"  # the metric whose order in the paper the distance to full precision is compared with
    )

    @property
    def target(self) -> str:
        """What `make` calls it."""
        return f"reproduce-{TARGETS.get(self.name, self.name)}"

    def cell(self, cell_id: str) -> Cell:
        for cell in self.cells:
            if cell.id == cell_id:
                return cell
        raise ConfigError(
            f"{self.name}: cells are {', '.join(c.id for c in self.cells)}; found {cell_id!r}"
        )
