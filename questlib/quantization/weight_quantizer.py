"""The quantizer of weights, with AdaRound's learned rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from questlib.config_groups import Search
from questlib.quantization import primitives
from questlib.quantization.precision import FixedPrecision
from questlib.quantization.primitives import LearnedQuant
from questlib.quantization.range_search import choose_qparams

TINY = 1e-20  # a row of weights with a smaller span is zero


class WeightQuantizer(FixedPrecision):
    """Quantizes the weight of a layer, with a scale for each output channel and part of the input.

        w_hat = (clamp(round(w / s) + z, 0, 2^b - 1) - z) * s

    AdaRound (Nagel et al. 2020, Eq. 22 and 23) replaces round(u) by floor(u) + h(alpha), where

        h(alpha) = clamp(sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    is learned. `harden` ends it: the weight moves to where round-to-nearest gives the codes that
    were learned.

    Args:
        out_channels: O.
        bits: 2 to 8.
        index: the part of each input channel, int64 [I], values in 0..P - 1.

    Attributes:
        scale: float32 [O, P]; 1 until `search` has run or a checkpoint is loaded.
        zero_point: whole numbers 0..2^b - 1 in float32 [O, P].
        index: int64 [I].
        alpha: while AdaRound runs, shaped like the weight; else None.
        base: while AdaRound runs, the rounded-down weight; else None.
        step: while AdaRound runs, what rounding up adds, 0 beyond the grid's ends; else None.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    index: torch.Tensor

    def __init__(self, out_channels: int, bits: int, index: torch.Tensor) -> None:
        super().__init__()
        self.bits = bits
        shape = (out_channels, int(index.max()) + 1)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))
        self.register_buffer("index", index)
        self.alpha: nn.Parameter | None = None
        self.base: torch.Tensor | None = None
        self.step: torch.Tensor | None = None

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        bits: int,
        index: torch.Tensor,
        method: Search,
        norm: float = 2.0,
    ) -> WeightQuantizer:
        """A quantizer on the weight's device, with ranges that are searched on it."""
        quantizer = cls(len(weight), bits, index).to(weight.device)
        quantizer.search(weight, method, norm)
        return quantizer

    @torch.no_grad()
    def search(self, weight: torch.Tensor, method: Search, norm: float = 2.0) -> None:
        """Set scale and zero point by a range search.

        Args:
            weight: [O, I] or [O, I, kh, kw].
            method: see `questlib.quantization.range_search.choose_qparams`.
            norm: of the "mse" search.
        """
        w = weight.flatten(2) if weight.ndim > 2 else weight[..., None]  # [O, I, kh * kw]
        for part in range(self.scale.shape[1]):
            rows = w[:, self.index == part].flatten(1).float()  # [O, n]
            unit = self._units(rows)
            rows = rows * unit[:, None] if bool((unit != 1).any()) else rows
            ends = (rows.amin(1), rows.amax(1))
            s, z = choose_qparams(rows, *ends, self.bits, method, norm=norm)
            self.scale[:, part] = s / unit
            self.zero_point[:, part] = z

    def _units(self, rows: torch.Tensor) -> torch.Tensor:
        """Powers of two [O] that bring rows [O, n] of tiny weights to a span of about one.

        Their scales would lie below the least one, and all their codes would mean zero. It is 1 for
        all other rows, and for those that are zero.
        """
        span = rows.amax(1).clamp_min(0) - rows.amin(1).clamp_max(0)
        tiny = (span < primitives.EPS * (2**self.bits - 1)) & (span > TINY)
        return torch.where(tiny, 2.0 ** -span.clamp_min(TINY).log2().floor(), 1.0)

    def expand(self, table: torch.Tensor, ndim: int) -> torch.Tensor:
        """A table [O, P] to broadcast over a weight: [O, 1, ...] for one part, else [O, I, ...]."""
        table = table if table.shape[1] == 1 else table[:, self.index]
        return table.reshape(*table.shape, *[1] * (ndim - 2))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        if self.alpha is not None:
            return SoftRounding.apply(self.alpha, self.base, self.step)
        s = self.expand(self.scale, w.ndim)
        z = self.expand(self.zero_point, w.ndim)
        if torch.is_grad_enabled() and w.requires_grad:
            return LearnedQuant.apply(w, s, z, self.bits)
        return primitives.fake_quant(w, s, z, self.bits)

    def codes(self, w: torch.Tensor) -> torch.Tensor:
        """Codes 0..2^b - 1 of a weight, uint8, shaped like it."""
        s = self.expand(self.scale, w.ndim)
        z = self.expand(self.zero_point, w.ndim)
        return ((w * (1.0 / s)).round() + z).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The quantized weight of these codes: (codes - z) * s."""
        s = self.expand(self.scale, codes.ndim)
        z = self.expand(self.zero_point, codes.ndim)
        return (codes.to(s.dtype) - z) * s

    # ---- AdaRound: Nagel et al. 2020, Eq. 22 to 24 ----

    def start_adaround(self, w: torch.Tensor) -> nn.Parameter:
        """Start learned rounding of a weight; returns alpha, which is to be trained.

        It starts where h(alpha) is the fraction u - floor(u): at the full-precision weight.
        """
        s = self.expand(self.scale, w.ndim)
        # as in `harden`: w / s has another floor for a few weights in a million
        u = w.detach() * (1.0 / s)
        lower = u.floor()
        low = -self.expand(self.zero_point, w.ndim)
        high = low + 2**self.bits - 1
        free = (lower >= low) & (lower < high)
        self.base = lower.clamp(low, high) * s
        self.step = s * free
        p = (u - lower - GAMMA) / (ZETA - GAMMA)
        self.alpha = nn.Parameter(torch.log(p / (1 - p)))
        return self.alpha

    def rounding(self) -> torch.Tensor:
        """h(alpha), Eq. 23's rectified sigmoid: 0 rounds down, 1 rounds up."""
        return rectified_sigmoid(self.alpha)

    @torch.no_grad()
    def regularize(self, beta: float, weight: float) -> None:
        """Add the gradient of weight * mean(1 - |2 h(alpha) - 1|^beta), Eq. 24, to alpha's."""
        u = self.rounding().mul_(2).sub_(1)
        slope = u.abs().pow_(beta - 2).mul_(u).mul_(rounding_slope(self.alpha))
        assert self.alpha is not None and self.alpha.grad is not None
        self.alpha.grad.sub_(slope, alpha=2 * beta * weight / slope.numel())

    @torch.no_grad()
    def count_decided(self) -> int:
        """Number of weights whose rounding is within 1% of 0 or 1, so that hardening is harmless.

        A weight beyond the grid's ends has one code, and counts.
        """
        decided = (self.rounding() - 0.5).abs() >= 0.49
        return int((decided | (self.step == 0)).sum())

    @torch.no_grad()
    def harden(self, w: torch.Tensor) -> torch.Tensor:
        """End learned rounding; returns the weight that round-to-nearest then gives.

        It is the nearest point to w inside the chosen rounding cell, so that finetuning starts
        close to the full-precision weight.
        """
        s = self.expand(self.scale, w.ndim)
        z = self.expand(self.zero_point, w.ndim)
        u = w * (1.0 / s)
        cell = (u.floor() + (self.rounding() >= 0.5)).clamp(-z, 2**self.bits - 1 - z)
        self.alpha = self.base = self.step = None
        return into_cell(u, cell).mul_(s)

    @torch.no_grad()
    def reopen(self, codes: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The nearest point to a weight w that has these codes, float32."""
        s = self.expand(self.scale, w.ndim)
        cell = codes.float() - self.expand(self.zero_point, w.ndim)
        return into_cell(w.float() * (1.0 / s), cell).mul_(s)


def into_cell(u: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """The nearest points to u = w / s that round to the whole numbers `cell`."""
    return u.clamp(cell - 0.49, cell + 0.49)


# ---- AdaRound's rectified sigmoid: Nagel et al. 2020, Eq. 23 ----

GAMMA = -0.1
ZETA = 1.1


def rectified_sigmoid(alpha: torch.Tensor) -> torch.Tensor:
    """h(alpha) = clamp(sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)."""
    return torch.sigmoid(alpha).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def rounding_slope(alpha: torch.Tensor) -> torch.Tensor:
    """The derivative of h: (ZETA - GAMMA) p (1 - p) with p = sigmoid(alpha), 0 where h is 0 or 1.

    h leaves 0 and 1 where p (1 - p) = GAMMA (GAMMA - 1) / (ZETA - GAMMA)^2 = -GAMMA ZETA / 1.44.
    """
    p = torch.sigmoid(alpha)
    slope = (1 - p).mul_(p)
    edge = -GAMMA * ZETA / (ZETA - GAMMA) ** 2
    return nn.functional.threshold_(slope, edge, 0.0).mul_(ZETA - GAMMA)


class SoftRounding(torch.autograd.Function):
    """A weight with learned rounding: base + h(alpha) * step.

    base is the rounded-down weight. step is the scale, and 0 where both roundings are beyond the
    same end of the grid. The gradient is in closed form: autograd's, through one pass for each
    operation, took a third of AdaRound's time.
    """

    @staticmethod
    def forward(
        ctx: Any, alpha: torch.Tensor, base: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(alpha, step)
        return torch.addcmul(base, rectified_sigmoid(alpha), step)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        alpha, step = ctx.saved_tensors
        return rounding_slope(alpha).mul_(step).mul_(grad), None, None
