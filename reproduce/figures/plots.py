"""Pictures for notebooks and README, in one style: FID bars beside the paper's, cost, and samples from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from reproduce.plan import Plan
from reproduce.reporting import report
from reproduce.tables.base import FAILED

STYLE = {
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
COLORS = [
    "#8d99ae",
    "#e07a5f",
    "#81b29a",
    "#3d5a80",
    "#f2cc8f",
    "#6d597a",
    "#b56576",
    "#a3b18a",
]  # by method, in the table's order

BESIDE = {
    "fontsize": 7,
    "loc": "upper left",
    "bbox_to_anchor": (1.0, 1.0),
}  # a legend at the axes' right
LOG_SPAN = 10  # values that differ by more stand on a logarithmic axis
PANELS = (
    ("fid", "FID"),
    ("feature_distance_to_fp", "distance to full precision"),
)  # metrics side by side, and their names


def _quantized(
    results: list[dict[str, Any]],
) -> tuple[list[str], list[str], dict[tuple[str, str], dict[str, Any]]]:
    """(bit-widths, methods, results by both), full precision left out."""
    rows = {(report.bits(r), r["label"]): r for r in results if r["preset"] is not None}
    return list(dict.fromkeys(b for b, _ in rows)), list(dict.fromkeys(m for _, m in rows)), rows


def _bars(
    axes: plt.Axes, bits: list[str], methods: list[str], values: dict, errors: dict, title: str
) -> None:
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        x = np.arange(len(bits)) + (i - (len(methods) - 1) / 2) * width
        heights = [values.get((b, method)) for b in bits]
        bars = [np.nan if h is None or isinstance(h, str) else h for h in heights]
        spread = [errors.get((b, method)) or 0 for b in bits]
        axes.bar(
            x,
            bars,
            width * 0.92,
            yerr=spread,
            color=COLORS[i % len(COLORS)],
            label=method,
            error_kw={"lw": 0.8},
        )
        for place, height in zip(x, heights, strict=True):
            if height == FAILED:
                axes.text(place, 0, FAILED, rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(bits)), bits)
    axes.set_title(title)


def metric_figure(results: list[dict[str, Any]], metric: str = "fid", label: str = "FID") -> Figure:
    """Left the paper's numbers, right ours with the spread over seeds; the dashed line is full precision. Scales differ."""
    bits, methods, rows = _quantized(results)
    entries = {key: r["metrics"][metric] for key, r in rows.items()}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
        _bars(
            left,
            bits,
            methods,
            {k: e["paper"] for k, e in entries.items()},
            {},
            f"{label}, paper (its model and data)",
        )
        ours, spread = (
            {k: e["value"] for k, e in entries.items()},
            {k: e["std"] for k, e in entries.items()},
        )
        _bars(right, bits, methods, ours, spread, f"{label}, ours ({results[0]['scale']} scale)")
        full = next(
            (r["metrics"][metric] for r in results if r["preset"] is None),
            {"paper": None, "value": None},
        )
        for axes, value in ((left, full["paper"]), (right, full["value"])):
            if value is not None:
                axes.axhline(value, ls="--", lw=1, color="black", label="full precision")
        known = [v for v in (*ours.values(), full["value"]) if v is not None]
        if not known:
            right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center")
            right.set_yticks([])
        elif max(known) > LOG_SPAN * min(known) > 0:
            right.set_yscale("log")
            right.yaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
            right.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        right.legend(**BESIDE)
    plt.close(figure)
    return figure


def cost_figure(results: list[dict[str, Any]]) -> Figure:
    """Seconds of the quantizing stages, stacked, one bar a row."""
    done = [r for r in results if r["status"] == "done" and r["preset"] is not None]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.6 + 0.26 * max(len(done), 1)))
        names = [f"{report.bits(r)}  {r['label']}" for r in done]
        left = np.zeros(len(done))
        for i, stage in enumerate(("calibrate", "ranges", "reconstruct", "finetune")):
            width = np.array([r["seconds"][stage] for r in done])
            axes.barh(names, width, left=left, color=COLORS[i], label=stage)
            left += width
        axes.invert_yaxis()
        axes.set_xlabel("seconds a seed, on the machine of these results")
        axes.grid(axis="x", alpha=0.3)
        if done:
            axes.legend(**BESIDE)
    plt.close(figure)
    return figure


def rows_figure(results: list[dict[str, Any]], base: str) -> Figure:
    """FID and distance to full precision of every row, with the spread over seeds; the line is row `base`."""
    done = [r for r in results if r["status"] == "done" and r["preset"] is not None]
    one_width = len({report.bits(r) for r in done}) == 1
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 2, figsize=(10, 0.8 + 0.26 * max(len(done), 1)), sharey=True
        )
        for axes, (metric, label) in zip(panels, PANELS, strict=True):
            entries = [r["metrics"][metric] for r in done]
            names = [r["label"] if one_width else f"{report.bits(r)}  {r['label']}" for r in done]
            values = [e["value"] for e in entries]
            axes.barh(
                names,
                values,
                xerr=[e["std"] or 0 for e in entries],
                color=COLORS[3],
                error_kw={"lw": 0.8},
            )
            for r, value in zip(done, values, strict=True):
                if r["cell"] == base:
                    axes.axvline(value, ls="--", lw=1, color="black")
            axes.set_xlabel(f"{label} ({results[0]['scale']} scale)")
            axes.grid(axis="x", alpha=0.3)
        panels[0].invert_yaxis()
    plt.close(figure)
    return figure


def sensitivity_figure(results: list[dict[str, Any]]) -> Figure:
    """Figure 3: FID and distance to full precision over activation bits, a line a kind of layer; dashed: full precision."""
    done = [r for r in results if r["status"] == "done"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(10, 3.2))
        for axes, (metric, label) in zip(panels, PANELS, strict=True):
            for i, kind in enumerate(
                dict.fromkeys(r["label"] for r in done if r["preset"] is not None)
            ):
                rows = [r for r in done if r["label"] == kind]
                entries = [r["metrics"][metric] for r in rows]
                bits, values = [r["act_bits"] for r in rows], [e["value"] for e in entries]
                axes.errorbar(
                    bits,
                    values,
                    [e["std"] or 0 for e in entries],
                    marker="o",
                    color=COLORS[i + 1],
                    label=kind,
                )
            full = [r["metrics"][metric]["value"] for r in done if r["preset"] is None]
            if full and full[0] is not None:
                axes.axhline(full[0], ls="--", lw=1, color="black", label="full precision")
            axes.set(
                xlabel="bits of the activations", ylabel=f"{label} ({results[0]['scale']} scale)"
            )
            axes.xaxis.set_inverted(True)
            axes.set_xticks(
                sorted({r["act_bits"] for r in done if r["preset"] is not None}, reverse=True)
            )
        if done:
            panels[0].legend(fontsize=7)
    plt.close(figure)
    return figure


def picture(plan: Plan, results: list[dict[str, Any]]) -> Figure:
    """Samples of the table's chosen rows, one row each, all from the same noise."""
    by_id = {r["cell"]: r for r in results}
    strips = [(by_id[c], plan.folder / f"{c}.png") for c in plan.table.picture]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, rows = plt.subplots(len(strips), 1, figsize=(8, 1.25 * len(strips)))
        for axes, (result, path) in zip(rows, strips, strict=True):
            bits = "" if result["preset"] is None else f" {report.bits(result)}"
            axes.set_title(f"{result['label']}{bits}", loc="left", fontsize=8)
            axes.axis("off")
            if result["status"] == "done" and path.is_file():
                axes.imshow(np.asarray(Image.open(path)))
            else:
                axes.text(
                    0,
                    0.5,
                    f"{result['status']}: {result['reason']}",
                    fontsize=7,
                    transform=axes.transAxes,
                    wrap=True,
                )
    plt.close(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """PNG without the metadata that would differ from run to run."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
