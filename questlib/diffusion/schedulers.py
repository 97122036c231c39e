"""diffusers schedulers set up as CompVis's samplers are, so that trajectories agree step by step.

What the original does, and diffusers' names for it:
- betas are linear in their square roots ("scaled_linear");
- timesteps lie T // S apart, counted from t = 1 ("leading", steps_offset 1; S divides T);
- the last step goes to alpha_bar of t = 0, not to 1 (set_alpha_to_one=False).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from questlib.errors import ConfigError, unknown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

# Taken over from the pipeline's own scheduler: the noise schedule, and what the UNet predicts.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)

# Clipping of x_0 to -1..1 is taken over, too. It is for pixels, and never a class's default.
CLIPPING = ("clip_sample", "clip_sample_range")

LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}

# By name: class in diffusers, and its settings. diffusers is loaded where one is made, so that a
# command line can list the names at once.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    # DDIM (Song et al. 2021). eta is an argument of its step.
    "ddim": ("DDIMScheduler", {"clip_sample": False, **LEADING}),
    # PLMS (Liu et al. 2022) without the Runge-Kutta start: its first step calls the UNet twice, so
    # that S steps are S + 1 calls.
    "plms": ("PNDMScheduler", {**LEADING, "skip_prk_steps": True}),
    # DPM-Solver++(2M) (Lu et al. 2022) as Stable Diffusion has it: from t = 999 to 0, uniform in
    # time. Below 15 steps the last one is of first order.
    "dpm-solver++": (
        "DPMSolverMultistepScheduler",
        {
            "timestep_spacing": "linspace",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "final_sigmas_type": "sigma_min",
        },
    ),
}


def make_scheduler(
    pipe_or_config: DiffusionPipeline | SchedulerMixin | Mapping[str, Any], sampler: str
) -> SchedulerMixin:
    """A fresh scheduler for the noise schedule of a pipeline, a scheduler or a scheduler's config.

    Only the noise schedule (betas, number of training steps, kind of prediction) and the clipping
    of x_0 are taken over. All else is as in the original sampler.

    Args:
        sampler: "ddim", "plms" or "dpm-solver++".

    Raises:
        ConfigError: another name, a config without betas, or a noise schedule that the sampler
            cannot have.
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    scheduler = getattr(pipe_or_config, "scheduler", pipe_or_config)
    config = getattr(scheduler, "config", scheduler)
    if not {"beta_start", "beta_end"} <= set(config):
        raise ConfigError(
            f"sampler {sampler}: expected a config with beta_start and beta_end, "
            f"found {', '.join(config) or 'none'}"
        )
    import diffusers

    class_name, settings = SAMPLERS[sampler]
    scheduler_class = getattr(diffusers, class_name)
    accepted = inspect.signature(scheduler_class).parameters
    kept = {k: config[k] for k in NOISE_SCHEDULE if k in config}
    wanting = [name for name in kept if name not in accepted]
    if any(kept[name] for name in wanting):
        raise ConfigError(
            f"sampler {sampler}: {class_name} has no {wanting[0]}, which the pipeline's noise "
            "schedule has"
        )
    kept = {name: value for name, value in kept.items() if name in accepted}
    kept |= {k: config[k] for k in CLIPPING if k in config and k in accepted}
    return scheduler_class(**settings | kept)
