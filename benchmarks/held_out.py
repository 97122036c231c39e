"""The error of a quantized UNet on trajectories that it was not calibrated on."""

from __future__ import annotations

import torch
from torch import nn

import questlib
from questlib.calibration import Calibration

SEED = 1000
TRAJECTORIES = 16


def calibrations(pipe: object, num_samples: int, **how: object) -> tuple[Calibration, Calibration]:
    """Calls to calibrate on, and others to measure on, drawn in the same way."""
    calib = questlib.calibrate(pipe, num_samples, seed=0, **how)
    return calib, questlib.calibrate(pipe, TRAJECTORIES, seed=SEED, **how)


@torch.no_grad()
def error_db(unet: nn.Module, calib: Calibration) -> float:
    """The error of the predicted noise over all steps, relative to its power; less is better."""
    every = torch.arange(calib.x.shape[1])
    outputs = [calib.batch(step, every).run(unet) for step in range(len(calib.t))]
    return decibel(torch.stack(outputs), calib.eps)


def decibel(output: torch.Tensor, target: torch.Tensor) -> float:
    """The power of an error beside that of what was aimed at; less is better."""
    return 10 * ((output - target).pow(2).mean() / target.pow(2).mean()).log10().item()
