"""Plots of a table's results: metrics beside the paper's, differences, cost, sensitivity.

Rows stand one below the other, grouped by bits, each as a dot with its spread over the seeds. So
their names need no legend, and an axis may be logarithmic.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from reproduce.datasets import DATASETS
from reproduce.figures import style
from reproduce.figures.style import styled
from reproduce.results import Measured, Result
from reproduce.table_results import TableResults
from reproduce.tables.base import Number, Row
from reproduce.tables.methods import LABELS, ONE_ROW, QUEST_PRESETS
from reproduce.verdicts import by_seed

LOG_SPAN = 10  # values that differ by more stand on a logarithmic axis

# Metrics shown side by side, and their names.
PANELS = (("fid", "FID"), ("feature_distance_to_fp", "distance to full precision"))
CLIP = ("clip_score", "CLIP score")

STAGES = ("calibrate", "ranges", "reconstruct", "finetune", "correction")

Rows = Sequence[tuple[Row, Result]]


# ---- rows one below the other ----


class Places:
    """Where rows stand on the vertical axis: 0 and further down, a line for each group's bits."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.of_row: dict[str, int] = {}
        self.labels: list[tuple[int, str, bool]] = []
        """Place, text, and whether it is a group's head."""
        several = len({row.bits for row, _ in rows if not row.full_precision}) > 1
        before = None
        place = 0
        for row, _ in rows:
            group = "" if row.full_precision else row.bits
            if several and group and group != before:
                self.labels.append((place, row.bits, True))
                place += 1
            before = group
            self.of_row[row.id] = place
            self.labels.append((place, row.label, False))
            place += 1
        self.count = place

    @property
    def height(self) -> float:
        """Of a figure, in inches."""
        return 0.9 + 0.21 * max(self.count, 4)

    def name(self, *panels: Axes) -> None:
        """Write the rows' names beside the first of panels that share their vertical axis."""
        places, names, heads = zip(*self.labels, strict=True) if self.labels else ((), (), ())
        panels[0].set_yticks(places, names)
        for text, head in zip(panels[0].get_yticklabels(), heads, strict=True):
            text.set_fontweight("bold" if head else "normal")
        panels[0].set_ylim(self.count - 0.4, -0.6)
        for axes in panels:
            axes.tick_params(axis="y", length=0)
            axes.grid(True, axis="x", alpha=0.3)
            axes.grid(False, axis="y")


def _color(row: Row) -> str:
    """Its method's; of a row that changes a method, or is a step towards ours, a color of that."""
    if row.label in style.COLORS:
        return style.COLORS[row.label]
    if row.preset == "quest":
        return style.VARIANT if row.overrides else style.METHODS[row.preset]
    return style.METHODS.get(row.preset or "", style.BLACK)


def _dot(axes: Axes, place: float, value: Number, spread: float | None, color: str) -> None:
    """A value with its spread; what stands in place of a number is written at the right."""
    if isinstance(value, str):
        where = axes.get_yaxis_transform()
        axes.text(0.99, place, value, transform=where, ha="right", va="center", color="0.4")
    elif value is not None:
        axes.errorbar(value, place, xerr=spread or 0, fmt="o", ms=5, lw=1.3, color=color)


def _dots(axes: Axes, places: Places, measured: Iterable[Measured]) -> list[float]:
    """A dot for each row that has a number. Returns the numbers."""
    found = []
    for (row, _), (value, spread) in zip(places.rows, measured, strict=True):
        _dot(axes, places.of_row[row.id], value, spread, _color(row))
        found += [] if value is None else [value]
    return found


def _choose_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values lie far apart; a note where there are none."""
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
    elif max(values) > LOG_SPAN * min(values) > 0:
        style.logarithmic(axes, axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _line(axes: Axes, value: Number) -> None:
    """A dashed line through all rows."""
    if isinstance(value, int | float):
        axes.axvline(value, ls="--", lw=1, color=style.BLACK, zorder=0)


# ---- metrics ----


@styled
def metric_figure(
    results: TableResults, metric: str = "fid", label: str = "FID", dataset: str | None = None
) -> Figure:
    """The paper's numbers at the left, those from here with their spread at the right.

    The dashed line is full precision. The two panels' axes differ. The paper's one row of QuEST
    stands between the rows of our three presets.

    Args:
        metric: one of `reproduce.results.METRICS`.
        label: its name in the titles.
        dataset: only rows of this data set; None: all.
    """
    shown = [(row, r) for row, r in results.ordered() if dataset in (None, row.dataset)]
    places = Places(shown)
    measured = [result.metric(metric) for _, result in shown]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, places.height), sharey=True)
    papers = _papers(left, places, metric)
    found = _dots(right, places, measured)
    for axes, values in ((left, papers), (right, found)):
        _choose_scale(axes, values)
    for (row, _), (value, _) in zip(shown, measured, strict=True):
        if row.full_precision:
            _line(left, row.paper.get(metric))
            _line(right, value)
    left.set_title(f"{label}, paper (its model and data)")
    right.set_title(f"{label}, here ({results.plan.scale.name} scale)")
    places.name(left, right)
    return figure


def _papers(axes: Axes, places: Places, metric: str) -> list[float]:
    """The paper's numbers; one number for several rows stands once, with a bar beside them."""
    found: list[float] = []
    shared: dict[tuple[str, str], list[Row]] = {}
    for row, _ in places.rows:
        if row.note == ONE_ROW:
            shared.setdefault((row.dataset, row.bits), []).append(row)
            continue
        value = row.paper.get(metric)
        _dot(axes, places.of_row[row.id], value, None, _color(row))
        found += [value] if isinstance(value, int | float) else []
    for rows in shared.values():
        value = rows[0].paper.get(metric)
        at = [places.of_row[row.id] for row in rows]
        color = style.METHODS["quest"]
        _dot(axes, statistics.fmean(at), value, None, color)
        if isinstance(value, int | float):
            axes.vlines(value, min(at) - 0.3, max(at) + 0.3, color=color, lw=1)
            found.append(value)
    return found


def _quantized(results: TableResults) -> list[tuple[Row, Result]]:
    """Quantized rows that have numbers, as tables show them."""
    return [(row, r) for row, r in results.ordered() if r.done and not row.full_precision]


@styled
def rows_figure(results: TableResults, base: str) -> Figure:
    """FID and distance to full precision of the rows of one data set, with the spread over seeds.

    Images from prompts have a CLIP score in place of the FID.

    Args:
        base: id of the row that the dashed line marks; its data set is shown.
    """
    dataset = results.table.row(base).dataset
    places = Places([(row, r) for row, r in _quantized(results) if row.dataset == dataset])
    left = CLIP if DATASETS[dataset].has_captions else PANELS[0]
    figure, panels = plt.subplots(1, 2, figsize=(10, places.height + 0.2), sharey=True)
    for axes, (metric, label) in zip(panels, (left, PANELS[1]), strict=True):
        measured = [result.metric(metric) for _, result in places.rows]
        _choose_scale(axes, _dots(axes, places, measured))
        _line(axes, results[base].metric(metric).value)
        axes.set_title(f"{label} ({results.plan.scale.name} scale)")
    places.name(*panels)
    row = results.table.row(base)
    figure.supxlabel(f"dashed: {row.title}", fontsize=8)
    return figure


@styled
def difference_figure(results: TableResults, base: str) -> Figure:
    """What each change does: the rows' differences from `base`, seed by seed, sorted.

    Args:
        base: id of the row whose changes are shown: rows that are compared with it.
    """
    changes = [(row, r) for row, r in _quantized(results) if row.against == base]
    found = {
        row.id: [_difference(result, results[base], metric) for metric, _ in PANELS]
        for row, result in changes
    }
    changes.sort(key=lambda change: found[change[0].id][1].value or 0.0)
    places = Places(changes)
    figure, panels = plt.subplots(1, 2, figsize=(10, places.height + 0.2), sharey=True)
    for i, (axes, (_, label)) in enumerate(zip(panels, PANELS, strict=True)):
        values = _dots(axes, places, [found[row.id][i] for row, _ in changes])
        _choose_difference_scale(axes, values)
        _line(axes, 0.0)
        axes.set_title(f"{label}, minus that of `{results.table.row(base).label}`")
    places.name(*panels)
    figure.supxlabel("left of the dashed line: better; both axes are linear near it", fontsize=8)
    return figure


def _difference(mine: Result, base: Result, metric: str) -> Measured:
    """Mean and deviation of the seeds' differences."""
    differences = [a - b for a, b in by_seed(metric, mine, base)]
    if not differences:
        return Measured(None, None)
    spread = statistics.stdev(differences) if len(differences) > 1 else None
    return Measured(statistics.fmean(differences), spread)


def _choose_difference_scale(axes: Axes, values: Sequence[float]) -> None:
    """Linear around zero, where most differences are; logarithmic where some lie far from it."""
    if not values:
        _choose_scale(axes, values)
        return
    middle, farthest = statistics.median(map(abs, values)), max(map(abs, values))
    if not farthest > LOG_SPAN * middle > 0:
        return
    linear = 10.0 ** math.ceil(math.log10(middle))
    tens = [linear * 10**k for k in range(1 + math.ceil(math.log10(farthest / linear)))]
    axes.set_xscale("symlog", linthresh=linear, linscale=1.5)
    axes.set_xticks([-linear, 0, *(step * ten for ten in tens for step in (1, 3))])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(1.2 * min(axes.dataLim.x0, -0.1 * linear), 1.5 * axes.dataLim.x1)


# ---- cost ----


@styled
def cost_figure(results: TableResults) -> Figure:
    """Minutes of the quantizing stages, stacked, one bar a row."""
    places = Places(_quantized(results))
    figure, axes = plt.subplots(figsize=(9, places.height))
    at = [places.of_row[row.id] for row, _ in places.rows]
    left = np.zeros(len(at))
    for stage in STAGES:
        width = np.array([result.seconds.get(stage, 0.0) / 60 for _, result in places.rows])
        if width.any():
            axes.barh(at, width, 0.75, left=left, color=style.color(stage), label=stage)
            left += width
    axes.set_title("minutes a seed, on the machine of these results")
    places.name(axes)
    if places.rows:
        axes.legend(**style.BESIDE)
    else:
        _choose_scale(axes, [])
    return figure


# ---- Figure 3 ----


@styled
def sensitivity_figure(results: TableResults) -> Figure:
    """Figure 3: FID and distance to full precision over activation bits.

    A line stands for a kind of layer, the dashed line for full precision.
    """
    done = _quantized(results)
    full = results.full_precision
    widths = sorted({row.act_bits for row, _ in done}, reverse=True)
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.2))
    for axes, (metric, label) in zip(panels, PANELS, strict=True):
        for i, kind in enumerate(dict.fromkeys(row.label for row, _ in done)):
            rows = [(row, result.metric(metric)) for row, result in done if row.label == kind]
            axes.errorbar(
                [row.act_bits for row, _ in rows],
                [np.nan if m.value is None else m.value for _, m in rows],
                [m.std or 0.0 for _, m in rows],
                marker="o",
                color=style.color(kind, i),
                label=kind,
            )
        value = None if full is None else full[1].metric(metric).value
        if value is not None:
            axes.axhline(value, ls="--", lw=1, color=style.BLACK, label="full precision")
        axes.set_xlabel("bits of the activations")
        axes.set_title(f"{label} ({results.plan.scale.name} scale)")
        axes.xaxis.set_inverted(True)
        axes.set_xticks(widths)
    if done:
        handles = panels[0].get_legend_handles_labels()
        panels[1].legend(*handles, **style.BESIDE)
    return figure


# ---- iterations ----


@styled
def budget_figure(results: TableResults) -> Figure:
    """Distance to full precision over a budget: as a factor on the iterations, and in minutes.

    A line stands for a preset, a dot for one of its rows, with the spread over the seeds.
    """
    lines: dict[str, list[tuple[Row, Result]]] = {}
    for row, result in _quantized(results):
        lines.setdefault(str(row.preset), []).append((row, result))
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    for preset, rows in lines.items():
        rows.sort(key=lambda pair: pair[0].budget)
        measured = [result.metric("feature_distance_to_fp") for _, result in rows]
        minutes = [(result.quantize_seconds or np.nan) / 60 for _, result in rows]
        for axes, x in zip(panels, ([row.budget for row, _ in rows], minutes), strict=True):
            axes.errorbar(
                x,
                [np.nan if m.value is None else m.value for m in measured],
                [m.std or 0.0 for m in measured],
                marker="o",
                color=style.METHODS.get(preset, style.BLACK),
                label=(LABELS | QUEST_PRESETS).get(preset, preset),
            )
    found = [m for rows in lines.values() for _, r in rows if (m := r.quantize_seconds)]
    for axes, label in zip(panels, ("times the scale's iterations", "minutes"), strict=True):
        axes.set_xlabel(label)
        axes.grid(True, alpha=0.3)
        if found:
            style.logarithmic(axes, axes.xaxis)
    panels[0].set_xticks(sorted({row.budget for rows in lines.values() for row, _ in rows}))
    panels[0].set_title(f"distance to full precision ({results.plan.scale.name} scale)")
    panels[1].set_title("the same over the time to quantize, one seed")
    if lines:
        style.logarithmic(panels[0], panels[0].yaxis)
        panels[1].legend(**style.BESIDE)
    return figure
