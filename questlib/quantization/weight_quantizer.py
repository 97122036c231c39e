"""The quantizer of weights, with AdaRound's learned rounding."""

from __future__ import annotations

import torch
from torch import nn

from questlib.config import Search
from questlib.quantization import primitives
from questlib.quantization.primitives import LearnedQuant
from questlib.quantization.range_search import choose_qparams


class WeightQuantizer(nn.Module):
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
    """

    GAMMA = -0.1
    ZETA = 1.1

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

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, bits: int, index: torch.Tensor, method: Search
    ) -> WeightQuantizer:
        """A quantizer on the weight's device, with ranges that are searched on it."""
        quantizer = cls(len(weight), bits, index).to(weight.device)
        quantizer.search(weight, method)
        return quantizer

    @torch.no_grad()
    def search(self, weight: torch.Tensor, method: Search) -> None:
        """Set scale and zero point by a range search.

        Args:
            weight: [O, I] or [O, I, kh, kw].
            method: see `questlib.quantization.range_search.choose_qparams`.
        """
        w = weight.flatten(2) if weight.ndim > 2 else weight[..., None]  # [O, I, kh * kw]
        for part in range(self.scale.shape[1]):
            rows = w[:, self.index == part].flatten(1).float()  # [O, n]
            s, z = choose_qparams(rows, rows.amin(1), rows.amax(1), self.bits, method)
            self.scale[:, part] = s
            self.zero_point[:, part] = z

    def expand(self, table: torch.Tensor, ndim: int) -> torch.Tensor:
        """A table [O, P] to broadcast over a weight: [O, 1, ...] for one part, else [O, I, ...]."""
        table = table if table.shape[1] == 1 else table[:, self.index]
        return table.reshape(*table.shape, *[1] * (ndim - 2))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        s = self.expand(self.scale, w.ndim)
        z = self.expand(self.zero_point, w.ndim)
        if self.alpha is not None:
            lower = (w.detach() * (1.0 / s)).floor()
            return (lower + self.rounding()).clamp(-z, 2**self.bits - 1 - z) * s
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

    # ---- AdaRound: Nagel et al. 2020, Eq. 22 and 23 ----

    def start_adaround(self, w: torch.Tensor) -> nn.Parameter:
        """Start learned rounding of a weight; returns alpha, which is to be trained.

        It starts where h(alpha) is the fraction u - floor(u): at the full-precision weight.
        """
        s = self.expand(self.scale, w.ndim)
        # as in `forward` and `harden`: w / s has another floor for a few weights in a million
        u = w.detach() * (1.0 / s)
        fraction = u - u.floor()
        p = (fraction - self.GAMMA) / (self.ZETA - self.GAMMA)
        self.alpha = nn.Parameter(torch.log(p / (1 - p)))
        return self.alpha

    def rounding(self) -> torch.Tensor:
        """h(alpha), Eq. 23's rectified sigmoid: 0 rounds down, 1 rounds up."""
        return (torch.sigmoid(self.alpha) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

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
        self.alpha = None
        return u.clamp(cell - 0.49, cell + 0.49).mul_(s)
