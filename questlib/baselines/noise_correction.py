"""PTQ-D's correction of the predicted noise after quantization (He et al. 2023, Sec. 4).

At each step the quantized UNet predicts

    eps_hat = (1 + k) eps + r

A part of its error, k eps, is correlated with the noise eps; the rest r is not, and has a mean for
each channel and a variance. k is the slope of a linear regression of the error on eps. All three
are estimated on the calibration set. Then

    eps = (eps_hat - mean(r)) / (1 + k)                               corrects the prediction, and
    sigma'^2 = max(0, sigma^2 - slope^2 var(r) / (1 + k)^2)           the sampler's own noise

where sigma^2 is the variance that the sampler would add and slope = d x_{t-1} / d eps. The rest of
r stays in the prediction as noise, and the sampler adds that much less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from questlib.calibration import Calibration
from questlib.config import QuantConfig
from questlib.denoisers import output_channels, timestep_of
from questlib.integrity import Tensors
from questlib.quantization.precision import FixedPrecision
from questlib.quantization.step_groups import nearest
from questlib.stage_cache import Parts


class NoiseCorrection(FixedPrecision):
    """The correction of one UNet, for each calibrated timestep.

    Args:
        timesteps: int64 or float32 [T], ascending.
        channels: C, of the UNet's output.

    Attributes:
        gain: k, float32 [T].
        bias: mean of r, float32 [T, C].
        variance: of r / (1 + k) around its mean, float32 [T].
        calibrated: whether these are estimated, bool 0-d. Outputs are left alone before.
    """

    timesteps: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    variance: torch.Tensor
    calibrated: torch.Tensor

    def __init__(self, timesteps: torch.Tensor, channels: int) -> None:
        super().__init__()
        count = len(timesteps)
        self.register_buffer("timesteps", timesteps.clone())
        self.register_buffer("gain", torch.zeros(count))
        self.register_buffer("bias", torch.zeros(count, channels))
        self.register_buffer("variance", torch.zeros(count))
        self.register_buffer("calibrated", torch.tensor(False))
        # Set once `calibrated` was seen, so that not every call waits for the device.
        self._ready = False

    def hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """The UNet's forward hook: corrects its output, once there is an estimate."""
        self._ready = self._ready or bool(self.calibrated)
        if not self._ready:
            return None
        t = torch.as_tensor(timestep_of(module, args, kwargs))
        step, _ = nearest(self.timesteps, t)
        eps = out[0]
        mean = self.bias[step, :, None, None].to(eps)
        gain = self.gain[step, None, None, None].to(eps)
        eps = (eps - mean) / (1 + gain)
        return (eps, *out[1:]) if isinstance(out, tuple) else type(out)(sample=eps)

    @torch.no_grad()
    def estimate(self, t: torch.Tensor, eps_hat: torch.Tensor, eps: torch.Tensor) -> None:
        """Estimate the correction at one timestep.

        Args:
            t: the timestep.
            eps_hat: outputs of the quantized UNet [N, C, h, w].
            eps: outputs of the full-precision UNet for the same inputs.
        """
        error = (eps_hat - eps).double()
        eps = eps.double()
        # a regression with an intercept for each channel
        centred = eps - eps.mean((0, 2, 3), keepdim=True)
        k = (error * centred).sum() / centred.square().sum().clamp_min(1e-12)
        r = error - k * eps
        mean = r.mean((0, 2, 3))  # [C]
        step = int(nearest(self.timesteps, t)[0])
        self.gain[step] = k
        self.bias[step] = mean
        self.variance[step] = ((r - mean[:, None, None]) / (1 + k)).square().mean()

    def wrong_values(self, values: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of values that no estimate has, with the reason.

        Args:
            values: of the correction's own names, shapes and types, finite.
        """
        wrong = {
            "timesteps (expected the calibrated ones)": not torch.equal(
                values["timesteps"], self.timesteps
            ),
            "gain (expected other numbers than -1)": bool((values["gain"] == -1).any()),
            "variance (expected numbers from 0)": bool((values["variance"] < 0).any()),
        }
        return [what for what, is_wrong in wrong.items() if is_wrong]

    def noise_factor(self, scheduler: DDIMScheduler, t: torch.Tensor, eta: float) -> float:
        """The factor sigma' / sigma of the sampler's own noise at timestep t, in 0..1.

        The variance of x_{t-1} is then what the sampler wants it to be.

        Args:
            scheduler: DDIM, with its timesteps set.
            t: the timestep.
            eta: DDIM's eta; without own noise (0) the factor is 1.
        """
        previous = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        now = scheduler.alphas_cumprod[int(t)]
        then = (
            scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        )
        # sigma^2 and the factor of the prediction in x_{t-1} = sqrt(then) x_0 + direction * eps
        # (DDIM, Song et al. 2021, Eq. 16 and 12). x_0 and eps follow from x_t and the prediction.
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        if variance <= 0:
            return 1.0
        direction = (1 - then - variance).clamp_min(0).sqrt()
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":  # Salimans & Ho 2022, App. D
            slope = direction * now.sqrt() - (then * (1 - now)).sqrt()
        elif kind == "sample":
            slope = then.sqrt() - direction * (now / (1 - now)).sqrt()
        else:
            slope = direction - (then * (1 - now) / now).sqrt()
        brought = slope**2 * self.variance[int(nearest(self.timesteps, t)[0])].cpu()
        return float(((variance - brought).clamp_min(0) / variance).sqrt())


def insert_correction(unet: nn.Module) -> None:
    """Give a quantized UNet a correction, `quest_correction`, which is still to be estimated."""
    unet.quest_correction = NoiseCorrection(unet.quest_steps.timesteps, output_channels(unet))
    unet.quest_correction.to(unet.device)
    unet.register_forward_hook(unet.quest_correction.hook, with_kwargs=True)


@torch.no_grad()
def estimate_correction(
    student: nn.Module, calib: Calibration, config: QuantConfig, *, parts: Parts | None = None
) -> None:
    """Estimate the UNet's noise correction at all calibrated steps, from all trajectories.

    Args:
        student: the quantized UNet.
        calib: calls of the full-precision UNet.
        config: `forward_batch` of the quantization.
        parts: keeps the estimates of finished steps, and gives those of a run that was stopped.
    """
    parts = Parts() if parts is None else parts
    correction = student.quest_correction
    names = ("gain", "bias", "variance")
    for step, t in enumerate(calib.t):
        place = int(nearest(correction.timesteps, t)[0])

        def estimate(step: int = step, t: torch.Tensor = t, place: int = place) -> Tensors:
            everything = calib.batch(step, torch.arange(calib.width(step)))
            batches = everything.split(config.forward_batch)
            outputs = torch.cat([batch.run(student).cpu() for batch in batches])
            correction.estimate(t, outputs, everything.eps)
            return {name: getattr(correction, name)[place].cpu() for name in names}

        for name, value in parts.keep(str(step), estimate).items():
            getattr(correction, name)[place] = value
    correction.calibrated.fill_(True)
