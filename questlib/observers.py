"""Activation ranges from what the full-precision model receives."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from questlib.calibration import Calibration
from questlib.config import OFF, QuantConfig
from questlib.quantization import carrier, range_search
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.model import act_quantizers, set_mode

# of each quantizer's input, kept for the range search
VALUES_PER_CHANNEL = 2048  # of a batch, where channels have scales of their own
VALUES_IN_ALL = 20 * VALUES_PER_CHANNEL  # of all batches and step groups, likewise
VALUES_PER_TENSOR = 65536  # of a batch, where they share one


class Observer:
    """Extremes and a fixed-size sample of what reaches one quantizer, per channel, for the step group that is being seen."""

    def __init__(
        self, quantizer: ActQuantizer, config: QuantConfig, seed: int, batches: int
    ) -> None:
        """batches: that this quantizer sees, of all step groups together."""
        self.q, self.ema, self.snapped = (
            quantizer,
            config.ranges.act_ema,
            quantizer.carrier or quantizer.token,
        )
        self.per_channel = self.snapped or quantizer.scale.shape[1] == len(quantizer.index) > 1
        self.generator = torch.Generator().manual_seed(seed)
        self.keep = max(1, min(VALUES_PER_CHANNEL, VALUES_IN_ALL // batches))
        self.lo = self.hi = None
        self.values: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        channels = len(self.q.index)
        rows = (
            x.movedim(self.q.dim, 0).reshape(channels, -1) if channels > 1 else x.reshape(1, -1)
        )  # [C, n]
        lo, hi = rows.amin(1), rows.amax(1)
        if self.lo is None:
            self.lo, self.hi = lo, hi
        elif self.ema is not None:
            self.lo, self.hi = (
                self.ema * a + (1 - self.ema) * b for a, b in ((self.lo, lo), (self.hi, hi))
            )
        else:
            self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        keep = self.keep if self.per_channel else max(1, VALUES_PER_TENSOR // channels)
        pick = torch.randint(rows.shape[1], (min(keep, rows.shape[1]),), generator=self.generator)
        self.values.append(rows[:, pick.to(rows.device)])

    def finish(self, group: int, config: QuantConfig) -> None:
        """Search the ranges of one group and write them into the quantizer."""
        q = self.q
        x = torch.cat(self.values, 1)  # [C, n]
        symmetric = config.ranges.act_symmetric and not q.unsigned
        if self.snapped or (self.per_channel and len(q.index) > 1):
            scale, zero = range_search.choose_qparams(
                x,
                self.lo,
                self.hi,
                q.bits,
                config.ranges.act_range,
                symmetric,
                config.ranges.range_norm,
            )
            if self.snapped:
                self.free = (
                    x.cpu(),
                    scale,
                    zero,
                )  # snapped once all groups are known: the shifts are common
            else:
                q.set_group(group, scale, zero)
        else:
            scales, zeros = [], []
            for part in range(q.scale.shape[1]):
                own = (q.index if q.scale.shape[1] > 1 else torch.zeros_like(q.index)) == part
                lo, hi = self.lo[own].amin()[None], self.hi[own].amax()[None]
                s, z = range_search.choose_qparams(
                    x[own].reshape(1, -1),
                    lo,
                    hi,
                    q.bits,
                    config.ranges.act_range,
                    symmetric,
                    config.ranges.range_norm,
                )
                scales.append(s), zeros.append(z)
            q.set_group(group, torch.cat(scales), torch.cat(zeros)[q.index])


def _snap(quantizer: ActQuantizer, free: list[tuple], norm: float) -> None:
    """Snap all groups' free scales to the carrier grid, each part of a split input with a base (per token: a clip) of its own."""
    for part in range(quantizer.scale.shape[1]):
        own = quantizer.index == part
        shift = carrier.block_shifts(torch.stack([s[own] for _, s, _ in free]))
        shift = shift if quantizer.shifts else torch.zeros_like(shift)
        for group, (x, s, z) in enumerate(free):
            x = x.to(s.device)[own]
            if quantizer.token:
                (base, ratio), zero = (
                    carrier.snap_to_tokens(x, s[own], shift, quantizer.bits, norm),
                    torch.zeros_like(z[own]),
                )
            else:
                base, ratio, zero = carrier.snap_to_carrier(
                    x, s[own], z[own], shift, quantizer.bits, norm
                )
            with torch.no_grad():
                quantizer.scale[group, part] = base
                quantizer.ratio[group, own] = ratio
                quantizer.zero_point[group, own] = zero


TRAIN_STEPS, NORMAL_MEAN, NORMAL_STD = (
    1000,
    0.4,
    0.5,
)  # PTQ4DM (Shang et al. 2023, Sec. 3.3): N(mu, T / 2) with mu <= T / 2


def samples_of_steps(t: torch.Tensor, config: QuantConfig, generator: torch.Generator) -> list[int]:
    """How many samples each of these steps gives to the range search, `calib_batch` together.

    "normal": timesteps are drawn from a normal distribution, and each goes to the nearest of the steps; several can have none.
    """
    if config.ranges.calib_steps == "uniform":
        return [max(1, -(-config.ranges.calib_batch // len(t)))] * len(t)
    counts, drawn = torch.zeros(len(t), dtype=torch.int64), 0
    while drawn < config.ranges.calib_batch:  # what falls outside is drawn again
        wanted = TRAIN_STEPS * (NORMAL_MEAN + NORMAL_STD * torch.randn(1, generator=generator))
        if 0 <= wanted < TRAIN_STEPS:
            counts[(t - wanted).abs().argmin()] += 1
            drawn += 1
    return counts.tolist()


@torch.no_grad()
def init_ranges(
    unet: nn.Module, calib: Calibration, config: QuantConfig, *, progress: bool = False
) -> None:
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
    counts = [
        samples_of_steps(calib.t[own], config, generator)
        for own, generator in zip(steps, generators, strict=True)
    ]
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
            _snap(q, free[i], config.ranges.range_norm)
        q.calibrated.fill_(True)
    set_mode(unet, weights=True)
