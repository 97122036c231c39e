"""Low-rank updates of weights that are quantized after the update is merged: what EfficientDM trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from questlib.quantization.layers import QuantLayer


class LowRank(nn.Module):
    """A parametrization of a weight: w + unit * (b a), a [rank, K], b [O, rank] zero at first (LoRA, Hu et al. 2022).

    unit: the layer's mean quantization step, so that equal updates move equally many codes in every layer (the scale-aware
    optimization of EfficientDM, He et al. 2024, Sec. 3.2). It is merged into the weight before that is quantized (Eq. 7 there).
    """

    def __init__(
        self, weight: torch.Tensor, rank: int, unit: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        a = torch.randn(min(rank, rows, columns), columns, generator=generator) / columns**0.5
        self.a, self.b = (
            nn.Parameter(a.to(weight)),
            nn.Parameter(torch.zeros(rows, len(a)).to(weight)),
        )
        self.unit = unit

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.unit * (self.b @ self.a).reshape(weight.shape)


def attach(layers: Iterable[QuantLayer], rank: int, seed: int) -> None:
    """Give the layers low-rank updates; with rank 0 nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers if rank else ():
        unit = 1.0 if layer.weight_quantizer is None else layer.weight_quantizer.scale.mean().item()
        parametrize.register_parametrization(
            layer, "weight", LowRank(layer.weight, rank, unit, generator)
        )


def merge(layers: Iterable[QuantLayer]) -> None:
    """Put the updates into the weights and forget them; layers without are left as they are."""
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def count_trainable(layer: QuantLayer, rank: int) -> int:
    """How many numbers of a layer are trained: its weights, or with a rank those of the update."""
    rows, columns = layer.weight.shape[0], layer.weight[0].numel()
    return min(rank, rows, columns) * (rows + columns) if rank else rows * columns
