"""Fake quantization and LSQ's gradient on the CPU, in one pass each (`fake_quant.cpp`)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from questlib.kernels.library import call, kernels

LEAST = 2**16  # values below which a call costs more than torch's operations


class Layout(ctypes.Structure):
    """How a quantizer's parameters lie over an activation [outer, repeat, channels, inner].

    They vary along outer and channels, and are the same along repeat and inner.
    """

    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "repeat", "channels", "inner")]


def layout(shape: torch.Size, parameters: torch.Size) -> Layout | None:
    """How parameters of one shape lie over an activation of another; None: no such layout.

    Args:
        shape: of the activation.
        parameters: of the parameters, which broadcast over it, with as many dimensions.
    """
    if len(parameters) != len(shape):
        return None
    sizes = [1, 1, 1, 1]
    place = 0
    for n, own in zip(shape, parameters, strict=True):
        if n == 1:
            continue
        if own not in (1, n):
            return None
        # outer and channels vary, repeat and inner do not: go on to the next place that fits
        while place % 2 != int(own == 1):
            place += 1
        if place > 3:
            return None
        sizes[place] *= n
    if sizes[2:] == [1, 1]:  # nothing varies behind what repeats: each outer one is one row
        sizes = [sizes[0], 1, 1, sizes[1]]
    return Layout(*sizes)


class Parameters(NamedTuple):
    """A quantizer's parameters as the kernels take them, and their layout over an activation."""

    scale: torch.Tensor
    inverse: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    layout: Layout


def parameters_over(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    inverse: torch.Tensor,
    bits: int,
) -> Parameters | None:
    """The parameters for the kernels, or None where torch's operations have to do it.

    Args:
        x: the activation.
        scale: broadcasts over x, as do the others.
        zero_point: whole numbers.
        inverse: 1 / scale.
        bits: of the codes.
    """
    if x.numel() < LEAST or not _serves(x, scale, zero_point, inverse):
        return None
    if not x.is_contiguous() or kernels().library is None:
        return None
    shape = torch.broadcast_shapes(scale.shape, zero_point.shape, inverse.shape)
    found = layout(x.shape, shape)
    if found is None:
        return None
    low = -zero_point
    high = low + (2**bits - 1)
    s, inv, lo, hi = (v.detach().expand(shape).contiguous() for v in (scale, inverse, low, high))
    return Parameters(s, inv, lo, hi, found)


def _serves(*tensors: torch.Tensor) -> bool:
    """Whether all are float32 in the CPU's memory."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def fake_quant(x: torch.Tensor, own: Parameters) -> torch.Tensor:
    """clamp(round(x * inverse), low, high) * scale."""
    out = torch.empty_like(x)
    call("fake_quant", x, own.scale, own.inverse, own.low, own.high, out, own.layout)
    return out


def fake_quant_gradient(
    x: torch.Tensor, grad: torch.Tensor, own: Parameters, of_scale: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """LSQ's gradients of `fake_quant`, like x each: by x, and by each value's scale.

    Args:
        x: the activation.
        grad: of the loss, by `fake_quant`'s result.
        own: the parameters.
        of_scale: whether the second is asked for.
    """
    grad = grad.contiguous()
    grad_x = torch.empty_like(x)
    slope = torch.empty_like(x) if of_scale else None
    call("fake_quant_gradient", x, grad, own.inverse, own.low, own.high, grad_x, slope, own.layout)
    return grad_x, slope
