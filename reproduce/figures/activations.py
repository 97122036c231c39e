"""What layers receive, and the grids that a quantizer can lay over it (paper, Sec. 3.2, Fig. 2).

Functions that measure return tensors or tables. Functions that draw return a Figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from questlib.calibration import Calibration
from questlib.capture import hooks
from questlib.config_groups import Search
from questlib.observers import VALUES_PER_TENSOR
from questlib.quantization import carrier, primitives, range_search
from questlib.quantization.roles import layer_roles
from reproduce.figures import style
from reproduce.figures.style import styled

# Range searches by name: method and error norm.
SEARCHES: dict[str, tuple[Search, float]] = {
    "min-max": ("minmax", 2.0),
    "mse": ("mse", 2.0),
    "4th power": ("mse", 4.0),
}


# ---- inputs of layers ----


@torch.no_grad()
def watch_inputs(
    unet: nn.Module,
    calib: Calibration,
    names: Iterable[str],
    samples: int,
    see: Callable[[str, torch.Tensor], None],
) -> None:
    """Run the UNet at all calibrated steps and look at what layers receive.

    Args:
        unet: the model; a layer's input is seen before the layer's own quantizer.
        names: of the layers.
        samples: trajectories of the calibration set.
        see: called with a layer's name and its input [samples, ...], once a step.
    """

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            see(name, args[0])

        return hook

    with hooks(unet, {name: watch(name) for name in names}, "input"):
        for x, t in zip(calib.x[:, :samples], calib.t, strict=True):
            unet(x.to(unet.device), t.to(unet.device))


def layer_inputs(
    unet: nn.Module, calib: Calibration, names: Iterable[str], samples: int = 16
) -> dict[str, torch.Tensor]:
    """Each named layer's input at all calibrated steps, [T * samples, ...] on the CPU."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    watch_inputs(unet, calib, found, samples, lambda name, x: found[name].append(x.cpu()))
    return {name: torch.cat(inputs) for name, inputs in found.items()}


def input_table(unet: nn.Module, calib: Calibration, samples: int = 4) -> pd.DataFrame:
    """Role, range, standard deviation and kurtosis of each layer's input, heaviest tails first.

    Kurtosis is 3 for a normal distribution. The inputs themselves are not kept: those of a large
    model would not fit in memory.
    """
    roles = layer_roles(unet)
    extremes = dict.fromkeys(roles, (float("inf"), -float("inf")))
    sums = {name: [0.0] * 5 for name in roles}  # of x^0 .. x^4

    def see(name: str, x: torch.Tensor) -> None:
        low, high = extremes[name]
        extremes[name] = min(low, x.min().item()), max(high, x.max().item())
        x = x.double()
        sums[name] = [total + x.pow(k).sum().item() for k, total in enumerate(sums[name])]

    watch_inputs(unet, calib, roles, samples, see)
    rows = {}
    for name, (count, *totals) in sums.items():
        std, kurtosis = _moments(count, totals)
        rows[name] = [roles[name], *extremes[name], std, kurtosis]
    columns = ["role", "min", "max", "std", "kurtosis"]
    table = pd.DataFrame.from_dict(rows, "index", columns=columns)
    return table.sort_values("kurtosis", ascending=False)


def _moments(count: float, totals: list[float]) -> tuple[float, float]:
    """Sample standard deviation and kurtosis from the sums of x to x^4."""
    m1, m2, m3, m4 = (total / count for total in totals)
    variance = m2 - m1**2
    std = (variance * count / (count - 1)) ** 0.5
    if variance <= 0:
        return std, float("nan")
    return std, (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2


# ---- one grid for all values ----


def grid(values: torch.Tensor, bits: int, search: str) -> torch.Tensor:
    """The values, ascending, to which one quantizer rounds all of `values`.

    Args:
        values: float [n].
        bits: of the quantizer, which gives 2^bits values.
        search: one of SEARCHES, which finds the range.
    """
    method, norm = SEARCHES[search]
    scale, zero_point = range_search.choose_qparams(
        _thin(values)[None], values.min()[None], values.max()[None], bits, method, norm=norm
    )
    return (torch.arange(2**bits) - zero_point) * scale


def grid_table(values: dict[str, torch.Tensor], bits: int) -> pd.DataFrame:
    """For each set of values and each search: the grid's step, what is clipped, and the errors.

    The mean squared error is also given in its two parts, of rounding and of clipping.
    """
    rows = {
        (name, search): _grid_errors(x.flatten(), grid(x.flatten(), bits, search))
        for name, x in values.items()
        for search in SEARCHES
    }
    return pd.DataFrame(list(rows.values()), pd.MultiIndex.from_tuples(rows))


def _grid_errors(x: torch.Tensor, levels: torch.Tensor) -> dict[str, float]:
    step = levels[1] - levels[0]
    codes = ((x - levels[0]) / step).round().clamp(0, len(levels) - 1).long()
    error = (x - levels[codes]).square()
    clipped = (x < levels[0] - step / 2) | (x > levels[-1] + step / 2)
    found = {
        "min": x.min(),
        "max": x.max(),
        "std": x.std(),
        "step": step,
        "clipped %": clipped.float().mean() * 100,
        "rounding MSE": error[~clipped].sum() / len(x),
        "clipping MSE": error[clipped].sum() / len(x),
        "MSE": error.mean(),
        "largest error": error.max().sqrt(),
    }
    return {name: value.item() for name, value in found.items()}


@styled
def histogram_figure(values: dict[str, torch.Tensor], bits: int, title: str) -> Figure:
    """A histogram for each entry, counts on a log scale; above it each search's grid as ticks."""
    figure, places = plt.subplots(
        1, len(values), figsize=(3.4 * len(values) + 1, 3), sharex=True, sharey=True, squeeze=False
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for axes, (name, x) in zip(places[0], values.items(), strict=True):
        counts, edges = np.histogram(x.numpy(), 160)
        axes.stairs(counts, edges, fill=True, color=style.color(name))
        axes.set_yscale("log")
        for i, search in enumerate(SEARCHES):
            top = 0.99 - 0.08 * i  # rulers in the free space above the bars
            axes.vlines(
                grid(x.flatten(), bits, search),
                top - 0.06,
                top,
                color=style.color(search),
                lw=1.5,
                transform=axes.get_xaxis_transform(),
                label=search,
            )
        axes.set_title(f"{name}\nstd {x.std().item():.2f}", fontsize=9)
        axes.set_xlabel("value")
        axes.set_ylim(0.5, counts.max() * 100)
    places[0, 0].set_ylabel("count")
    places[0, -1].legend(title=f"{2**bits} grid values", title_fontsize=8, **style.BESIDE)
    return figure


# ---- one scale for each input channel, and its form that runs in integers ----


def channel_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A layer's input as [C, n]; `dim` is its channel dimension (`ActQuantizer.dim`)."""
    return x.movedim(dim, 0).flatten(1)


def channel_scales(
    rows: torch.Tensor, bits: int, norm: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Scale and zero point by granularity: one for all channels, one a channel, carrier grid.

    Args:
        rows: inputs by channel, [C, n].
        norm: the searches minimize |error|^norm (`QuantConfig.ranges.range_norm`).

    Returns:
        Scales and zero points float32 [C], by the granularity's name.
    """
    low = rows.amin(1)
    high = rows.amax(1)
    one, zero = range_search.choose_qparams(
        _thin(rows.flatten())[None], low.amin()[None], high.amax()[None], bits, "mse", norm=norm
    )
    free, free_zero = range_search.choose_qparams(rows, low, high, bits, "mse", norm=norm)
    shifts = carrier.block_shifts(free[None])
    base, ratio, carrier_zero = carrier.snap_to_carrier(rows, free, free_zero, shifts, bits, norm)
    return {
        "one for all": (one.expand(len(rows)), zero.expand(len(rows))),
        "one a channel": (free, free_zero),
        "carrier grid": (base * ratio, carrier_zero),
    }


@styled
def channel_figure(rows: torch.Tensor, bits: int, norm: float) -> Figure:
    """Ranges of input channels at the left, their scales and relative errors at the right.

    Channels stand in the order of their free scales.

    Args:
        rows: inputs by channel, [C, n].
    """
    scales = channel_scales(rows, bits, norm)
    order = scales["one a channel"][0].argsort()
    place = torch.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), sharex=True)
    bulk_low, bulk_high = rows.quantile(torch.tensor([0.01, 0.99]), 1)[:, order]
    left.vlines(place, rows.amin(1)[order], rows.amax(1)[order], color=style.GREY, lw=1)
    left.vlines(place, bulk_low, bulk_high, color=style.BLACK, lw=1.5)
    left.set_title("range of each input channel; dark: 98% of its values")
    left.set_ylabel("value")
    for name, (scale, zero_point) in scales.items():
        rounded = primitives.fake_quant(rows, scale[:, None], zero_point[:, None], bits)
        error = (rounded - rows).square().sum() / rows.square().sum()
        right.plot(
            place,
            scale[order],
            "-" if name == "one for all" else ".",
            color=style.color(name),
            ms=4,
            label=f"{name}: error {error.item():.4f}",
        )
    right.set_title("scale of each input channel")
    right.set_ylim(0, None)
    right.legend(**style.BESIDE)
    for axes in (left, right):
        axes.set_xlabel("channel, sorted by its scale")
    return figure


def _thin(values: torch.Tensor) -> torch.Tensor:
    """An evenly spaced part of flat values, as many as calibration keeps."""
    return values[:: max(1, len(values) // VALUES_PER_TENSOR)]
