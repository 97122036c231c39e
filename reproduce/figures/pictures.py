"""Pictures of models: samples, errors by step and by layer, losses of finetuning.

Functions that measure return tensors or numbers. Functions that draw return a Figure. What layers
receive is in `activations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from questlib.calibration import Calibration
from questlib.capture import capture_outputs
from questlib.quantization.roles import TIME_ROLES, layer_roles
from questlib.quantization.time_path import run_time_layers
from reproduce.figures import style
from reproduce.figures.style import styled


@styled
def image_grid(rows: dict[str, torch.Tensor], columns: int = 8) -> Figure:
    """A strip of images for each entry, its name above it.

    Args:
        rows: images uint8 [N, 3, H, W] by name, of which the first `columns` are shown.
    """
    figure, places = plt.subplots(len(rows), 1, figsize=(columns, 1.25 * len(rows)), squeeze=False)
    for axes, (name, images) in zip(places[:, 0], rows.items(), strict=True):
        strip = images[:columns].cpu().permute(2, 0, 3, 1)  # [H, N, W, 3]
        axes.imshow(strip.flatten(1, 2).numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=8)
        axes.axis("off")
    return figure


# ---- TLA: the layers that see the time step alone (paper, Property 1) ----


@torch.no_grad()
def time_outputs(unet: nn.Module, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output [T, C] of each time-embedding layer for timesteps t int64 [T]."""
    names = [name for name, role in layer_roles(unet).items() if role in TIME_ROLES]
    with capture_outputs(unet, names) as outputs:
        run_time_layers(unet, t.to(unet.device))
    return {name: outputs[name].cpu() for name in names}


def time_errors(student: nn.Module, teacher: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """||O(t) - O~(t)|| / ||O(t)|| [T], where O(t) is the output of all time-embedding layers."""
    targets = torch.cat(list(time_outputs(teacher, t).values()), 1)  # [T, all channels]
    own = torch.cat(list(time_outputs(student, t).values()), 1)
    return (own - targets).norm(dim=1) / targets.norm(dim=1)


@styled
def time_figure(teacher: nn.Module, students: dict[str, nn.Module], steps: torch.Tensor) -> Figure:
    """Outputs over t: the one that depends most on t at the left, the error of all at the right.

    Args:
        students: quantized models by their names in the legend.
        steps: the sampler's timesteps int64 [T], which dots mark.
    """
    t = torch.arange(int(steps.min()), int(steps.max()) + 1, 2)
    targets = {n: x for n, x in time_outputs(teacher, t).items() if n.endswith("time_emb_proj")}
    name = max(targets, key=lambda n: targets[n].var(0).max().item())
    channel = int(targets[name].var(0).argmax())
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3), sharex=True)
    exact = style.color("full precision")
    left.plot(t, targets[name][:, channel], color=exact)
    right.plot([], color=exact, label="full precision")
    for i, (label, student) in enumerate(students.items()):
        line: dict[str, Any] = dict(color=style.color(label, i), lw=0.7, alpha=0.6)
        dots: dict[str, Any] = dict(color=style.color(label, i), ls="", marker="o", ms=4)
        left.plot(t, time_outputs(student, t)[name][:, channel], **line)
        left.plot(steps, time_outputs(student, steps)[name][:, channel], **dots)
        errors = time_errors(student, teacher, steps)
        mean = f"mean error of the dots {errors.mean().item():.3f}"
        right.plot(t, time_errors(student, teacher, t), **line)
        right.plot(steps, errors, **dots, label=f"{label}\n{mean}")
    left.set_title(f"{name}, channel {channel}", fontsize=9)
    right.set_title("relative error, all time-embedding layers", fontsize=9)
    right.set_ylim(0, None)
    for axes in (left, right):
        axes.set_xlabel("time step t; dots: the sampler's steps")
    right.legend(**style.BESIDE)
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
    """||O - O~|| / ||O|| of each named layer over all calibrated steps.

    Each model runs on its own inputs, as in L_CMA.

    Args:
        samples: trajectories of the calibration set.
    """
    names = list(names)
    error = dict.fromkeys(names, 0.0)
    power = dict.fromkeys(names, 0.0)
    for x, t in zip(calib.x[:, :samples], calib.t, strict=True):
        x = x.to(teacher.device)
        t = t.to(teacher.device)
        with capture_outputs(teacher, names) as targets, capture_outputs(student, names) as own:
            teacher(x, t)
            student(x, t)
        for name in names:
            error[name] += (own[name] - targets[name]).square().sum().item()
            power[name] += targets[name].square().sum().item()
    return {name: (error[name] / power[name]) ** 0.5 for name in names}


@styled
def layer_error_figure(errors: dict[str, dict[str, float]]) -> Figure:
    """For each layer a dot of each entry, layers in the order of the model."""
    names = list(next(iter(errors.values())))
    place = np.arange(len(names))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(names)))
    for i, (label, values) in enumerate(errors.items()):
        found = [values[name] for name in names]
        axes.plot(found, place, "o", ms=5, color=style.color(label, i), label=label)
    axes.set_yticks(place, names, fontsize="small")
    axes.set_xlim(0, None)
    axes.set_xlabel("relative error of the layer's output")
    axes.invert_yaxis()
    axes.grid(True, axis="both")
    axes.legend(**style.BESIDE)
    return figure


@styled
def loss_figure(log: Sequence[Sequence[Any]]) -> Figure:
    """The losses of finetuning, a panel a stage.

    Args:
        log: the finetuning log's "loss", [[stage, iteration, local, global], ...].
    """
    stages = list(dict.fromkeys(entry[0] for entry in log))
    figure, places = plt.subplots(1, len(stages), figsize=(5 * len(stages), 2.8), squeeze=False)
    for axes, stage in zip(places[0], stages, strict=True):
        table = np.array([entry[1:] for entry in log if entry[0] == stage])  # [n, 3]
        for column, label in ((1, f"L_{stage.upper()}"), (2, "L_G")):
            if table[:, column].any():  # a stage without a local loss logs zeros
                axes.plot(
                    table[:, 0], table[:, column], color=style.color(label), lw=1, label=label
                )
        axes.set_title(f"stage {stage.upper()}")
        axes.set_xlabel("iteration")
        style.logarithmic(axes, axes.yaxis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(**style.BESIDE)
    return figure
