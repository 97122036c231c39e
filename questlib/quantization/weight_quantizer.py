"""The quantizer of weights, with AdaRound's learned rounding."""

from __future__ import annotations

import torch
from torch import nn

from questlib.quantization import primitives, range_search
from questlib.quantization.primitives import LearnedQuant


class WeightQuantizer(nn.Module):
    """Per output channel (and per part of a split input): scale, zero_point float32 [O, P]; input channel i is in part index[i].

    Codes are round(w / s) + z in 0..2^b - 1. While AdaRound runs, `alpha` [like w] decides rounding up by a rectified sigmoid
    (Nagel et al. 2020, Eq. 23); `harden` then moves w into the chosen cell, so that round-to-nearest gives AdaRound's codes.
    """

    GAMMA, ZETA = -0.1, 1.1

    def __init__(self, weight: torch.Tensor, bits: int, index: torch.Tensor, method: str) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("index", index)  # [I]
        w = (
            weight.detach().flatten(2) if weight.ndim > 2 else weight.detach()[..., None]
        )  # [O, I, kh*kw]
        scales, zeros = [], []
        for part in range(int(index.max()) + 1):
            rows = w[:, index == part].flatten(1).float()  # [O, n]
            s, z = range_search.choose_qparams(rows, rows.amin(1), rows.amax(1), bits, method)
            scales.append(s), zeros.append(z)
        self.register_buffer("scale", torch.stack(scales, 1))
        self.register_buffer("zero_point", torch.stack(zeros, 1))
        self.alpha: nn.Parameter | None = None

    def expand(self, table: torch.Tensor, ndim: int) -> torch.Tensor:
        """[O, P] -> broadcastable over the weight: [O, 1, ...] for one part, else [O, I, ...]."""
        table = table if table.shape[1] == 1 else table[:, self.index]
        return table.reshape(*table.shape, *[1] * (ndim - 2))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        s, z = self.expand(self.scale, w.ndim), self.expand(self.zero_point, w.ndim)
        if self.alpha is not None:
            q = ((w.detach() * (1.0 / s)).floor() + self.rounding()).clamp(-z, 2**self.bits - 1 - z)
            return q * s
        if torch.is_grad_enabled() and w.requires_grad:
            return LearnedQuant.apply(w, s, z, self.bits)
        return primitives.fake_quant(w, s, z, self.bits)

    def codes(self, w: torch.Tensor) -> torch.Tensor:
        """Integer codes, uint8, shaped like w."""
        s, z = self.expand(self.scale, w.ndim), self.expand(self.zero_point, w.ndim)
        return ((w * (1.0 / s)).round() + z).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        s, z = self.expand(self.scale, codes.ndim), self.expand(self.zero_point, codes.ndim)
        return (codes.to(s.dtype) - z) * s

    # ---- AdaRound ----
    def start_adaround(self, w: torch.Tensor) -> nn.Parameter:
        s = self.expand(self.scale, w.ndim)
        u = w.detach() * (
            1.0 / s
        )  # as in forward and harden: w / s has another floor for a few weights in a million
        frac = u - u.floor()
        p = (frac - self.GAMMA) / (self.ZETA - self.GAMMA)
        self.alpha = nn.Parameter(
            torch.log(p / (1 - p))
        )  # rounding() starts at frac: the full-precision weight
        return self.alpha

    def rounding(self) -> torch.Tensor:
        return (torch.sigmoid(self.alpha) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    @torch.no_grad()
    def harden(self, w: torch.Tensor) -> torch.Tensor:
        """End AdaRound: the point of the chosen rounding cell that is nearest to w. Weights near a border stay near it."""
        s, z = self.expand(self.scale, w.ndim), self.expand(self.zero_point, w.ndim)
        u = w * (1.0 / s)
        cell = (u.floor() + (self.rounding() >= 0.5)).clamp(-z, 2**self.bits - 1 - z)
        self.alpha = None
        return u.clamp(cell - 0.49, cell + 0.49).mul_(s)
