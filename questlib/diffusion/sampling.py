"""The denoising loop for any diffusers sampler.

The noise of sample i depends on (seed, i) alone, whatever the batches and the processes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from questlib.denoisers import is_transformer, learns_variance, output_channels, unet_of
from questlib.diffusion.conditioning import Condition
from questlib.diffusion.schedulers import make_scheduler
from questlib.errors import ConfigError, NotFiniteError

# Seeds of two runs lie this far apart, so that their samples share no noise while i is below it.
SEED_STRIDE = 1_000_003

# torch's CPU generator keeps 32 bits: seeds beyond this one would have the noise of others.
MAX_SEED = 2**32 // SEED_STRIDE - 1

# Calibration counts its trajectories from here, so that it never sees the noise of the samples
# that are evaluated at the same seed.
CALIBRATION_OFFSET = 500_000


def device_of(unet: nn.Module) -> torch.device:
    """Where a UNet takes its inputs, also where accelerate has offloaded its weights."""
    if unet.device.type != "meta":
        return unet.device
    hooks = (getattr(module, "_hf_hook", None) for module in unet.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    return unet.device if found is None else torch.device(found)


def choose_scheduler(
    pipe: DiffusionPipeline, sampler: str | None = None, eta: float = 0.0
) -> SchedulerMixin:
    """The pipeline's own scheduler, or another sampler on its noise schedule.

    Args:
        sampler: None for the pipeline's own, else a name of `questlib.diffusion.schedulers`.
        eta: DDIM's eta, with which the scheduler will be used.

    Raises:
        ConfigError: an unknown name, an eta with a sampler that has none, or a UNet that predicts
            the variance, too, with a sampler that does not know of it.
    """
    scheduler = pipe.scheduler if sampler is None else make_scheduler(pipe, sampler)
    unet = unet_of(pipe)
    # Transformers' pipelines take the noise alone where the sampler does not know of a variance.
    needs = learns_variance(unet) and not is_transformer(unet)
    if needs and not uses_variance(scheduler):
        raise ConfigError(
            f"{type(scheduler).__name__}: the UNet predicts noise and variance "
            f"({output_channels(unet)} channels for {unet.config.in_channels}); expected a "
            "scheduler with variance_type learned or learned_range, such as DDPMScheduler"
        )
    if eta != 0 and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ConfigError(f"eta: {type(scheduler).__name__} has none; expected 0, found {eta}")
    return scheduler


def check_seed(seed: int) -> None:
    """ConfigError for a seed that would share its noise with another one."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed: expected a whole number 0..{MAX_SEED}, found {seed!r}")


def uses_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a sampler's step takes noise and variance."""
    return str(scheduler.config.get("variance_type")).startswith("learned")


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator for each sample; no two seeds or indices have the same noise.

    Raises:
        ConfigError: a seed or an index for which that is not so.
    """
    check_seed(seed)
    if indices and not 0 <= min(indices) <= max(indices) < SEED_STRIDE:
        raise ConfigError(f"samples: expected indices below {SEED_STRIDE}, found {max(indices)}")
    return [torch.Generator().manual_seed(seed * SEED_STRIDE + i) for i in indices]


def sample_shape(unet: nn.Module) -> tuple[int, int]:
    """(height, width) of what a UNet denoises."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def initial_noise(unet: nn.Module, generators: list[torch.Generator]) -> torch.Tensor:
    """x_T [N, C, h, w], each sample from its own generator, as the UNet takes it."""
    shape = (unet.config.in_channels, *sample_shape(unet))
    return torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(
        device_of(unet), unet.dtype
    )


@torch.no_grad()
def denoise(
    unet: nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    num_inference_steps: int,
    *,
    eta: float = 0.0,
    generators: torch.Generator | list[torch.Generator] | None = None,
    condition: Condition | None = None,
    track: Callable[[Iterable[torch.Tensor]], Iterable[torch.Tensor]] | None = None,
) -> torch.Tensor:
    """From x_T to x_0.

    Args:
        scheduler: it is copied, and stays as it is.
        latents: x_T [N, C, h, w], of unit variance.
        eta: of DDIM (Song et al. 2021, Eq. 16); 0 adds no noise.
        generators: where a sampler's own noise comes from: one generator, or one for each sample.
        condition: what the UNet is told; None: nothing.
        track: wraps the timesteps, as a progress bar does.

    Returns:
        x_0 [N, C, h, w].

    Raises:
        NotFiniteError: a value became NaN or infinite; it names the first step.

    Example:
        >>> generators = sample_generators(seed=0, indices=range(4))
        >>> x = initial_noise(pipe.unet, generators)
        >>> latents = denoise(pipe.unet, pipe.scheduler, x, 20, generators=generators)
    """
    # Multistep samplers hold state, which set_timesteps clears.
    scheduler = copy.deepcopy(scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": eta, "generator": generators}
    extra = {k: v for k, v in extra.items() if k in accepted}
    condition = condition or Condition()
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    timesteps = scheduler.timesteps if track is None else track(scheduler.timesteps)
    x = latents * scheduler.init_noise_sigma
    correction = getattr(unet, "quest_correction", None) if eta > 0 else None
    finite: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for t in timesteps:
        eps = condition.predict(unet, scheduler.scale_model_input(x, t), t)
        if is_transformer(unet) and not uses_variance(scheduler):
            eps = eps[:, : x.shape[1]]  # [N, C or 2 C, h, w] -> [N, C, h, w]
        # PTQ-D's variance schedule (He et al. 2023, Sec. 4): less noise where quantization brings
        # some of its own.
        if correction is not None:
            noise = randn_tensor(x.shape, generators, x.device, x.dtype)
            factor = correction.noise_factor(scheduler, t, eta)
            extra = {"eta": eta, "variance_noise": noise * factor}
        x = scheduler.step(eps, t, x, **extra).prev_sample
        finite.append((t, eps.isfinite().all(), x.isfinite().all()))
    if finite and not bool(finite[-1][2]):  # asked once: each question waits for the device
        first = next(step for step in finite if not bool(step[1] & step[2]))
        what = "the sampler's step" if bool(first[1]) else "the denoiser's output"
        raise NotFiniteError(f"{what} at timestep {first[0].item():g}")
    return x


def autoencoder(pipe: DiffusionPipeline) -> nn.Module | None:
    """A latent diffusion pipeline's autoencoder; None in pixel space."""
    return getattr(pipe, "vqvae", None) or getattr(pipe, "vae", None)


def image_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) of a pipeline's images: the UNet's sample, times the autoencoder's factor."""
    vae = autoencoder(pipe)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = sample_shape(unet_of(pipe))
    return height * factor, width * factor


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Latents [N, C, h, w] -> uint8 images [N, 3, H, W].

    A pipeline without an autoencoder works on pixels: its latents are images already.
    """
    vae = autoencoder(pipe)
    if vae is None:
        return to_uint8(latents)
    scale = vae.config.scaling_factor
    images = [vae.decode(z / scale).sample for z in latents.split(batch_size)]
    return to_uint8(torch.cat(images))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in (-1, 1) -> uint8, rounded to the nearest value."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def index_ranges(num_samples: int, batch_size: int) -> list[range]:
    """The indices 0..num_samples - 1 in runs of `batch_size`; the last one may be shorter."""
    starts = range(0, num_samples, batch_size)
    return [range(start, min(start + batch_size, num_samples)) for start in starts]
