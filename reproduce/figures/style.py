"""The one style of all plots, and the one color of each method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from questlib.files import atomic_path
from reproduce.tables.base import OURS
from reproduce.tables.methods import LABELS, QUEST_PRESETS

RED, ORANGE, PLUM = "#c8324a", "#e8943a", "#8a3b72"
BLUE, SKY, TEAL, GREEN = "#2f6690", "#7fb2d4", "#17857f", "#6a994e"
VIOLET, BROWN, GREY, BLACK = "#6a5acd", "#96704e", "#8d99ae", "#1d1d1f"

# Quantized, but nobody's method as it stands: a variant of ours, or a step towards it.
VARIANT = "#e39aa6"

# By the name that stands in a legend or beside a row. What finetuning has made is in our color.
COLORS = {
    "full precision": BLACK,
    OURS: RED,
    QUEST_PRESETS["quest-paper"]: ORANGE,
    QUEST_PRESETS["quest-release"]: PLUM,
    LABELS["minmax"]: GREY,
    LABELS["ptq4dm"]: GREEN,
    LABELS["q-diffusion"]: BLUE,
    LABELS["ptq-d"]: SKY,
    LABELS["efficientdm"]: VIOLET,
    LABELS["tfmq-dm"]: TEAL,
    LABELS["full-finetune"]: BROWN,
    # the models of the tour and of Figure 2
    "before": BLUE,
    "before finetuning": BLUE,
    "quantized": BLUE,
    "TLA, local loss alone": ORANGE,
    "after": RED,
    "after finetuning": RED,
    "finetuned": RED,
    # kinds of layers in Figure 3
    "feed-forward layers": VIOLET,
    "all other linear layers": TEAL,
    "convolutions": ORANGE,
    # grids over values
    "min-max": GREY,
    "mse": RED,
    "4th power": BLUE,
    "one for all": GREY,
    "one a channel": BLUE,
    "carrier grid": RED,
    # losses
    "L_TLA": BLUE,
    "L_CMA": BLUE,
    "L_G": RED,
    # stages of quantizing
    "calibrate": "#b9c4cc",
    "ranges": "#8597a3",
    "reconstruct": "#556976",
    "finetune": "#26353f",
    "correction": "#c9b68b",
}

# By preset.
METHODS = {name: COLORS[label] for name, label in (LABELS | QUEST_PRESETS).items()}

# For names that have no color of their own, in turn.
CYCLE = [BLUE, RED, ORANGE, TEAL, VIOLET, GREEN, PLUM, GREY]

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}

# A legend at the right of the axes.
BESIDE: dict[str, Any] = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}


def color(name: str, place: int = 0) -> str:
    """The color of a method, or of anything else that figures name.

    Args:
        place: among the names of a figure, for a name that has no color of its own.
    """
    return COLORS.get(name, CYCLE[place % len(CYCLE)])


def use_style() -> None:
    """Make style and colors the defaults of this process, for a notebook that draws by itself."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE | {"axes.prop_cycle": plt.cycler(color=CYCLE)})


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws a figure, in this style whatever the process has."""
    from functools import wraps

    import matplotlib.pyplot as plt

    @wraps(draw)
    def drawn(*args: Any, **choices: Any) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **choices)
        plt.close(figure)  # a notebook shows it once: as the cell's value
        return figure

    return drawn


def logarithmic(axes: Axes, axis: Axis) -> None:
    """Make an axis logarithmic, with ticks as plain numbers: 1, 2, 5, 10."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG without the metadata that would differ from run to run."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return path
