"""diffusers schedulers set up as CompVis's samplers are, so that their trajectories agree step by step.

What the original does, and diffusers names: betas linear in their square roots ("scaled_linear"); T // S apart, counted from
t = 1 ("leading", steps_offset 1; for S that divides T); the last step goes to alpha_bar of t = 0, not to 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from questlib.errors import ConfigError

BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
CLIP = (
    "clip_sample",
    "clip_sample_range",
)  # of x_0 to -1..1, for pixels: never by a class's default
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False, **LEADING}),  # eta is an argument of its step
    # PLMS (Liu et al. 2022, without the Runge-Kutta start): its first step calls the UNet twice, S steps are S + 1 calls
    "plms": (PNDMScheduler, {**LEADING, "skip_prk_steps": True}),
    # DPM-Solver++(2M) (Lu et al. 2022) as Stable Diffusion has it: from t = 999 to 0, uniform in time; below 15
    # steps the last one is of first order
    "dpm-solver++": (
        DPMSolverMultistepScheduler,
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
    pipe_or_config: DiffusionPipeline | SchedulerMixin | Mapping, sampler: str
) -> SchedulerMixin:
    """A fresh scheduler `sampler` ("ddim", "plms", "dpm-solver++") for the noise schedule of a pipeline, scheduler or config.

    Only the noise schedule (betas, number of training steps, kind of prediction) and the clipping of x_0 are taken over, all
    else is the original sampler's. ConfigError for another name, or a config without betas.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler: expected one of {', '.join(SAMPLERS)}, found {sampler!r}")
    scheduler = getattr(pipe_or_config, "scheduler", pipe_or_config)
    config = getattr(scheduler, "config", scheduler)
    if not {"beta_start", "beta_end"} <= set(config):
        raise ConfigError(
            f"sampler {sampler}: expected a config with beta_start and beta_end, found {', '.join(config) or 'none'}"
        )
    scheduler_class, settings = SAMPLERS[sampler]
    kept = {k: config[k] for k in BETAS if k in config}
    kept |= {
        k: config[k]
        for k in CLIP
        if k in config and k in inspect.signature(scheduler_class).parameters
    }
    return scheduler_class(**settings | kept)
