"""The losses of QuEST's finetuning (paper, Sec. 3.3, Eq. 4 to 6)."""

from __future__ import annotations

import torch
from torch import nn

from questlib.calibration import Batch
from questlib.capture import capture_outputs, run_time_layers
from questlib.config import QuantConfig
from questlib.distributed import mean
from questlib.finetuning.stages import Stage


def local_loss(student: dict, teacher: dict, normalize: bool) -> torch.Tensor:
    """L_TLA and L_CMA: the sum over layers of the mean squared difference.

    normalize: the mean over layers of the error relative to the teacher's power: layers, and L_G beside them, count alike. The
    power is that of the whole batch, of all processes, so that their mean gradient is the gradient of one process's larger batch.
    """
    powers = (
        mean(torch.stack([target.pow(2).mean() for target in teacher.values()]))
        if normalize
        else None
    )
    total = 0.0
    for i, (name, target) in enumerate(teacher.items()):
        error = (student[name] - target.to(student[name].device)).pow(2).mean()
        total = total + (error / powers[i].to(error.device).clamp_min(1e-8) if normalize else error)
    return total / len(teacher) if normalize else total


def losses(
    student: nn.Module,
    teacher: nn.Module,
    stage: Stage,
    config: QuantConfig,
    batch: Batch,
    te_t: torch.Tensor,
    te_targets: dict[str, torch.Tensor],
) -> tuple[torch.Tensor | float, torch.Tensor]:
    """(local, global) loss of one batch; te_t [T] and te_targets are for the TE layers."""
    local: torch.Tensor | float = 0.0
    names = list(stage.layers)
    if stage.name == "tla":
        if config.finetuning.tla_order == "sequential":  # one step's outputs and, below, its inputs
            now = te_t == batch.t[0].to(te_t.device)
            te_t, te_targets = te_t[now], {name: target[now] for name, target in te_targets.items()}
        if stage.local:
            with capture_outputs(student, names) as own:
                run_time_layers(student, te_t)
            local = local_loss(own, te_targets, config.finetuning.normalize_local)
        out = batch.run(student)
    elif stage.local:
        with (
            torch.no_grad(),
            capture_outputs(
                teacher, names, "cpu" if config.save_memory else None, stop=True
            ) as target,
        ):
            batch.run(teacher)
        with capture_outputs(student, names) as own:
            out = batch.run(student)
        local = local_loss(own, target, config.finetuning.normalize_local)
    else:
        out = batch.run(student)
    return local, (out - batch.eps.to(out.device)).pow(2).mean()
