"""Schedulers: the trajectories of CompVis's samplers, and DPM-Solver++'s own equations."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from questlib.diffusion.schedulers import SAMPLERS, make_scheduler
from questlib.errors import ConfigError
from reproduce.models.compvis import convert_checkpoint
from reproduce.models.loading import load_pipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHA_BAR = torch.cumprod(
    1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
)
SHAPE = (2, 3, 4, 4)


def eps(x: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth stand-in for a UNet, that depends on x and t."""
    return torch.sin(2 * x + 0.003 * int(t)) + 0.3 * x.flip(1)


def times(steps: int) -> list[int]:
    return list(range(1, 1001, 1000 // steps))[::-1]


def ddim_step(x, e, t: int, steps: int, eta: float = 0.0, noise=0.0) -> torch.Tensor:
    """DDIM (Song et al. 2021), Eq. 12 and 16; after the last step stands alpha_bar of t = 0."""
    a, a_prev = ALPHA_BAR[t], ALPHA_BAR[max(t - 1000 // steps, 0)]
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * e + sigma * noise


def original_ddim(x, steps: int, eta: float, generator: torch.Generator) -> list[torch.Tensor]:
    out = []
    for t in times(steps):
        noise = torch.randn(SHAPE, generator=generator).double() if eta else 0.0
        x = ddim_step(x, eps(x, t), t, steps, eta, noise)
        out.append(x)
    return out


def original_plms(x, steps: int) -> list[torch.Tensor]:
    """Pseudo linear multistep (Liu et al. 2022), Adams-Bashforth up to order 4.

    The first step averages e at both its ends.
    """
    out, old = [], []
    for t in times(steps):
        e = eps(x, t)
        if not old:
            mean = (e + eps(ddim_step(x, e, t, steps), t - 1000 // steps)) / 2
        else:
            weights = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}[len(old)]
            mean = sum(w * v for w, v in zip(weights, [e, *old[::-1]], strict=True)) / sum(weights)
        x, old = ddim_step(x, mean, t, steps), [*old, e][-3:]
        out.append(x)
    return out


def original_dpm(x, timesteps: list[int]) -> list[torch.Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) of the data prediction.

    lambda = log(alpha / sigma).
    """
    out, data, lambdas = [], [], []
    for i, (s, t) in enumerate(zip(timesteps, [*timesteps[1:], 0], strict=True)):
        (a_s, s_s), (a_t, s_t) = ((ALPHA_BAR[k].sqrt(), (1 - ALPHA_BAR[k]).sqrt()) for k in (s, t))
        lambdas.append(math.log(a_s / s_s))
        data.append((x - s_s * eps(x, s)) / a_s)
        h, d = math.log(a_t / s_t) - lambdas[-1], data[-1]
        if i > 0 and not (i == len(timesteps) - 1 and len(timesteps) < 15):
            r = (lambdas[-1] - lambdas[-2]) / h
            d = (1 + 1 / (2 * r)) * data[-1] - 1 / (2 * r) * data[-2]
        x = s_t / s_s * x - a_t * math.expm1(-h) * d
        out.append(x)
    return out


def trajectory(scheduler, x: torch.Tensor, steps: int, **kwargs) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    out = []
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x, **kwargs).prev_sample
        out.append(x)
    return out


def errors(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_equals_the_equations(steps, eta):
    g1, g2 = (torch.Generator().manual_seed(4) for _ in range(2))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    ours = trajectory(make_scheduler(BETAS, "ddim"), x, steps, eta=eta, generator=g1)
    found = errors(ours, original_ddim(x.double(), steps, eta, g2))
    assert found[0] < 1e-5 and found[-1] < 1e-4


@pytest.mark.parametrize("steps", [10, 50])
def test_plms_equals_the_equations(steps):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler(BETAS, "plms")
    ours = trajectory(scheduler, x, steps)
    assert [int(t) for t in scheduler.timesteps.unique(sorted=True)] == sorted(
        times(steps)
    ) and len(ours) == steps + 1
    found = errors(ours[1:], original_plms(x.double(), steps))
    assert found[0] < 1e-5 and found[-1] < 1e-4


@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_equals_the_equations(steps):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler(BETAS, "dpm-solver++")
    ours = trajectory(scheduler, x, steps)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps == [round(999 * (steps - i) / steps) for i in range(steps)]
    found = errors(ours, original_dpm(x.double(), timesteps))
    assert found[0] < 1e-4 and found[-1] < 1e-3


def test_samplers_converge_to_the_same_sample():
    """At eta 0 all three solve one differential equation."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    ends = [trajectory(make_scheduler(BETAS, s), x, 500)[-1] for s in SAMPLERS]
    assert all(errors([end], [ends[0]])[0] < 0.05 for end in ends[1:])


def test_noise_schedule_is_taken_from_a_pipeline_a_scheduler_or_a_config():
    pipe = load_pipeline("mini-ldm4")
    for source in (pipe, pipe.scheduler, pipe.scheduler.config):
        for sampler in SAMPLERS:
            scheduler = make_scheduler(source, sampler)
            assert (
                torch.equal(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
                and scheduler is not pipe.scheduler
            )
    with pytest.raises(ConfigError, match="ddim, plms, dpm-solver"):
        make_scheduler(pipe, "euler")
    with pytest.raises(ConfigError, match="beta_start"):
        make_scheduler({}, "ddim")


@pytest.mark.parametrize("name", ["lsun_beds256", "lsun_churches256", "cin256-v2", "sd-v1-4"])
def test_goldens_of_the_original_samplers(quest_data, monkeypatch, name):
    """The pipelines themselves, guided ones, too, on the original's trajectories."""
    folder = quest_data / "compvis"
    about = yaml.safe_load((folder / f"{name}-tiny.yaml").read_text())["golden"]
    golden = load_file(folder / f"{name}-tiny-golden.safetensors")
    pipe = convert_checkpoint(folder / f"{name}-tiny.ckpt", folder / f"{name}-tiny.yaml")
    assert type(pipe.scheduler).__name__ == SAMPLERS[about["sampler"].lower()][0]
    pipe.set_progress_bar_config(disable=True)
    scheduler_class = type(pipe.scheduler)
    step = scheduler_class.step
    timesteps, trace = [], []

    @functools.wraps(step)
    def traced(self, eps, t, *args, **kwargs):
        out = step(self, eps, t, *args, **kwargs)
        timesteps.append(int(t))
        trace.append(out[0])
        return out

    monkeypatch.setattr(scheduler_class, "step", traced)
    how = {"num_inference_steps": about["steps"], "latents": golden["x_T"], "output_type": "latent"}
    if "class_labels" in golden:
        how |= {"class_labels": golden["class_labels"], "guidance_scale": about["guidance_scale"]}
    elif "context" in golden:
        how |= {
            "prompt_embeds": golden["context"],
            "negative_prompt_embeds": golden["null_context"],
            "guidance_scale": about["guidance_scale"],
        }
    else:
        how["batch_size"] = len(golden["x_T"])
    x_0 = pipe(**how).images
    assert sorted(set(timesteps), reverse=True) == golden["sampler_timesteps"].tolist()
    trace = trace[len(trace) - about["steps"] :]  # PLMS: without the probe at the start
    found = errors(trace, list(golden["x_trajectory"][1:]))
    assert found[0] < 1e-5 and max(found) < 1e-4 and errors([x_0], [golden["x_0"]])[0] < 1e-4
