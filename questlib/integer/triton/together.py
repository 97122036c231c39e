"""One input that several layers take, each on a grid of its own: quantized in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from questlib.integer.form import group_in_force
from questlib.integer.triton.layers import Affine, Sent, TritonLayer
from questlib.integer.triton.quantizing import quantize_rows
from questlib.integer.triton.runtime import check_input

MOST = 3  # results of one pass


def quantized_together(
    layers: Sequence[TritonLayer], x: torch.Tensor, norm: Affine | nn.LayerNorm
) -> list[Sent]:
    """What each of some Linears multiplies, of the same input.

    Args:
        layers: those for which `can_share` holds.
        x: [B, N, K].
        norm: what stands between x and the layers: a GroupNorm's scale and shift, or a LayerNorm.
    """
    first = layers[0]
    check_input(x, first.name, x.shape[-1], first.channels)
    g = group_in_force(first.steps, first.name)
    parts = [layer.parts[0] for layer in layers]
    x = x if x.stride(-1) == 1 else x.contiguous()
    affine, eps = (norm, None)
    if isinstance(norm, nn.LayerNorm):
        affine, eps = (norm.weight, norm.bias), norm.eps
    found = quantize_rows(
        x,
        [part.table[g] for part in parts],
        [] if parts[0].order is None else [part.order for part in parts],
        first.flag,
        first.levels,
        parts[0].compensation is not None,
        *affine,
        eps,
    )
    no_scales = found[0].new_empty(0, dtype=torch.float32)
    return [(a, sums, no_scales) for a, sums in zip(found[::2], found[1::2], strict=True)]


def can_share(layers: Sequence[TritonLayer]) -> bool:
    """Whether one kernel can quantize the input of all these layers."""
    if len(layers) > MOST or not all(isinstance(x, TritonLayer) and x.linear for x in layers):
        return False
    if any(len(layer.parts) > 1 or layer.parts[0].clip is not None for layer in layers):
        return False
    kinds = {
        (
            layer.channels,
            layer.levels,
            layer.parts[0].order is None,
            layer.parts[0].compensation is None,
            layer.parts[0].table.shape[2] == 1,
        )
        for layer in layers
    }
    return len(kinds) == 1


def plain_norm(norm: nn.Module) -> bool:
    """Whether a norm is one that the kernel computes."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
