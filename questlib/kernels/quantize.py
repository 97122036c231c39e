"""Activations as bytes, in one pass (`quantize.cpp`)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from questlib.kernels.library import call


class View(ctypes.Structure):
    """An activation [batch, pixels, channels]; neighbours lie along pixels or channels."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "pixels", "channels"),
            *("batch_stride", "pixel_stride", "channel_stride"),
        )
    ]


class Pointers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("inverse", "low", "high", "multiplier")]


class Table(NamedTuple):
    """A grid of each channel, or one for all: a = clamp(round(x * inverse), low, high) * m."""

    inverse: torch.Tensor  # float32 [C] or [1], like the others
    low: torch.Tensor
    high: torch.Tensor
    multiplier: torch.Tensor

    @property
    def uniform(self) -> bool:
        return len(self.inverse) == 1

    def pointers(self) -> Pointers:
        return Pointers(*(x.data_ptr() for x in self))


def table(
    inverse: torch.Tensor, low: torch.Tensor, high: torch.Tensor, multiplier: torch.Tensor | None
) -> Table:
    """The table of a grid, whose entries broadcast against each other."""
    m = torch.ones(1) if multiplier is None else multiplier
    columns = torch.broadcast_tensors(inverse, low, high, m)
    return Table(*(x.float().contiguous() for x in columns))


class TokenRule(NamedTuple):
    """How the range of a token becomes its grid (`questlib.quantization.token_grid`)."""

    inverse_clip: float  # 1 / clip
    unit_clip: float  # clip / (2^bits - 1)
    levels: float  # 2^bits - 1
    least: float  # the smallest range


def quantize(
    x: torch.Tensor, own: Table, offset: int, dim: int, token: TokenRule | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """clamp(round(x * inverse), low, high) * multiplier + offset, as bytes.

    Args:
        x: float [..., C] or [B, C, H, W], on the CPU.
        own: the grid.
        offset: added to the integers, so that they fit a byte.
        dim: of the channels: -1, or 1 of an image.
        token: the rule, where each token has a grid of its own.

    Returns:
        uint8 like x, an image in channels_last; the tokens' scales, float32 with one entry where x
        has channels, or None; whether all of x is finite.
    """
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    image = dim == 1
    layout = torch.channels_last if image else torch.contiguous_format
    out = torch.empty(x.shape, dtype=torch.uint8, memory_format=layout)
    scales = None
    if token is not None:
        scales = torch.empty([1 if i == dim % x.ndim else n for i, n in enumerate(x.shape)])
    if not x.numel():
        return out, scales, True
    view = _view(x, image, rows=token is not None)
    if view is None:
        x = x.contiguous(memory_format=layout)
        view = _view(x, image, rows=True)
    arguments = (view, own.pointers(), int(own.uniform))
    half = int(x.dtype == torch.bfloat16)
    if token is None:
        finite = call("quantize", x, half, out, *arguments, offset)
    else:
        finite = call("quantize_tokens", x, half, out, scales, *arguments, *token, offset)
    return out, scales, bool(finite)


def _view(x: torch.Tensor, image: bool, rows: bool) -> View | None:
    """How x lies in memory; None where a kernel cannot read it so.

    Args:
        x: the activation.
        image: whether it is [B, C, H, W].
        rows: whether channels must be neighbours.
    """
    if image:
        batch, channels, height, width = x.shape
        if height > 1 and x.stride(2) != width * x.stride(3):
            return None
        view = View(batch, height * width, channels, x.stride(0), x.stride(3), x.stride(1))
    elif x.ndim == 3:
        view = View(*x.shape, *x.stride())
    else:
        channels = x.shape[-1]
        if not x.is_contiguous():
            return None
        view = View(1, x.numel() // channels, channels, 0, channels, 1)
    planes = view.pixel_stride == 1 and not rows
    return view if view.channel_stride == 1 or planes else None
