"""The one style of all plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from questlib.files import atomic_path

# By method, in the table's order.
COLORS = [
    "#8d99ae",
    "#e07a5f",
    "#81b29a",
    "#3d5a80",
    "#f2cc8f",
    "#6d597a",
    "#b56576",
    "#a3b18a",
]

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}

# A legend at the right of the axes.
BESIDE: dict[str, Any] = {"fontsize": 7, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


def use_style() -> None:
    """Make style and colors the defaults of this process, for a notebook that draws by itself."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE | {"axes.prop_cycle": plt.cycler(color=COLORS)})


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG without the metadata that would differ from run to run."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return path
