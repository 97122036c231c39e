"""Plots of a table's results: metrics beside the paper's, cost, and samples from the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from reproduce.figures.style import BESIDE, COLORS, STYLE
from reproduce.results import Measured, Result
from reproduce.table_results import TableResults
from reproduce.tables.base import FAILED, Number, Row

LOG_SPAN = 10  # values that differ by more stand on a logarithmic axis

# Metrics shown side by side, and their names.
PANELS = (("fid", "FID"), ("feature_distance_to_fp", "distance to full precision"))

STAGES = ("calibrate", "ranges", "reconstruct", "finetune")

# Bits and method of a bar.
Key = tuple[str, str]


def _key(row: Row) -> Key:
    return row.bits, row.label


def _bars(
    axes: plt.Axes,
    rows: Sequence[Row],
    values: Mapping[Key, Number],
    errors: Mapping[Key, float | None],
    title: str,
) -> None:
    """A group of bars for each bit-width, a bar for each method; "N/A" where generation failed."""
    bits = list(dict.fromkeys(row.bits for row in rows))
    methods = list(dict.fromkeys(row.label for row in rows))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        places = np.arange(len(bits)) + (i - (len(methods) - 1) / 2) * width
        heights = [values.get((b, method)) for b in bits]
        axes.bar(
            places,
            [np.nan if h is None or isinstance(h, str) else h for h in heights],
            width * 0.92,
            yerr=[errors.get((b, method)) or 0 for b in bits],
            color=COLORS[i % len(COLORS)],
            label=method,
            error_kw={"lw": 0.8},
        )
        for place, height in zip(places, heights, strict=True):
            if height == FAILED:
                axes.text(place, 0, FAILED, rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(bits)), bits)
    axes.set_title(title)


def metric_figure(
    results: TableResults, metric: str = "fid", label: str = "FID", dataset: str | None = None
) -> Figure:
    """The paper's numbers at the left, ours with the spread over seeds at the right.

    The dashed line is full precision. The two panels' scales differ.

    Args:
        metric: one of `reproduce.results.METRICS`.
        label: its name in the titles.
        dataset: only rows of this data set; None: all.
    """
    shown = [(row, r) for row, r in results if dataset in (None, row.dataset)]
    rows = [row for row, _ in shown if not row.full_precision]
    measured = {_key(row): r.metric(metric) for row, r in shown if not row.full_precision}
    full = next(((row, r.metric(metric)) for row, r in shown if row.full_precision), None)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
        papers = {_key(row): row.paper.get(metric) for row in rows}
        _bars(left, rows, papers, {}, f"{label}, paper (its model and data)")
        _bars(
            right,
            rows,
            {key: m.value for key, m in measured.items()},
            {key: m.std for key, m in measured.items()},
            f"{label}, ours ({results.plan.scale.name} scale)",
        )
        if full is not None:
            _full_precision_line(left, full[0].paper.get(metric))
            _full_precision_line(right, full[1].value)
        known = [*measured.values(), *([] if full is None else [full[1]])]
        _choose_scale(right, [m.value for m in known if m.value is not None])
        right.legend(**BESIDE)
    plt.close(figure)
    return figure


def _full_precision_line(axes: plt.Axes, value: Number) -> None:
    if isinstance(value, int | float):
        axes.axhline(value, ls="--", lw=1, color="black", label="full precision")


def _choose_scale(axes: plt.Axes, values: list[float]) -> None:
    """A logarithmic axis where values lie far apart; a note where there are none."""
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
    elif max(values) > LOG_SPAN * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _quantized(results: TableResults) -> list[tuple[Row, Result]]:
    """Quantized rows that have numbers."""
    return [(row, result) for row, result in results.done if not row.full_precision]


def cost_figure(results: TableResults) -> Figure:
    """Seconds of the quantizing stages, stacked, one bar a row."""
    done = _quantized(results)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.6 + 0.26 * max(len(done), 1)))
        names = [f"{row.bits}  {row.label}" for row, _ in done]
        left = np.zeros(len(done))
        for i, stage in enumerate(STAGES):
            width = np.array([result.seconds[stage] for _, result in done])
            axes.barh(names, width, left=left, color=COLORS[i], label=stage)
            left += width
        axes.invert_yaxis()
        axes.set_xlabel("seconds a seed, on the machine of these results")
        axes.grid(axis="x", alpha=0.3)
        if done:
            axes.legend(**BESIDE)
    plt.close(figure)
    return figure


def rows_figure(results: TableResults, base: str) -> Figure:
    """FID and distance to full precision of every row, with the spread over seeds.

    Args:
        base: id of the row that the dashed line marks.
    """
    done = _quantized(results)
    one_width = len({row.bits for row, _ in done}) == 1
    names = [row.label if one_width else f"{row.bits}  {row.label}" for row, _ in done]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 2, figsize=(10, 0.8 + 0.26 * max(len(done), 1)), sharey=True
        )
        for axes, (metric, label) in zip(panels, PANELS, strict=True):
            measured = [result.metric(metric) for _, result in done]
            axes.barh(
                names,
                _values(measured),
                xerr=_spreads(measured),
                color=COLORS[3],
                error_kw={"lw": 0.8},
            )
            for (row, _), m in zip(done, measured, strict=True):
                if row.id == base and m.value is not None:
                    axes.axvline(m.value, ls="--", lw=1, color="black")
            axes.set_xlabel(f"{label} ({results.plan.scale.name} scale)")
            axes.grid(axis="x", alpha=0.3)
        panels[0].invert_yaxis()
    plt.close(figure)
    return figure


def _values(measured: Sequence[Measured]) -> list[float]:
    return [np.nan if m.value is None else m.value for m in measured]


def _spreads(measured: Sequence[Measured]) -> list[float]:
    return [m.std or 0.0 for m in measured]


def sensitivity_figure(results: TableResults) -> Figure:
    """Figure 3: FID and distance to full precision over activation bits.

    A line stands for a kind of layer, the dashed line for full precision.
    """
    done = _quantized(results)
    full = results.full_precision
    widths = sorted({row.act_bits for row, _ in done}, reverse=True)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10, 3.2))
        for axes, (metric, label) in zip(panels, PANELS, strict=True):
            for i, kind in enumerate(dict.fromkeys(row.label for row, _ in done)):
                rows = [(row, result.metric(metric)) for row, result in done if row.label == kind]
                axes.errorbar(
                    [row.act_bits for row, _ in rows],
                    _values([m for _, m in rows]),
                    _spreads([m for _, m in rows]),
                    marker="o",
                    color=COLORS[i + 1],
                    label=kind,
                )
            if full is not None:
                _full_precision_line(axes, full[1].metric(metric).value)
            axes.set_xlabel("bits of the activations")
            axes.set_ylabel(f"{label} ({results.plan.scale.name} scale)")
            axes.xaxis.set_inverted(True)
            axes.set_xticks(widths)
        if results.done:
            panels[0].legend(fontsize=7)
    plt.close(figure)
    return figure


def picture(results: TableResults) -> Figure:
    """Samples of the table's chosen rows, one row each, all from the same noise."""
    rows = [results.table.row(row_id) for row_id in results.table.picture]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, places = plt.subplots(len(rows), 1, figsize=(8, 1.25 * len(rows)), squeeze=False)
        for axes, row in zip(places[:, 0], rows, strict=True):
            result = results[row.id]
            path = results.plan.folder / f"{row.id}.png"
            axes.set_title(row.title, loc="left", fontsize=8)
            axes.axis("off")
            if result.done and path.is_file():
                axes.imshow(np.asarray(Image.open(path)), interpolation="nearest")
            else:
                reason = f"{result.status}: {result.reason}"
                axes.text(0, 0.5, reason, fontsize=7, transform=axes.transAxes, wrap=True)
    plt.close(figure)
    return figure
