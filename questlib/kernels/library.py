"""The compiled kernels as functions of tensors."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import NamedTuple

import torch

from questlib.kernels.compiler import NoCompilerError, compiled

SWITCH = "QUEST_NO_KERNELS"  # any value: torch's operations are used everywhere
FLOATS = ctypes.c_void_p


class Layout(ctypes.Structure):
    """How a quantizer's parameters lie over an activation [outer, repeat, channels, inner].

    They vary along outer and channels, and are the same along repeat and inner.
    """

    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "repeat", "channels", "inner")]


class Kernels(NamedTuple):
    """The kernels, or why there are none."""

    library: ctypes.CDLL | None
    reason: str | None


@cache
def kernels() -> Kernels:
    """The kernels of this machine; they are compiled when they are first asked for.

    Example:
        >>> from questlib.kernels.library import kernels
        >>> kernels().reason  # None: they are there
    """
    if os.environ.get(SWITCH):
        return Kernels(None, f"${SWITCH} is set")
    try:
        library = ctypes.CDLL(str(compiled()))
    except NoCompilerError as error:
        return Kernels(None, str(error))
    except OSError as error:
        return Kernels(None, f"the compiled kernels cannot be loaded: {error}")
    for name, tensors in (("fake_quant", 6), ("fake_quant_gradient", 7)):
        function = getattr(library, name)
        function.argtypes = [*[FLOATS] * tensors, Layout, ctypes.c_int]
        function.restype = None
    return Kernels(library, None)


def serves(*tensors: torch.Tensor) -> bool:
    """Whether kernels can take these tensors: float32, contiguous, on the CPU, and not empty."""
    return all(
        x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and x.numel() for x in tensors
    )


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
        varies = own == n
        # outer and channels vary, repeat and inner do not: go on to the next place that fits
        while place % 2 == (0 if not varies else 1):
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
    if kernels().library is None or not serves(x):
        return None
    shape = torch.broadcast_shapes(scale.shape, zero_point.shape, inverse.shape)
    found = layout(x.shape, shape)
    if found is None:
        return None
    low = -zero_point
    own = (scale, inverse, low, low + (2**bits - 1))
    tensors = [value.expand(shape).contiguous() for value in own]
    return Parameters(*tensors, found) if serves(*tensors) else None


def fake_quant(x: torch.Tensor, own: Parameters) -> torch.Tensor:
    """clamp(round(x * inverse), low, high) * scale, in one pass."""
    out = torch.empty_like(x)
    _call("fake_quant", x, own.scale, own.inverse, own.low, own.high, out, at=own.layout)
    return out


def fake_quant_gradient(
    x: torch.Tensor, grad: torch.Tensor, own: Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """LSQ's gradients of `fake_quant` in one pass: with respect to x, and to the scale.

    The second has the parameters' shape.
    """
    grad_x = torch.empty_like(x)
    grad_scale = torch.empty_like(own.scale)
    tensors = (x, grad, own.inverse, own.low, own.high, grad_x, grad_scale)
    _call("fake_quant_gradient", *tensors, at=own.layout)
    return grad_x, grad_scale


def _call(name: str, *tensors: torch.Tensor, at: Layout) -> None:
    # ctypes releases the GIL meanwhile
    function = getattr(kernels().library, name)
    function(*(x.data_ptr() for x in tensors), at, torch.get_num_threads())
