"""Correction of the predicted noise after quantization (He et al., "PTQD", NeurIPS 2023, Sec. 4).

At each step the quantized UNet predicts eps_hat = (1 + k) eps + r: a part of its error is correlated with eps, the rest r has a
mean for each channel and a variance. All three are estimated on the calibration set. Corrected: (eps_hat - mean r) / (1 + k); and
a stochastic sampler adds that much less noise as the variance of r already brings.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import nn

from questlib.calibration import Calibration
from questlib.config import QuantConfig
from questlib.quantization.step_groups import nearest


class NoiseCorrection(nn.Module):
    """timesteps int64 [T], ascending; gain (k) and variance (of what is left) float32 [T], bias float32 [T, C]."""

    def __init__(self, timesteps: torch.Tensor, channels: int) -> None:
        super().__init__()
        count = len(timesteps)
        self.register_buffer("timesteps", timesteps.clone())
        self.register_buffer("gain", torch.zeros(count))
        self.register_buffer("bias", torch.zeros(count, channels))
        self.register_buffer("variance", torch.zeros(count))
        self.register_buffer("calibrated", torch.tensor(False))
        self._ready = False  # set once `calibrated` was seen: no device sync at every call

    def hook(self, module: nn.Module, args: tuple, kwargs: dict, out):
        """The UNet's forward hook: its output, corrected once there is an estimate."""
        self._ready = self._ready or bool(self.calibrated)
        if not self._ready:
            return None
        i, _ = nearest(
            self.timesteps, torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        )
        eps = out[0]
        eps = (eps - self.bias[i, :, None, None].to(eps)) / (
            1 + self.gain[i, None, None, None].to(eps)
        )
        return (eps, *out[1:]) if isinstance(out, tuple) else type(out)(sample=eps)

    @torch.no_grad()
    def estimate(self, step: torch.Tensor, eps_hat: torch.Tensor, eps: torch.Tensor) -> None:
        """Of one timestep, from the quantized and the full-precision UNet's outputs [N, C, h, w] on equal inputs."""
        i, error = int(nearest(self.timesteps, step)[0]), (eps_hat - eps).double()
        eps = eps.double()
        centred = eps - eps.mean(
            (0, 2, 3), keepdim=True
        )  # a regression with an intercept for each channel
        k = (error * centred).sum() / centred.square().sum().clamp_min(1e-12)
        rest = error - k * eps
        mean = rest.mean((0, 2, 3))  # [C]
        self.gain[i], self.bias[i] = k, mean
        self.variance[i] = ((rest - mean[:, None, None]) / (1 + k)).square().mean()

    def noise_factor(self, scheduler: DDIMScheduler, t: torch.Tensor, eta: float) -> float:
        """What the sampler's own noise is multiplied with at timestep t, so that with r it has the variance that it should."""
        previous = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        now = scheduler.alphas_cumprod[int(t)]
        then = (
            scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        )
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        if variance <= 0:
            return 1.0
        # x_{t-1} depends on eps by this factor (Song et al. 2021, Eq. 12)
        slope = (1 - then - variance).clamp_min(0).sqrt() - (then * (1 - now) / now).sqrt()
        left = (
            variance - slope**2 * self.variance[int(nearest(self.timesteps, t)[0])].cpu()
        ).clamp_min(0)
        return float((left / variance).sqrt())


@torch.no_grad()
def estimate_correction(student: nn.Module, calib: Calibration, config: QuantConfig) -> None:
    """Fill the UNet's noise correction from its errors on all calibrated steps and trajectories."""
    correction, everything = student.quest_correction, torch.arange(calib.x.shape[1])
    for step, t in enumerate(calib.t):
        batches = calib.batch(step, everything).split(config.forward_batch)
        outputs = torch.cat([batch.run(student).cpu() for batch in batches])
        correction.estimate(t, outputs, calib.eps[step])
    correction.calibrated.fill_(True)
