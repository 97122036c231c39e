"""The losses of QuEST's finetuning (paper, Sec. 3.3, Eq. 4 to 6).

With O the output in full precision and O~ the output of the quantized model:

    L_TLA = sum_l E_t || O(t; w_l)     - O~(t; w_l, s_l)    ||^2     Eq. 4, l: time-embedding layers
    L_CMA = sum_l E_t || O(z_t,l; w_l) - O~(z~_t,l; w_l, s) ||^2     Eq. 5, l: attention-related
    L_G   =       E_t || O(x_t; w)     - O~(x_t; w~, s)     ||^2     Eq. 6

z_t,l is what layer l receives in the full-precision model, z~_t,l what it receives in the quantized
one. All quantized inputs are thus those of the quantized network, errors of earlier layers
included. ||.||^2 is the mean over an output's values, and E_t the mean over a batch.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from questlib.alignment import alignment_error
from questlib.calibration import TimeCalls
from questlib.calls import Batch
from questlib.capture import capture_outputs
from questlib.config import QuantConfig
from questlib.finetuning.stages import Stage
from questlib.quantization.time_path import run_time_layers

Outputs = dict[str, torch.Tensor]  # of layers, by name


# ---- Eq. 4 ----


def tla_loss(
    student: nn.Module, calls: TimeCalls, targets: Outputs, *, normalize: bool = False
) -> torch.Tensor:
    """L_TLA, temporal layer alignment: O~(t; w_l, s_l) against O(t; w_l).

    These layers see nothing but t (Property 1), and in some UNets labels or added conditions, so
    that all of them run without the UNet's others.

    Args:
        student: the quantized UNet.
        calls: what they see, R rows.
        targets: O, the full-precision outputs [R, C_l] of each time-embedding layer, by name.
        normalize: relative errors, averaged over layers; see `alignment_error`.
    """
    with capture_outputs(student, list(targets)) as outputs:
        run_time_layers(student, *calls)
    return alignment_error(outputs, targets, relative=normalize)


# ---- Eq. 5 ----


def cma_loss(outputs: Outputs, targets: Outputs, *, normalize: bool = False) -> torch.Tensor:
    """L_CMA, critical module alignment: O~(z~_t,l; w_l, s) against O(z_t,l; w_l).

    Args:
        outputs: O~ of each attention-related layer, from a pass of the quantized UNet on x_t.
        targets: O of the same layers, from a pass of the full-precision UNet on the same x_t.
        normalize: relative errors, averaged over layers; see `alignment_error`.
    """
    return alignment_error(outputs, targets, relative=normalize)


# ---- Eq. 6 ----


def global_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_G: the predicted noise O~(x_t; w~, s) against O(x_t; w), both [B, C, h, w]."""
    return (out - target.to(out.device)).pow(2).mean()


# ---- both losses of a stage ----


def stage_losses(
    student: nn.Module,
    teacher: nn.Module,
    stage: Stage,
    config: QuantConfig,
    batch: Batch,
    te_calls: TimeCalls | None,
    te_targets: Outputs,
) -> tuple[torch.Tensor | float, torch.Tensor]:
    """The local and the global loss of one batch.

    Args:
        student: the quantized UNet.
        teacher: the full-precision UNet.
        stage: its name decides on the local loss: L_TLA or L_CMA, or 0 when the stage has none.
        config: the run's configuration.
        batch: pairs (x_t, t) with the teacher's output.
        te_calls: what the time-embedding layers see, for L_TLA; None in stage CMA.
        te_targets: the teacher's outputs [R, C_l] of these layers for `te_calls`.

    Returns:
        L_TLA or L_CMA, and L_G. The caller weighs and adds them.
    """
    normalize = config.finetuning.normalize_local
    if not stage.local or not stage.layers:
        return 0.0, global_loss(batch.run(student), batch.eps)

    if stage.name == "tla":
        assert te_calls is not None
        local = tla_loss(student, te_calls, te_targets, normalize=normalize)
        return local, global_loss(batch.run(student), batch.eps)

    names = list(stage.layers)
    targets_device = "cpu" if config.save_memory else None
    autocast = config.finetuning.teacher_autocast
    half = torch.autocast(teacher.device.type, torch.bfloat16) if autocast else nullcontext()
    captured = capture_outputs(teacher, names, targets_device, stop=True)
    with torch.no_grad(), half, captured as targets:
        batch.run(teacher)
    with capture_outputs(student, names) as outputs:
        out = batch.run(student)
    local = cma_loss(outputs, targets, normalize=normalize)
    return local, global_loss(out, batch.eps)
