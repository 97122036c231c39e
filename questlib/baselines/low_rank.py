"""Low-rank updates of weights: what EfficientDM trains (He et al. 2024, Sec. 3.2).

In place of a weight W [O, K] a layer trains two thin matrices, as LoRA does (Hu et al. 2022):

    W_hat = Q( W + unit * B A )        B [O, r], A [r, K], r much smaller than O and K

The update is merged into the weight before that is quantized (EfficientDM, Eq. 7), so that nothing
of it is left beside the quantized weight afterwards. `unit` is the layer's mean quantization step.
Equal updates of B then move equally many codes in every layer (EfficientDM's scale-aware
optimization), and one learning rate serves all layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from questlib.quantization.layers import QuantLayer


class LowRank(nn.Module):
    """A parametrization of a weight: W -> W + unit * B A.

    A is random at first and B zero, so that training starts at W itself.

    Args:
        weight: W, of shape [O, ...]; K is the product of all dimensions but the first.
        rank: r; at most O and K.
        unit: what an entry of B A counts in W.
        generator: draws A.
    """

    def __init__(
        self, weight: torch.Tensor, rank: int, unit: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        a = torch.randn(min(rank, rows, columns), columns, generator=generator) / columns**0.5
        self.a = nn.Parameter(a.to(weight))  # [r, K]
        self.b = nn.Parameter(torch.zeros(rows, len(a)).to(weight))  # [O, r]
        self.unit = unit

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.unit * (self.b @ self.a).reshape(weight.shape)


def attach(layers: Iterable[QuantLayer], rank: int, seed: int) -> None:
    """Give each layer a low-rank update; with rank 0 nothing is done."""
    if rank == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        quantizer = layer.weight_quantizer
        unit = 1.0 if quantizer is None else quantizer.scale.mean().item()
        update = LowRank(layer.weight, rank, unit, generator)
        parametrize.register_parametrization(layer, "weight", update)


def merge(layers: Iterable[QuantLayer]) -> None:
    """Merge the updates into the weights; layers without an update stay as they are."""
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def count_trainable(layer: QuantLayer, rank: int) -> int:
    """Number of trainable parameters: those of the weight, or of its update where rank > 0."""
    rows = layer.weight.shape[0]
    columns = layer.weight[0].numel()
    return min(rank, rows, columns) * (rows + columns) if rank else rows * columns
