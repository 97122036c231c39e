"""Data-free calibration: what the full-precision UNet receives and returns while it samples from noise (paper, Sec. 3.3).

The pair (x_t, t) is taken at the UNet itself, so an input can never meet another step's t (a trap of the official release).
"""

from __future__ import annotations

import hashlib
import os
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
from questlib.errors import CheckpointError, ConfigError
from questlib.model import act_quantizers, set_mode
from questlib.quantizers import ActQuantizer
from questlib.sampling import denoise, sample_generators

VALUES_PER_CHANNEL = 2048  # kept of each quantizer's input, per channel and step group, for the range search
VALUES_PER_TENSOR = 65536


@dataclass
class Calibration:
    """x [T, N, C, h, w] UNet inputs, t int64 [T], eps [T, N, C, h, w] its outputs; T sampler steps of N trajectories."""

    x: torch.Tensor
    t: torch.Tensor
    eps: torch.Tensor

    def save(self, path: str | Path) -> None:
        tmp = Path(path).with_suffix(f".tmp{os.getpid()}")
        save_file(vars(self), tmp)
        os.replace(tmp, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        try:
            with safe_open(path, "pt") as f:
                return cls(*(f.get_tensor(k) for k in ("x", "t", "eps")))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"calibration file {path}: {error}") from error

    def hash(self) -> str:
        digest = hashlib.sha256()
        for tensor in vars(self).values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@torch.no_grad()
def calibrate(
    pipe: DiffusionPipeline, num_samples: int, num_inference_steps: int, *, eta: float = 0.0, seed: int = 0, batch_size: int = 64,
    progress: bool = False,
) -> Calibration:  # fmt: skip
    """Sample `num_samples` trajectories with the full-precision pipeline and record (x_t, t, eps) at its UNet.

    The noise differs from that of `questlib.sampling.sample` at equal seeds. ConfigError for counts below one.
    """
    if num_samples < 1 or num_inference_steps < 1:
        raise ConfigError(
            f"calibrate: num_samples and num_inference_steps must be >= 1, found {num_samples}, {num_inference_steps}"
        )
    unet, record = pipe.unet, []
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)

    def hook(module: nn.Module, args: tuple, kwargs: dict, out) -> None:
        t = torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).reshape(-1)
        record.append((args[0].cpu(), int(t[0]), out.sample.cpu()))

    handle = unet.register_forward_hook(hook, with_kwargs=True)
    batches = []
    try:
        for start in tqdm(range(0, num_samples, batch_size), desc="calibrate", disable=not progress):
            record.clear()
            indices = range(start, min(start + batch_size, num_samples))
            # index offset: calibration never sees the noise of the samples that are evaluated
            generators = sample_generators(seed, [500_000 + i for i in indices])
            x_t = torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(unet.device)
            denoise(unet, scheduler, x_t, num_inference_steps, eta=eta, generators=generators)
            batches.append(list(record))
    finally:
        handle.remove()
    steps = range(len(batches[0]))
    t = torch.tensor([batches[0][i][1] for i in steps])
    return Calibration(
        torch.stack([torch.cat([b[i][0] for b in batches]) for i in steps]),
        t,
        torch.stack([torch.cat([b[i][2] for b in batches]) for i in steps]),
    )


class Observer:
    """Extremes and a fixed-size sample of what reaches one quantizer, per channel, for the step group that is being seen."""

    def __init__(self, quantizer: ActQuantizer, config: QuantConfig, seed: int) -> None:
        self.q, self.ema, self.snapped = quantizer, config.act_ema, quantizer.carrier or quantizer.token
        self.per_channel = self.snapped or quantizer.scale.shape[1] == len(quantizer.index) > 1
        self.generator = torch.Generator().manual_seed(seed)
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
        keep = VALUES_PER_CHANNEL if self.per_channel else max(1, VALUES_PER_TENSOR // channels)
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
                self.free = (x, scale, zero)  # snapped once all groups are known: the shifts are common
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
            if quantizer.token:
                (base, ratio), zero = ranges.snap_to_tokens(x[own], s[own], shift, quantizer.bits, norm), torch.zeros_like(z[own])
            else:
                base, ratio, zero = ranges.snap_to_carrier(x[own], s[own], z[own], shift, quantizer.bits, norm)
            with torch.no_grad():
                quantizer.scale[group, part] = base
                quantizer.ratio[group, own] = ratio
                quantizer.zero_point[group, own] = zero


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
    for group in tqdm(range(groups), desc="ranges", disable=not progress):
        for i, q in enumerate(quantizers):
            q.observer = Observer(q, config, 1000 * group + i)
        steps = (group_of_step == group).nonzero().flatten().tolist()
        per_step = max(1, -(-config.calib_batch // len(steps)))
        generator = torch.Generator().manual_seed(config.seed + group)
        for step in steps:
            pick = torch.randperm(calib.x.shape[1], generator=generator)[:per_step]
            unet(calib.x[step, pick].to(unet.device), calib.t[step].to(unet.device))
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
