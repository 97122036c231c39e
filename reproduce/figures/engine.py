"""Tables and pictures of the integer engine's results, which are in benchmarks/results."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reproduce.figures import style
from reproduce.figures.style import styled


def _run(entry: dict[str, Any]) -> str:
    """How far two runs lie apart."""
    return "bit for bit" if entry["bit_identical"] else f"{entry['psnr_db']:.1f} dB"


def equality_table(result: dict[str, Any]) -> pd.DataFrame:
    """Layers, whole runs, and metrics of the engine and its simulation, from
    benchmarks/equality.py."""
    rows = []
    for r in result["results"]:
        fake = r["metrics"]["fake"]
        cpu = r["metrics"]["cpu"]
        row = {"bits": r["bits"], "preset": r["preset"], "layers": r["layers"]}
        row |= {
            "max layer difference": f"{r['max_layer_difference']:.1e}",
            "CPU engine against reference": _run(r["cpu_against_reference"]),
            "CPU engine against simulation": _run(r["cpu_against_fake"]),
            "simulation against itself in float64": _run(r["fake_float64_against_fake"]),
        }
        for name, head in (("fid", "FID"), ("feature_distance_to_fp", "distance to FP")):
            row[f"{head} simulated / in integers"] = f"{fake[name]:.3f} / {cpu[name]:.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


def formats_table(result: dict[str, Any]) -> pd.DataFrame:
    """Errors of the formats by role, from benchmarks/formats.py.

    Geometric means over a role's layers, with quantized weights.
    """
    layers = pd.DataFrame(result["layers"]).T
    mark = "quantized weights, "
    errors = pd.DataFrame(
        {
            str(name).removeprefix(mark): np.log(layers[name].astype(float))
            for name in layers
            if str(name).startswith(mark)
        }
    )
    table = errors.groupby(layers["role"], sort=False).mean().apply(np.exp)
    return table.map("{:.4f}".format).assign(layers=layers.groupby("role").size()).reset_index()


def speed_table(result: dict[str, Any], model: str) -> pd.DataFrame:
    """One UNet step of each variant, from benchmarks/cpu_unet.py."""
    rows = []
    for name, r in result["models"][model]["variants"].items():
        row = {"variant": name, "step, s": f"{r['step_s']:.3f}"}
        row |= {
            f"x {v}": f"{r[f'times_{v}']:.2f}"
            for v in ("fp32", "bf16-compiled")
            if f"times_{v}" in r
        }
        row |= {
            "peak memory, MB": f"{r['peak_bytes'] / 1e6:.0f}",
            "on disk, MB": f"{r['disk_bytes'] / 1e6:.1f}",
        }
        rows.append(row | {"of fp32": f"{r['disk_of_fp32']:.3f}"})
    return pd.DataFrame(rows)


@styled
def engine_figure(result: dict[str, Any], model: str) -> Figure:
    """Seconds, memory and bytes on disk of one UNet step, one bar a variant.

    From benchmarks/cpu_unet.py. What runs in integers is in the color of quantized models.
    """
    rows = result["models"][model]["variants"]
    panels = (
        ("step_s", 1, "seconds a step"),
        ("peak_bytes", 1e6, "peak memory, MB"),
        ("disk_bytes", 1e6, "on disk, MB"),
    )
    colors = [style.RED if name.startswith("w") else style.GREY for name in rows]
    figure, places = plt.subplots(1, 3, figsize=(10, 0.9 + 0.28 * len(rows)), sharey=True)
    for axes, (key, unit, label) in zip(places, panels, strict=True):
        bars = axes.barh(list(rows), [row[key] / unit for row in rows.values()], color=colors)
        axes.bar_label(bars, fmt="%.4g", fontsize=7, padding=2)
        axes.set_xlabel(label)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.margins(x=0.15)
    places[0].invert_yaxis()
    places[0].set_title(f"{model}, batch {result['models'][model]['batch']}", fontsize=9)
    return figure


BOUND = "the hardware's bound"
KINDS = {
    "products": style.BLUE,
    "attention": style.VIOLET,
    "quantization": style.RED,
    "norms and activations": style.ORANGE,
    "sums and copies": style.GREY,
    "other": style.BROWN,
}


def _kinds(result: dict[str, Any], model: str) -> pd.DataFrame:
    """Seconds by variant (rows) and kind of work (columns), and the bound as the last row."""
    about = result["models"][model]
    rows = about["seconds"] | {BOUND: about["bound"]}
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(KINDS)).fillna(0.0)


def breakdown_table(result: dict[str, Any], model: str) -> pd.DataFrame:
    """Where the time of one UNet step goes, from benchmarks/cpu_breakdown.py."""
    seconds = _kinds(result, model)
    seconds["step"] = seconds.sum(axis=1)
    table = seconds.map("{:.3f}".format).reset_index(names="seconds of one step")
    return table.drop(columns=[kind for kind in KINDS if not seconds[kind].round(3).any()])


@styled
def breakdown_figure(result: dict[str, Any]) -> Figure:
    """Where the time of one UNet step goes: kinds of work, stacked, and the hardware's bound.

    From benchmarks/cpu_breakdown.py, a panel for each of its models.
    """
    models = result["models"]
    shown = [kind for kind in KINDS if any(_kinds(result, m)[kind].round(3).any() for m in models)]
    figure, places = plt.subplots(1, len(models), figsize=(5 * len(models), 2.2), squeeze=False)
    for axes, model in zip(places[0], models, strict=True):
        seconds = _kinds(result, model)
        left = pd.Series(0.0, index=seconds.index)
        for kind in shown:
            axes.barh(seconds.index, seconds[kind], left=left, color=KINDS[kind], label=kind)
            left += seconds[kind]
        axes.invert_yaxis()
        axes.set_xlabel("seconds a step")
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set_title(f"{model}, batch {models[model]['batch']}", fontsize=9)
    places[0][-1].legend(**style.BESIDE)
    return figure
