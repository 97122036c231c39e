"""Pictures of the tour notebook: samples, activation histograms over their quantization grids, errors by step and by layer.

Functions that measure return tensors or tables; functions that draw return a Figure and leave style and colors to rcParams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn

from questlib.calibration import Calibration
from questlib.capture import capture_outputs, run_time_layers
from questlib.observers import VALUES_PER_TENSOR
from questlib.quantization import carrier, primitives, range_search
from questlib.quantization.roles import TIME_ROLES, layer_roles

SEARCHES = {
    "min-max": ("minmax", 2.0),
    "mse": ("mse", 2.0),
    "4th power": ("mse", 4.0),
}  # range searches: method and error norm


# ---- samples ----


def image_grid(rows: dict[str, torch.Tensor], columns: int = 8) -> Figure:
    """One strip for each entry, its name above it: the first `columns` of images uint8 [N, 3, H, W]."""
    figure, places = plt.subplots(len(rows), 1, figsize=(columns, 1.25 * len(rows)), squeeze=False)
    for axes, (name, images) in zip(places[:, 0], rows.items(), strict=True):
        strip = images[:columns].cpu().permute(2, 0, 3, 1)  # [H, N, W, 3]
        axes.imshow(strip.flatten(1, 2).numpy())
        axes.set_title(name, loc="left")
        axes.axis("off")
    plt.close(figure)
    return figure


# ---- what a layer sees, and the grids that a quantizer can lay over it (paper, Sec. 3.2 and Fig. 2) ----


@torch.no_grad()
def watch_inputs(
    unet: nn.Module,
    calib: Calibration,
    names: Iterable[str],
    samples: int,
    see: Callable[[str, torch.Tensor], None],
) -> None:
    """Call `see` with each named layer's name and input, before its own quantizer, at all calibrated steps: [samples, ...]."""
    handles = [
        unet.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: see(n, a[0]))
        for n in names
    ]
    try:
        for x, t in zip(calib.x[:, :samples], calib.t, strict=True):
            unet(x.to(unet.device), t.to(unet.device))
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(
    unet: nn.Module, calib: Calibration, names: Iterable[str], samples: int = 16
) -> dict[str, torch.Tensor]:
    """What each named layer receives, before its own quantizer, at all calibrated steps: [T * samples, ...]."""
    found: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    watch_inputs(unet, calib, found, samples, lambda n, x: found[n].append(x.cpu()))
    return {n: torch.cat(v) for n, v in found.items()}


def input_table(unet: nn.Module, calib: Calibration, samples: int = 4) -> pd.DataFrame:
    """Role, range, standard deviation and kurtosis (3 for a normal distribution) of each layer's input, heaviest tails first.

    The inputs themselves are not kept: those of a large model would not fit in memory.
    """
    roles = layer_roles(unet)
    extremes: dict[str, tuple[float, float]] = dict.fromkeys(roles, (float("inf"), -float("inf")))
    sums = {n: [0.0] * 5 for n in roles}  # of x^0 .. x^4

    def see(name: str, x: torch.Tensor) -> None:
        lo, hi = extremes[name]
        extremes[name] = min(lo, x.min().item()), max(hi, x.max().item())
        x = x.double()
        sums[name] = [total + x.pow(k).sum().item() for k, total in enumerate(sums[name])]

    watch_inputs(unet, calib, roles, samples, see)
    rows = {}
    for name, (n, *moments) in sums.items():
        m1, m2, m3, m4 = (m / n for m in moments)
        variance = m2 - m1**2
        kurtosis = (
            (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2
            if variance > 0
            else float("nan")
        )
        rows[name] = [roles[name], *extremes[name], (variance * n / (n - 1)) ** 0.5, kurtosis]
    columns = ["role", "min", "max", "std", "kurtosis"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns).sort_values(
        "kurtosis", ascending=False
    )


def channel_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A layer's input as [C, n]; `dim` is its channel dimension (ActQuantizer.dim)."""
    return x.movedim(dim, 0).flatten(1)


def grid(values: torch.Tensor, bits: int, search: str) -> torch.Tensor:
    """The 2^bits values, ascending, to which one quantizer rounds all of `values` [n]; its range from one of SEARCHES."""
    method, norm = SEARCHES[search]
    scale, zero = range_search.choose_qparams(
        _thin(values)[None], values.min()[None], values.max()[None], bits, method, norm=norm
    )
    return (torch.arange(2**bits) - zero) * scale


def grid_table(values: dict[str, torch.Tensor], bits: int) -> pd.DataFrame:
    """For each set of values and each search: the grid's step, what is clipped, the mean squared error and its two parts."""
    rows = {}
    for name, x in values.items():
        x = x.flatten()
        for search in SEARCHES:
            levels = grid(x, bits, search)
            step = levels[1] - levels[0]
            error = (
                x - levels[((x - levels[0]) / step).round().clamp(0, len(levels) - 1).long()]
            ).square()
            clipped = (x < levels[0] - step / 2) | (x > levels[-1] + step / 2)
            parts = [
                step,
                clipped.float().mean() * 100,
                error[~clipped].sum() / len(x),
                error[clipped].sum() / len(x),
            ]
            parts += [error.mean(), error.max().sqrt()]
            rows[name, search] = [v.item() for v in (x.min(), x.max(), x.std(), *parts)]
    columns = [
        "min",
        "max",
        "std",
        "step",
        "clipped %",
        "rounding MSE",
        "clipping MSE",
        "MSE",
        "largest error",
    ]
    return pd.DataFrame(list(rows.values()), pd.MultiIndex.from_tuples(rows), columns)


def histogram_figure(values: dict[str, torch.Tensor], bits: int, title: str) -> Figure:
    """A histogram for each entry, counts on a log scale; above it the grid values of each search as ticks."""
    figure, places = plt.subplots(
        1, len(values), figsize=(4 * len(values), 3), sharex=True, sharey=True, squeeze=False
    )
    figure.suptitle(title)
    for axes, (name, x) in zip(places[0], values.items(), strict=True):
        counts, edges = np.histogram(x.numpy(), 160)
        axes.stairs(counts, edges, fill=True, color="C0")
        axes.set_yscale("log")
        for i, search in enumerate(SEARCHES):
            top = 0.99 - 0.08 * i  # rulers in the free space above the bars
            levels = grid(x.flatten(), bits, search)
            axes.vlines(
                levels,
                top - 0.06,
                top,
                color=f"C{i + 1}",
                lw=1.5,
                transform=axes.get_xaxis_transform(),
                label=search,
            )
        axes.set(
            title=f"{name}, std {x.std().item():.2f}",
            xlabel="value",
            ylim=(0.5, counts.max() * 100),
        )
    places[0, 0].set_ylabel("count")
    places[0, 0].legend(title=f"{2**bits} grid values", loc="upper right", bbox_to_anchor=(1, 0.75))
    plt.close(figure)
    return figure


# ---- one scale for each input channel, and its form that runs in integers ----


def channel_scales(
    rows: torch.Tensor, bits: int, norm: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scale and zero point, float32 [C] each, of inputs [C, n]: one for all channels, one a channel, and on the carrier grid.

    norm: the searches minimize |error|^norm (QuantConfig.range_norm).
    """
    lo, hi = rows.amin(1), rows.amax(1)
    one, zero = range_search.choose_qparams(
        _thin(rows.flatten())[None], lo.amin()[None], hi.amax()[None], bits, "mse", norm=norm
    )
    free, free_zero = range_search.choose_qparams(rows, lo, hi, bits, "mse", norm=norm)
    shifts = carrier.block_shifts(free[None])
    base, ratio, carrier_zero = carrier.snap_to_carrier(rows, free, free_zero, shifts, bits, norm)
    tensor = (one.expand(len(rows)), zero.expand(len(rows)))
    return {
        "one for all": tensor,
        "one a channel": (free, free_zero),
        "carrier grid": (base * ratio, carrier_zero),
    }


def channel_figure(rows: torch.Tensor, bits: int, norm: float) -> Figure:
    """Inputs [C, n], channels in the order of their free scales. Left their ranges, right their scales and relative errors."""
    scales = channel_scales(rows, bits, norm)
    order = scales["one a channel"][0].argsort()
    place = torch.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharex=True)
    left.vlines(place, rows.amin(1)[order], rows.amax(1)[order], color="C0", lw=1)
    left.vlines(
        place,
        *rows.quantile(torch.tensor([0.01, 0.99]), 1)[:, order],
        color="C3",
        lw=1.5,
        label="98% of the values",
    )
    left.set(
        title="range of each input channel", xlabel="channel, sorted by its scale", ylabel="value"
    )
    left.legend(loc="upper left")
    for i, (name, (scale, zero)) in enumerate(scales.items()):
        error = (
            primitives.fake_quant(rows, scale[:, None], zero[:, None], bits) - rows
        ).square().sum() / rows.square().sum()
        right.plot(
            place,
            scale[order],
            ".-"[i == 0],
            color=f"C{i + 1}",
            ms=4,
            label=f"{name}: error {error.item():.4f}",
        )
    right.set(
        title="scale of each input channel", xlabel="channel, sorted by its scale", ylim=(0, None)
    )
    right.legend()
    plt.close(figure)
    return figure


# ---- TLA: the layers that see the time step alone (paper, Property 1) ----


@torch.no_grad()
def time_outputs(unet: nn.Module, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output [T, C] of each time-embedding layer for t int64 [T]."""
    names = [n for n, role in layer_roles(unet).items() if role in TIME_ROLES]
    with capture_outputs(unet, names) as outputs:
        run_time_layers(unet, t.to(unet.device))
    return {n: outputs[n].cpu() for n in names}


def time_errors(student: nn.Module, teacher: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """||O(t) - O~(t)|| / ||O(t)|| [T], where O(t) holds the outputs of all time-embedding layers."""
    targets, own = (
        torch.cat(list(time_outputs(unet, t).values()), 1) for unet in (teacher, student)
    )
    return (own - targets).norm(dim=1) / targets.norm(dim=1)


def time_figure(teacher: nn.Module, students: dict[str, nn.Module], steps: torch.Tensor) -> Figure:
    """Over t, with dots at the sampler's `steps` [T]: left the output that depends most on t, right the relative error of all."""
    t = torch.arange(int(steps.min()), int(steps.max()) + 1, 2)
    targets = {n: x for n, x in time_outputs(teacher, t).items() if n.endswith("time_emb_proj")}
    name = max(targets, key=lambda n: targets[n].var(0).max().item())
    channel = int(targets[name].var(0).argmax())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharex=True)
    left.plot(t, targets[name][:, channel], color="black", label="full precision")
    for i, (label, student) in enumerate(students.items()):
        style, dots = (
            dict(color=f"C{i + 1}", lw=0.8),
            dict(color=f"C{i + 1}", ls="", marker="o", ms=4),
        )
        left.plot(t, time_outputs(student, t)[name][:, channel], **style)
        left.plot(steps, time_outputs(student, steps)[name][:, channel], **dots, label=label)
        right.plot(t, time_errors(student, teacher, t), **style)
        errors = time_errors(student, teacher, steps)
        right.plot(
            steps, errors, **dots, label=f"{label}, mean of the dots {errors.mean().item():.3f}"
        )
    left.set_title(f"{name}, channel {channel}", fontsize="medium")
    right.set(title="relative error, all time-embedding layers", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("time step t; dots: the sampler's steps")
        axes.legend()
    plt.close(figure)
    return figure


# ---- CMA: the attention-related layers ----


@torch.no_grad()
def layer_errors(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    names: Iterable[str],
    samples: int = 16,
) -> dict[str, float]:
    """||O - O~|| / ||O|| of each named layer over all calibrated steps, each model on its own inputs, as in L_CMA."""
    names = list(names)
    error, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for x, t in zip(calib.x[:, :samples], calib.t, strict=True):
        x, t = x.to(teacher.device), t.to(teacher.device)
        with capture_outputs(teacher, names) as targets, capture_outputs(student, names) as own:
            teacher(x, t), student(x, t)
        for n in names:
            error[n] += (own[n] - targets[n]).square().sum().item()
            power[n] += targets[n].square().sum().item()
    return {n: (error[n] / power[n]) ** 0.5 for n in names}


def layer_error_figure(errors: dict[str, dict[str, float]]) -> Figure:
    """For each layer one bar of each entry, layers in the order of the model."""
    names = list(next(iter(errors.values())))
    height, place = 0.8 / len(errors), np.arange(len(names))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(names)))
    for i, (label, values) in enumerate(errors.items()):
        axes.barh(
            place + i * height - 0.4,
            [values[n] for n in names],
            height,
            align="edge",
            color=f"C{i + 1}",
            label=label,
        )
    axes.set(yticks=place, yticklabels=names, xlabel="relative error of the layer's output")
    axes.tick_params(axis="y", labelsize="small")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.legend()
    plt.close(figure)
    return figure


def loss_figure(log: list[list]) -> Figure:
    """The finetuning log's "loss" [[stage, iteration, local, global], ...]: a panel a stage."""
    stages = list(dict.fromkeys(entry[0] for entry in log))
    figure, places = plt.subplots(1, len(stages), figsize=(5 * len(stages), 2.8), squeeze=False)
    for axes, stage in zip(places[0], stages, strict=True):
        table = np.array([entry[1:] for entry in log if entry[0] == stage])  # [n, 3]
        for column, label in ((1, f"L_{stage.upper()}"), (2, "L_G")):
            if table[:, column].any():  # a stage without a local loss logs zeros
                axes.plot(table[:, 0], table[:, column], color=f"C{column}", lw=1, label=label)
        axes.set(title=f"stage {stage.upper()}", xlabel="iteration", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
    plt.close(figure)
    return figure


def _thin(values: torch.Tensor) -> torch.Tensor:
    """An evenly spaced part of flat values, as many as calibration keeps."""
    return values[:: max(1, len(values) // VALUES_PER_TENSOR)]
