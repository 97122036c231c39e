"""Sums of an activation's bytes under a product's window, and what they add (`sums.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from questlib.kernels.library import call


class Window(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "height", "width", "channels"),
            *("out_height", "out_width"),
            *("kernel_height", "kernel_width"),
            *("stride_height", "stride_width"),
            *("padding_height", "padding_width"),
            *("dilation_height", "dilation_width"),
        )
    ]


def row_sums(x: torch.Tensor, zero: int) -> torch.Tensor:
    """int32 [..., 1]: the sum of x - zero over each row of uint8 [..., K]."""
    rows = x.numel() // x.shape[-1]
    image = (rows, 1, 1, x.shape[-1])
    return _sums(x, image, (1, 1), zero, (1, 1), (1, 1), (0, 0), (1, 1)).view(*x.shape[:-1], 1)


def window_sums(
    x: torch.Tensor,
    zero: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """int32 [B, 1, H', W']: the sum of x - zero under a convolution's window.

    Args:
        x: uint8 [B, C, H, W], channels_last.
        zero: what counts nothing; padding likewise.
        kernel: height and width of the window; so for the others.
        stride: of the convolution.
        padding: likewise.
        dilation: likewise.
    """
    batch, channels, *size = x.shape
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    image = (batch, *size, channels)
    return _sums(x, image, out, zero, kernel, stride, padding, dilation).view(batch, 1, *out)


def _sums(
    x: torch.Tensor,
    image: Sequence[int],
    out: Sequence[int],
    zero: int,
    *window: Sequence[int],
) -> torch.Tensor:
    pixels = torch.empty(image[:3], dtype=torch.int32)
    sums = torch.empty(image[0], *out, dtype=torch.int32)
    if sums.numel():
        of = Window(*image, *out, *(n for pair in window for n in pair))
        call("window_sums", x, of, zero, pixels, sums)
    return sums


def add_products(
    y: torch.Tensor, sums: torch.Tensor, base: float, factor: torch.Tensor
) -> torch.Tensor:
    """y + float(sums) * base * factor in place, each operation rounded to float32.

    Args:
        y: float32 or bfloat16 [..., O], or [B, O, H, W] in channels_last.
        sums: int32 of each row or pixel.
        base: a factor of all.
        factor: float32 [O].
    """
    if y.numel():
        rows = sums.numel()
        half = int(y.dtype == torch.bfloat16)
        sizes = (ctypes.c_int64(rows), ctypes.c_int64(len(factor)))
        call("add_products", y, half, sums, float(base), factor, *sizes)
    return y
