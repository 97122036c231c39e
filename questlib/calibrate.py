"""Data-free calibration: what the full-precision UNet receives and returns while it samples from noise (paper, Sec. 3.3).

The pair (x_t, t) is taken at the UNet itself, so an input can never meet another step's t (a trap of the official release).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from questlib import ranges
from questlib.config import OFF, QuantConfig
from questlib.distributed import processes, share
from questlib.errors import CheckpointError, ConfigError
from questlib.model import act_quantizers, set_mode
from questlib.models.conditioning import Conditioning
from questlib.quantizers import ActQuantizer
from questlib.sampling import choose_scheduler, denoise, initial_noise, sample_generators
from questlib.shards import shard_ranges

# of each quantizer's input, kept for the range search
VALUES_PER_CHANNEL = 2048  # of a batch, where channels have scales of their own
VALUES_IN_ALL = 20 * VALUES_PER_CHANNEL  # of all batches and step groups, likewise
VALUES_PER_TENSOR = 65536  # of a batch, where they share one


@dataclass(frozen=True)
class Batch:
    """Calls of a UNet, and what the full-precision one gave: x, eps [B, C, h, w]; t int64 [B] or []; context [B, L, D]."""

    x: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    context: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(*(v if v is None or v.ndim == 0 else v[rows] for v in vars(self).values()))

    def split(self, size: int) -> list[Batch]:
        return [self[i : i + size] for i in range(0, len(self), size)]

    def run(self, unet: nn.Module) -> torch.Tensor:
        """The UNet's output for these calls, on its own device."""
        given = {} if self.context is None else {"encoder_hidden_states": self.context.to(unet.device)}
        return unet(self.x.to(unet.device), self.t.to(unet.device), **given).sample


@dataclass
class Calibration:
    """x [T, N, C, h, w] UNet inputs, t int64 [T], eps [T, N, C, h, w] its outputs; T sampler steps of N trajectories.

    context [N, L, D]: what each trajectory's UNet received beside them, the same at all steps; None for unconditional models.
    Under guidance N counts both halves: all unconditional ones, then all conditional ones. Everything stays on the CPU (Stable
    Diffusion, 50 steps x 128 samples: 0.4 GB a half for each of x and eps, 1.7 GB together).
    """

    x: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor
    context: torch.Tensor | None = None

    def batch(self, step: int | torch.Tensor, which: torch.Tensor) -> Batch:
        """Trajectories `which` int64 [B] at one step, or each at its own (int64 [B])."""
        context = None if self.context is None else self.context[which]
        return Batch(self.x[step, which], self.t[step], self.eps[step, which], context)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {k: v for k, v in vars(self).items() if v is not None}

    def save(self, path: str | Path) -> None:
        tmp = Path(path).with_suffix(f".tmp{os.getpid()}")
        save_file(self._tensors(), tmp)
        os.replace(tmp, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        try:
            with safe_open(path, "pt") as f:
                return cls(*(f.get_tensor(k) for k in ("x", "t", "eps", "context") if k != "context" or k in f.keys()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"calibration file {path}: {error}") from error

    def hash(self) -> str:
        digest = hashlib.sha256()
        for tensor in self._tensors().values():
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]


@torch.no_grad()
def calibrate(
    pipe: DiffusionPipeline, num_samples: int, num_inference_steps: int, *, eta: float = 0.0, seed: int = 0, batch_size: int = 64,
    sampler: str | None = None, guidance_scale: float = 1.0, labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None, progress: bool = False,
) -> Calibration:  # fmt: skip
    """Sample `num_samples` trajectories with the full-precision pipeline and record (x_t, t, context, eps) at its UNet.

    The noise differs from that of `questlib.sampling.sample` at equal seeds. Labels (all classes by default) and prompts are
    taken in turn, in an order drawn from `seed`: each occurs equally often, give or take one. For sampler, guidance_scale, labels
    and prompts see `questlib.sampling.Drawing`. Under `accelerate launch` every process calls this: batches are shared out, and
    all get the whole result, which does not depend on the number of processes. ConfigError for counts below one.
    """
    if min(num_samples, num_inference_steps, batch_size) < 1:
        raise ConfigError(
            "calibrate: num_samples and num_inference_steps and batch_size must be >= 1, found "
            f"{num_samples}, {num_inference_steps}, {batch_size}"
        )
    unet, state = pipe.unet, processes()
    scheduler = choose_scheduler(pipe, sampler, eta)
    conditioning = Conditioning(pipe, guidance_scale=guidance_scale, labels=labels, prompts=prompts, shuffle=seed)
    batches = shard_ranges(num_samples, batch_size)
    record: dict[str, list[torch.Tensor]] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        t = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).reshape(-1)
        for key, value in (("x", args[0]), ("t", t[:1].to(torch.int64)), ("eps", out.sample)):
            record.setdefault(key, []).append(value.cpu())
        if "encoder_hidden_states" in kwargs:
            record["context"] = [kwargs["encoder_hidden_states"].cpu()]

    def trajectories(indices: range) -> dict[str, torch.Tensor]:
        """Of one batch: x, eps [T, H, n, C, h, w], where H halves are 2 under guidance; t [T]; context [1, H, n, L, D]."""
        record.clear()
        # index offset: calibration never sees the noise of the samples that are evaluated
        generators = sample_generators(seed, [500_000 + i for i in indices])
        condition, x_t = conditioning.at(indices), initial_noise(unet, generators)
        denoise(unet, scheduler, x_t, num_inference_steps, eta=eta, generators=generators, condition=condition)
        found = {k: torch.stack(v).unflatten(1, (condition.halves, -1)) for k, v in record.items() if k != "t"}
        return found | {"t": torch.cat(record["t"])}

    whole: dict[str, torch.Tensor] = {}
    handle = unet.register_forward_hook(hook, with_kwargs=True)
    try:
        for first in tqdm(range(0, len(batches), state.num_processes), desc="calibrate", disable=not progress):
            mine = batches[first + state.process_index : first + state.process_index + 1]
            found = trajectories(mine[0]) if mine else None
            for owner, indices in enumerate(batches[first : first + state.num_processes]):
                part = share(found, owner)
                whole["t"] = part.pop("t")
                for key, value in part.items():
                    if key not in whole:
                        whole[key] = value.new_empty(*value.shape[:2], num_samples, *value.shape[3:])
                    whole[key][:, :, indices.start : indices.stop] = value
    finally:
        handle.remove()
    joined = {k: v if k == "t" else v.flatten(1, 2) for k, v in whole.items()}
    context = joined.pop("context", None)
    return Calibration(**joined, context=None if context is None else context[0])


class Observer:
    """Extremes and a fixed-size sample of what reaches one quantizer, per channel, for the step group that is being seen."""

    def __init__(self, quantizer: ActQuantizer, config: QuantConfig, seed: int, batches: int) -> None:
        """batches: that this quantizer sees, of all step groups together."""
        self.q, self.ema, self.snapped = quantizer, config.act_ema, quantizer.carrier or quantizer.token
        self.per_channel = self.snapped or quantizer.scale.shape[1] == len(quantizer.index) > 1
        self.generator = torch.Generator().manual_seed(seed)
        self.keep = max(1, min(VALUES_PER_CHANNEL, VALUES_IN_ALL // batches))
        self.lo = self.hi = None
        self.values: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        channels = len(self.q.index)
        rows = x.movedim(self.q.dim, 0).reshape(channels, -1) if channels > 1 else x.reshape(1, -1)  # [C, n]
        lo, hi = rows.amin(1), rows.amax(1)
        if self.lo is None:
            self.lo, self.hi = lo, hi
        elif self.ema is not None:
            self.lo, self.hi = (self.ema * a + (1 - self.ema) * b for a, b in ((self.lo, lo), (self.hi, hi)))
        else:
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        keep = self.keep if self.per_channel else max(1, VALUES_PER_TENSOR // channels)
        pick = torch.randint(rows.shape[1], (min(keep, rows.shape[1]),), generator=self.generator)
        self.values.append(rows[:, pick.to(rows.device)])

    def finish(self, group: int, config: QuantConfig) -> None:
        """Search the ranges of one group and write them into the quantizer."""
        q = self.q
        x = torch.cat(self.values, 1)  # [C, n]
        symmetric = config.act_symmetric and not q.unsigned
        if self.snapped or (self.per_channel and len(q.index) > 1):
            scale, zero = ranges.search(x, self.lo, self.hi, q.bits, config.act_range, symmetric, config.range_norm)
            if self.snapped:
                self.free = (x.cpu(), scale, zero)  # snapped once all groups are known: the shifts are common
            else:
                q.set_group(group, scale, zero)
        else:
            scales, zeros = [], []
            for part in range(q.scale.shape[1]):
                own = (q.index if q.scale.shape[1] > 1 else torch.zeros_like(q.index)) == part
                lo, hi = self.lo[own].amin()[None], self.hi[own].amax()[None]
                s, z = ranges.search(x[own].reshape(1, -1), lo, hi, q.bits, config.act_range, symmetric, config.range_norm)
                scales.append(s), zeros.append(z)
            q.set_group(group, torch.cat(scales), torch.cat(zeros)[q.index])


def _snap(quantizer: ActQuantizer, free: list[tuple], norm: float) -> None:
    """Snap all groups' free scales to the carrier grid, each part of a split input with a base (per token: a clip) of its own."""
    for part in range(quantizer.scale.shape[1]):
        own = quantizer.index == part
        shift = ranges.block_shifts(torch.stack([s[own] for _, s, _ in free]))
        shift = shift if quantizer.shifts else torch.zeros_like(shift)
        for group, (x, s, z) in enumerate(free):
            x = x.to(s.device)[own]
            if quantizer.token:
                (base, ratio), zero = ranges.snap_to_tokens(x, s[own], shift, quantizer.bits, norm), torch.zeros_like(z[own])
            else:
                base, ratio, zero = ranges.snap_to_carrier(x, s[own], z[own], shift, quantizer.bits, norm)
            with torch.no_grad():
                quantizer.scale[group, part] = base
                quantizer.ratio[group, own] = ratio
                quantizer.zero_point[group, own] = zero


TRAIN_STEPS, NORMAL_MEAN, NORMAL_STD = 1000, 0.4, 0.5  # PTQ4DM (Shang et al. 2023, Sec. 3.3): N(mu, T / 2) with mu <= T / 2


def samples_of_steps(t: torch.Tensor, config: QuantConfig, generator: torch.Generator) -> list[int]:
    """How many samples each of these steps gives to the range search, `calib_batch` together.

    "normal": timesteps are drawn from a normal distribution, and each goes to the nearest of the steps; several can have none.
    """
    if config.calib_steps == "uniform":
        return [max(1, -(-config.calib_batch // len(t)))] * len(t)
    counts, drawn = torch.zeros(len(t), dtype=torch.int64), 0
    while drawn < config.calib_batch:  # what falls outside is drawn again
        wanted = TRAIN_STEPS * (NORMAL_MEAN + NORMAL_STD * torch.randn(1, generator=generator))
        if 0 <= wanted < TRAIN_STEPS:
            counts[(t - wanted).abs().argmin()] += 1
            drawn += 1
    return counts.tolist()


@torch.no_grad()
def init_ranges(unet: nn.Module, calib: Calibration, config: QuantConfig, *, progress: bool = False) -> None:
    """Set every activation quantizer of an inserted UNet from full-precision activations, one step group after another.

    Each group sees `calib_batch` samples, spread over its steps.
    """
    set_mode(unet, weights=False)
    quantizers = [q for q in act_quantizers(unet) if q.bits != OFF]
    free: dict[int, list] = {}
    groups = unet.quest_steps.num_groups
    group_of_step = torch.tensor([unet.quest_steps.lookup(t) for t in calib.t])
    generators = [torch.Generator().manual_seed(config.seed + group) for group in range(groups)]
    steps = [(group_of_step == group).nonzero().flatten().tolist() for group in range(groups)]
    counts = [samples_of_steps(calib.t[own], config, generator) for own, generator in zip(steps, generators, strict=True)]
    batches = sum(-(-count // config.forward_batch) for of in counts for count in of)
    for group in tqdm(range(groups), desc="ranges", disable=not progress):
        for i, q in enumerate(quantizers):
            q.observer = Observer(q, config, 1000 * group + i, batches)
        generator = generators[group]
        for step, count in zip(steps[group], counts[group], strict=True):
            pick = torch.randperm(calib.x.shape[1], generator=generator)[:count]
            for batch in calib.batch(step, pick).split(config.forward_batch):
                batch.run(unet)
        for i, q in enumerate(quantizers):
            observer, q.observer = q.observer, None
            observer.finish(group, config)
            if hasattr(observer, "free"):
                free.setdefault(i, []).append(observer.free)
    for i, q in enumerate(quantizers):
        if i in free:
            _snap(q, free[i], config.range_norm)
        q.calibrated.fill_(True)
    set_mode(unet, weights=True)
