"""What a table is: rows as specified, each with its preset and the numbers that others report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from questlib.errors import unknown

FAILED = "N/A"  # the paper: generation failed
UNKNOWN = "not available"  # the paper has a number, but this project does not know it
Number = float | str | None  # a number, FAILED, UNKNOWN, or None = not reported
COSTS = ("hours", "memory_mb", "iterations")  # keys of Row.paper beside metrics
OURS = "QuEST (ours)"  # this package's preset `quest`, where it stands beside other methods

# Names of `make` targets by table; the others are named as their table. `make reproduce-table3`
# runs both of the first two.
TARGETS = {
    "table3": "bedrooms",
    "table3-churches": "churches",
    "table4": "imagenet",
    "table5": "sd",
}


@dataclass(frozen=True)
class Row:
    """One row of a table as specified: how to make it, and what the paper and others report."""

    id: str
    label: str
    preset: str | None
    """Preset of `QuantConfig`; None is the full-precision model."""

    weight_bits: int = 32
    act_bits: int = 32
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values of `QuantConfig` by name; they win over the scale's."""

    budget: float = 1.0
    """Factor on the scale's iterations, of every stage. A preset's own number is the most."""

    dataset: str = "bedrooms"
    """Name in `reproduce.datasets`, which says the model and how it is sampled."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the data set's `Setting`, where images are drawn otherwise than calibrated."""

    paper: Mapping[str, Number] = field(default_factory=dict)
    """The paper's numbers by metric, or by one of COSTS."""

    independent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Numbers of independent runs, by source and metric."""

    paper_size_mb: float | None = None
    against: str | None = None
    """Id of the row that the paper's claim compares this one with."""

    paper_order: Mapping[str, str] = field(default_factory=dict)
    """By metric "better" or "worse", where only the paper's text gives an order."""

    note: str = ""

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized."""
        return self.preset is None

    @property
    def ours(self) -> bool:
        """Whether it is this package's own preset among other methods."""
        return self.label == OURS

    @property
    def bits(self) -> str:
        """Of weights and activations."""
        return "32/32" if self.full_precision else f"W{self.weight_bits}A{self.act_bits}"

    @property
    def title(self) -> str:
        """Label and bits; of full precision the label alone."""
        return self.label if self.full_precision else f"{self.label} {self.bits}"

    @property
    def picture_file(self) -> str:
        """The file with the row's first images, beside its result."""
        return f"{self.id}.jpg"


@dataclass(frozen=True)
class Table:
    """A table, or figure, of the paper and the notebook that tells its story."""

    name: str
    title: str
    notebook: str
    """File name in notebooks/."""

    rows: tuple[Row, ...]
    picture: tuple[str, ...]
    """Ids of the rows whose samples, from the same noise, are shown one above the other."""

    note: str
    in_paper: bool = True
    opens_checkpoints: bool = False
    """Whether its notebook reads the rows' checkpoints, so that results alone do not show it."""

    shares: bool = True
    """Whether its rows read ranges and weights that another row made. Rows of tables of cost do
    not, so that their time and memory are those of all stages."""

    tells_layers: bool = False
    """Whether its rows say how many layers ran in integers, and how many with floating point
    beside them."""

    claim: str = "fid"
    """The metric whose order in the paper the distance to full precision is compared with."""

    @property
    def target(self) -> str:
        """What `make` calls it."""
        return f"reproduce-{TARGETS.get(self.name, self.name)}"

    def row(self, row_id: str) -> Row:
        """The row with this id. ConfigError names the ids there are."""
        for row in self.rows:
            if row.id == row_id:
                return row
        raise unknown(f"{self.name}: rows", row_id, [row.id for row in self.rows])
