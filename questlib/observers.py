"""Activation ranges from what the full-precision model receives, or the model quantized so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from questlib.calibration import Calibration
from questlib.config import OFF, QuantConfig
from questlib.config_groups import RangeConfig
from questlib.integrity import Tensors
from questlib.quantization import carrier, range_search
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.model import act_quantizers, freeze, set_mode
from questlib.stage_cache import Parts

# How many values of a quantizer's inputs are kept for the range search:
VALUES_PER_CHANNEL = 2048  # of a batch, where channels have scales of their own
VALUES_IN_ALL = 20 * VALUES_PER_CHANNEL  # of all batches and step groups, likewise
VALUES_PER_TENSOR = 65536  # of a batch, where channels share a scale

# PTQ4DM (Shang et al. 2023, Sec. 3.3): timesteps from N(mu, T / 2) with mu <= T / 2
TRAIN_STEPS = 1000
NORMAL_MEAN = 0.4
NORMAL_STD = 0.5


class FreeRange(NamedTuple):
    """The ranges of single channels, before they are snapped to the carrier grid."""

    values: torch.Tensor  # a sample of the inputs [C, n], on the CPU
    scale: torch.Tensor  # [C]
    zero_point: torch.Tensor  # [C]


class Observer:
    """What reaches one quantizer in one step group: extremes and a fixed-size sample.

    Args:
        quantizer: whose range is searched.
        ranges: how.
        seed: of the sample.
        batches: number of batches that the quantizer sees, of all step groups together.
    """

    def __init__(
        self, quantizer: ActQuantizer, ranges: RangeConfig, seed: int, batches: int
    ) -> None:
        self.quantizer = quantizer
        self.ranges = ranges
        self.generator = torch.Generator().manual_seed(seed)
        self.channels = len(quantizer.index)
        # values of each channel that are kept of a batch
        if quantizer.granularity == "tensor":
            self.keep = max(1, VALUES_PER_TENSOR // self.channels)
        else:
            self.keep = max(1, min(VALUES_PER_CHANNEL, VALUES_IN_ALL // batches))
        self.extremes: tuple[torch.Tensor, torch.Tensor] | None = None  # [C] each
        self.values: list[torch.Tensor] = []  # [C, n] of each batch

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch of the quantizer's inputs."""
        if self.channels > 1:
            rows = x.movedim(self.quantizer.dim, 0).reshape(self.channels, -1)  # [C, n]
        else:
            rows = x.reshape(1, -1)
        lo = rows.amin(1)
        hi = rows.amax(1)
        if self.extremes is not None:
            past_lo, past_hi = self.extremes
            ema = self.ranges.act_ema
            if ema is None:
                lo = torch.minimum(past_lo, lo)
                hi = torch.maximum(past_hi, hi)
            else:
                lo = ema * past_lo + (1 - ema) * lo
                hi = ema * past_hi + (1 - ema) * hi
        self.extremes = (lo, hi)
        count = min(self.keep, rows.shape[1])
        pick = torch.randint(rows.shape[1], (count,), generator=self.generator)
        self.values.append(rows[:, pick.to(rows.device)])

    def channel_ranges(self) -> FreeRange:
        """Search a range for each channel."""
        x, lo, hi = self._seen()
        scale, zero_point = self._choose(x, lo, hi)
        return FreeRange(x, scale, zero_point)

    def part_ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Search a range for each part of the input: scale [P], zero point [C]."""
        x, lo, hi = self._seen()
        index = self.quantizer.index
        found = []
        for part in range(self.quantizer.scale.shape[1]):
            own = index == part
            ends = (lo[own].amin()[None], hi[own].amax()[None])
            found.append(self._choose(x[own].reshape(1, -1), *ends))
        scale = torch.cat([s for s, _ in found])
        zero_point = torch.cat([z for _, z in found])
        return scale, zero_point[index]

    @property
    def quantizes(self) -> bool:
        """False: what is seen passes on in full precision."""
        return False

    def _seen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A sample of all inputs [C, n], and their extremes [C]."""
        if self.extremes is None:
            raise RuntimeError(f"{self.quantizer.name}: no input was observed")
        return torch.cat(self.values, 1), *self.extremes

    def _choose(
        self, x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return range_search.choose_qparams(
            x,
            lo,
            hi,
            self.quantizer.bits,
            self.ranges.act_range,
            self.ranges.act_symmetric and not self.quantizer.unsigned,
            self.ranges.range_norm,
        )


class LiveObserver(Observer):
    """Sets the range as soon as a batch is seen, and lets the quantizer quantize that batch.

    Later layers so see what the quantized earlier ones give (release).
    """

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch and set the range of the selected step group."""
        super().update(x)
        set_range(self, self.quantizer.steps.current)

    @property
    def quantizes(self) -> bool:
        """True: what is seen passes on quantized."""
        return True


def set_range(observer: Observer, group: int) -> None:
    """Set the range of one step group, of a quantizer whose groups do not depend on each other."""
    quantizer = observer.quantizer
    if quantizer.granularity == "tensor":
        quantizer.set_group(group, *observer.part_ranges())
    else:
        found = observer.channel_ranges()
        quantizer.set_group(group, found.scale, found.zero_point)


def snap_ranges(quantizer: ActQuantizer, free: list[FreeRange], norm: float) -> None:
    """Snap the free ranges of all step groups to the carrier grid, or to grids of single tokens.

    Each part of a split input has a base of its own (per token: a clip). The shift e is the same in
    all groups.

    Args:
        quantizer: gets scale, ratio, shift and zero point.
        free: the ranges of each step group.
        norm: of the error that is minimized.
    """
    for part in range(quantizer.scale.shape[1]):
        own = quantizer.index == part
        shift = carrier.block_shifts(torch.stack([scale[own] for _, scale, _ in free]))
        if not quantizer.shifts:
            shift = torch.zeros_like(shift)
        with torch.no_grad():
            # more bits leave no room for ratios
            quantizer.shift[own] = shift.long() if quantizer.carrier else 0
        for group, (values, scale, zero_point) in enumerate(free):
            x = values.to(scale.device)[own]
            s = scale[own]
            if quantizer.token:
                base, ratio = carrier.snap_to_tokens(x, s, shift, quantizer.bits, norm)
                zero = torch.zeros_like(s)
            else:
                base, ratio, zero = carrier.snap_to_carrier(
                    x, s, zero_point[own], shift, quantizer.bits, norm
                )
            with torch.no_grad():
                quantizer.scale[group, part] = base
                quantizer.ratio[group, own] = ratio
                quantizer.zero_point[group, own] = zero


def samples_of_steps(t: torch.Tensor, ranges: RangeConfig, generator: torch.Generator) -> list[int]:
    """How many samples each sampler step gives to the range search, `calib_batch` together.

    "uniform": all steps give equally many, rounded up. "first": the first one gives all. "normal":
    timesteps are drawn from a normal
    distribution, and each draw goes to the nearest step; some steps can have none (PTQ4DM).

    Args:
        t: the timesteps of the steps [T].
        ranges: `calib_steps` and `calib_batch`.
        generator: draws the timesteps.
    """
    if ranges.calib_steps == "first":
        first = int(t.argmax())
        return [ranges.calib_batch if step == first else 0 for step in range(len(t))]
    if ranges.calib_steps == "uniform":
        return [max(1, -(-ranges.calib_batch // len(t)))] * len(t)
    counts = torch.zeros(len(t), dtype=torch.int64)
    drawn = 0
    while drawn < ranges.calib_batch:
        wanted = TRAIN_STEPS * (NORMAL_MEAN + NORMAL_STD * torch.randn(1, generator=generator))
        if 0 <= wanted < TRAIN_STEPS:  # what falls outside is drawn again
            counts[(t - wanted).abs().argmin()] += 1
            drawn += 1
    return counts.tolist()


def is_snapped(quantizer: ActQuantizer) -> bool:
    """Whether the quantizer's ranges follow from those of all step groups (`snap_ranges`)."""
    return quantizer.granularity in ("carrier", "token")


@torch.no_grad()
def init_ranges(
    unet: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    parts: Parts | None = None,
    progress: bool = False,
) -> None:
    """Set every activation quantizer of a prepared UNet from the activations of its layers.

    One step group after another: each sees `calib_batch` samples, spread over its steps.
    `ranges.calib_model` says whether the model is in full precision meanwhile, or quantized as far
    as ranges are set.

    Args:
        unet: made by `questlib.quantization.preparation.prepare`.
        calib: inputs of the full-precision UNet.
        config: `ranges`, `forward_batch` and `seed` of the quantization.
        parts: keeps finished step groups, and gives those of a search that was stopped.
        progress: show a progress bar.
    """
    parts = Parts() if parts is None else parts
    ranges = config.ranges
    live = ranges.calib_model == "quantized"
    set_mode(unet, weights=live)
    if live:
        freeze(unet)
    quantizers = [q for q in act_quantizers(unet) if q.bits != OFF]
    groups = unet.quest_steps.num_groups
    group_of_step = torch.tensor([unet.quest_steps.lookup(t) for t in calib.t])
    generators = [torch.Generator().manual_seed(config.seed + group) for group in range(groups)]
    steps = [(group_of_step == group).nonzero().flatten().tolist() for group in range(groups)]
    counts = [
        samples_of_steps(calib.t[own], ranges, generator)
        for own, generator in zip(steps, generators, strict=True)
    ]
    batches = sum(-(-count // config.forward_batch) for of in counts for count in of)

    # of the quantizers with ratios, which are snapped once all groups are known
    free: list[list[FreeRange]] = [[] for _ in quantizers]
    for group in tqdm(range(groups), desc="ranges", disable=not progress):

        def search(group: int = group) -> Tensors:
            kind = LiveObserver if live else Observer
            observers = [
                kind(q, ranges, 1000 * group + i, batches) for i, q in enumerate(quantizers)
            ]
            for q, observer in zip(quantizers, observers, strict=True):
                q.observer = observer
            generator = generators[group]
            for step, count in zip(steps[group], counts[group], strict=True):
                pick = torch.randperm(calib.width(step), generator=generator)[:count]
                for batch in calib.batch(step, pick).split(config.forward_batch):
                    batch.run(unet)
            found = {}
            for i, (q, observer) in enumerate(zip(quantizers, observers, strict=True)):
                q.observer = None
                if is_snapped(q):
                    one = observer.channel_ranges()
                    found[f"{i}.values"] = one.values.cpu()
                    found |= {f"{i}.scale": one.scale, f"{i}.zero_point": one.zero_point}
                    continue
                if not live:
                    set_range(observer, group)
                found |= {f"{i}.{key}": getattr(q, key)[group] for key in ("scale", "zero_point")}
            return {name: value.detach().cpu() for name, value in found.items()}

        found = parts.keep(str(group), search)
        for i, q in enumerate(quantizers):
            scale = found[f"{i}.scale"].to(q.scale.device)
            zero_point = found[f"{i}.zero_point"].to(q.scale.device)
            if is_snapped(q):
                free[i].append(FreeRange(found[f"{i}.values"], scale, zero_point))
            else:
                q.set_group(group, scale, zero_point)

    for q, own_free in zip(quantizers, free, strict=True):
        if own_free:
            snap_ranges(q, own_free, ranges.range_norm)
        q.calibrated.fill_(True)
    set_mode(unet, weights=True)
