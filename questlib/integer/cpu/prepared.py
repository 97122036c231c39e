"""What a norm or an activation sends to the layers behind it, as bytes from one compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from questlib.integer.cpu.layers import CpuLayer
from questlib.integer.cpu.quantizing import Prepared, Sent, not_finite
from questlib.kernels.rows import (
    Rows,
    Target,
    affine_rows,
    geglu_rows,
    group_affine,
    layer_norm_rows,
)

Affine = tuple[torch.Tensor, torch.Tensor]  # float32 [B, C] each: x * scale + shift


def after_group_norm(
    layer: CpuLayer, x: torch.Tensor, affine: Affine, silu: bool = False
) -> Prepared:
    """A layer's input: a norm's map of x [B, C, H, W], and a SiLU where one follows."""
    scale, shift = affine
    return _prepared([layer], x.shape, x.dtype, lambda to: affine_rows(x, scale, shift, silu, to))


def affine_of(x: torch.Tensor, norm: nn.GroupNorm, added: torch.Tensor | None = None) -> Affine:
    """GroupNorm(x + added) as a scale and a shift.

    Args:
        x: [B, C, H, W].
        norm: with weight and bias.
        added: [B, C] of all pixels of a channel, or None.
    """
    if added is not None:
        added = added.float().contiguous()
    weight, bias = norm.weight.float(), norm.bias.float()
    return group_affine(x, norm.num_groups, weight, bias, norm.eps, added)


def after_layer_norm(layers: Sequence[CpuLayer], x: torch.Tensor, norm: nn.LayerNorm) -> Prepared:
    """The input of some layers that see the same LayerNorm of x [B, N, C]."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return _prepared(
        layers, x.shape, x.dtype, lambda to: layer_norm_rows(x, weight, bias, norm.eps, to)
    )


def after_geglu(layer: CpuLayer, x: torch.Tensor) -> Prepared:
    """A layer's input: GEGLU(x) of x [..., 2 C]."""
    shape = torch.Size([*x.shape[:-1], x.shape[-1] // 2])
    return _prepared([layer], shape, x.dtype, lambda to: geglu_rows(x, to))


def as_rows(of: Prepared) -> Prepared:
    """Pixels as rows: [B, C, H, W] -> [B, HW, C]."""

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2)

    batch, channels, height, width = of.shape
    sent = {
        name: [Sent(rows(s.bytes), None if s.scale is None else rows(s.scale)) for s in parts]
        for name, parts in of.of.items()
    }
    return Prepared(sent, torch.Size((batch, height * width, channels)), of.dtype)


def pieces(of: Prepared, layer: CpuLayer, most: int) -> Iterator[tuple[slice, Prepared]]:
    """Some rows of [B, N, C] at a time, as equal as can be.

    Args:
        of: what the layer takes.
        layer: the one whose input is cut.
        most: rows of a piece.

    Yields:
        The rows, counted over the batch, and their [rows, C].
    """
    parts = [
        Sent(s.bytes.flatten(0, 1), None if s.scale is None else s.scale.flatten(0, 1))
        for s in of.of[layer.name]
    ]
    rows = of.shape[0] * of.shape[1]
    count = -(-rows // most)
    size = -(-rows // count)
    for start in range(0, rows, size):
        own = slice(start, min(rows, start + size))
        sent = [Sent(s.bytes[own], None if s.scale is None else s.scale[own]) for s in parts]
        shape = torch.Size((own.stop - own.start, of.shape[2]))
        yield own, Prepared({layer.name: sent}, shape, of.dtype)


def _prepared(
    layers: Sequence[CpuLayer],
    shape: torch.Size,
    dtype: torch.dtype,
    make: Callable[[list[Target]], tuple[list[Rows], bool]],
) -> Prepared:
    """What the layers take of rows that `make` writes on all their grids."""
    targets = [target for layer in layers for target in layer.targets()]
    rows, finite = make(targets)
    if not finite:
        raise not_finite(layers[0].name)
    left = iter(rows)
    sent = {layer.name: [Sent(*next(left)) for _ in layer.bounds] for layer in layers}
    return Prepared(sent, shape, dtype)
