"""Products of bytes on the CPU by oneDNN's int8 kernels (torch.ops.onednn), exact on every ISA.

Activations travel as unsigned bytes; signed ones fall to a kernel thousands of times slower.
Weights travel as signed bytes, prepacked once. CPUs without VNNI add pairs of products in int16,
which can saturate: `saturates` finds out by trying, and `nibbles` gives the exact way round it.

The kernels rescale as acc * (base * scale) + bias, in float32. The two scales are multiplied here,
because kernels differ in which product they take first (VNNI acc * base, AMX base * scale).
`multiply_exactly` computes the same by float64 products of the same integers: slow, on any machine,
and equal bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from questlib.errors import EngineError
from questlib.integer.form import WeightPart

MIDDLE = 128  # the zero point of carried values as unsigned bytes


class Geometry(NamedTuple):
    """Of a convolution; None stands for a linear layer."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Packed(NamedTuple):
    """Weights of a part as `multiply` takes them.

    With a compensation the last row is all ones: it sums the activations.
    """

    data: torch.Tensor  # opaque; in the reference engine the int8 weights themselves
    exact: bool  # whether `data` is for the reference engine
    scale: torch.Tensor  # float32 [rows]
    zeros: torch.Tensor  # int64 [rows]: weight zero points, which the kernels ask for
    # float32, compensation * scale, broadcastable over the output; None: there is no row of ones
    compensation: torch.Tensor | None


def prepack(
    part: WeightPart, geometry: Geometry | None, shape: Sequence[int], exact: bool = False
) -> Packed:
    """Lay out a part's weights for `multiply`.

    oneDNN lays weights out for one shape of activations. For another shape it changes the layout at
    each call, which can take half as long as the product: a convolution of 1280 channels takes
    20 ms, and its weights another 16.

    Args:
        part: the weights.
        geometry: of the convolution; None for a linear layer.
        shape: of the activations that are to come, [rows, K] or [B, C, H, W].
        exact: whether for the reference engine.
    """
    w = part.weight
    scale = part.scale
    compensation = None
    if part.compensation is not None:
        compensation = part.compensation * scale
        compensation = compensation.reshape(-1, *[1] * (w.ndim - 2))  # [O] or [O, 1, 1]
        w = torch.cat([w, torch.ones_like(w[:1])])
        scale = torch.cat([scale, torch.ones(1)])
    zeros = torch.zeros(len(w), dtype=torch.int64)
    if exact:
        data = w
    elif geometry is None:
        # A strided view would be read wrongly, without an error: [N, K] must be contiguous.
        data = torch.ops.onednn.qlinear_prepack(w.contiguous(), list(shape))
    else:
        data = torch.ops.onednn.qconv_prepack(
            w.contiguous(), torch.ones(len(w)), 1.0, MIDDLE, *geometry, list(shape)
        )
    return Packed(data, exact, scale, zeros, compensation)


def multiply(
    x: torch.Tensor,
    zero: int,
    base: float,
    w: Packed,
    geometry: Geometry | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """base * scale_o * sum (x - zero) (w + compensation_o) + bias, summed in int32.

    Args:
        x: uint8 [..., K] or [B, C, H, W].
        zero: the zero point of x.
        base: of the activation's grid.
        w: from `prepack` with the same geometry.
        geometry: of the convolution; None for a linear layer.
        bias: float32 [O].
        dtype: of the result.
    """
    if w.compensation is not None and bias is not None:
        bias = torch.cat([bias, bias.new_zeros(1)])
    scale = w.scale * base
    if w.exact:
        y = multiply_exactly(x, zero, scale, w, geometry, bias, dtype)
    else:
        # x's own scale is 1. So is the output's, with zero point 0 and nothing fused behind it.
        before = (x, 1.0, zero, w.data, scale, w.zeros, bias)
        shape = geometry or ()
        product = (
            torch.ops.onednn.qlinear_pointwise
            if geometry is None
            else torch.ops.onednn.qconv2d_pointwise
        )
        y = product(*before, *shape, 1.0, 0, dtype, "none", [], "")
    if w.compensation is None:
        return y
    dim = -1 if geometry is None else 1
    last = len(w.scale) - 1
    sums = y.narrow(dim, last, 1)
    return torch.addcmul(y.narrow(dim, 0, last), sums, w.compensation.to(dtype))


def multiply_exactly(
    x: torch.Tensor,
    zero: int,
    scale: torch.Tensor,
    w: Packed,
    geometry: Geometry | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What oneDNN's kernels compute, without them.

    float64 holds the int32 sums exactly; the epilogue is the kernels', operation by operation.
    """
    a = x.double().sub_(zero)
    if geometry is None:
        acc = a @ w.data.double().T
        shape: tuple[int, ...] = (-1,)
    else:
        acc = F.conv2d(a, w.data.double(), None, *geometry)
        shape = (-1, 1, 1)
    y = acc.float().mul_(scale.reshape(shape))
    return (y if bias is None else y.add_(bias.reshape(shape))).to(dtype)


@functools.cache
def saturates() -> bool:
    """Whether oneDNN's int8 products saturate here when both operands use their full range.

    Raises:
        EngineError: the kernels are missing, or inexact even for small operands.
    """
    kernels = hasattr(torch.ops.onednn, "qlinear_pointwise")
    if not kernels or not torch.backends.mkldnn.is_available():
        raise EngineError(
            "engine cpu needs torch with oneDNN's int8 kernels "
            "(torch.ops.onednn.qlinear_pointwise): not in this build"
        )
    if not _exact_with(15):
        raise EngineError("engine cpu: oneDNN's int8 kernels gave wrong sums on this machine")
    return not _exact_with(127)


def _exact_with(weight: int) -> bool:
    """Whether a linear layer and a convolution of 255s and this weight are exact."""
    x = torch.full((16, 64), 255, dtype=torch.uint8)
    w = torch.full((16, 64), weight, dtype=torch.int8)
    part = WeightPart(0, 64, w, None, torch.ones(16), torch.zeros(64, dtype=torch.int64))
    linear = multiply(x, 0, 1.0, prepack(part, None, x.shape), None, None, torch.float32)

    geometry = Geometry([1, 1], [1, 1], [1, 1], 1)
    taps = part._replace(weight=w[:, :, None, None].expand(-1, -1, 3, 3).contiguous())
    image = x[:1, :, None, None].expand(1, -1, 3, 3)
    image = image.contiguous(memory_format=torch.channels_last)
    conv = multiply(
        image, 0, 1.0, prepack(taps, geometry, image.shape), geometry, None, torch.float32
    )

    total = 255.0 * weight * 64
    return bool((linear == total).all()) and bool((conv[:, :, 1, 1] == 9 * total).all())


def nibbles(part: WeightPart) -> tuple[WeightPart, WeightPart]:
    """w = 16 w_high + w_low: two parts of the same channels whose products cannot saturate."""
    high = part.weight >> 4
    low = part.weight & 15
    return (
        part._replace(weight=high, compensation=None, scale=part.scale * 16),
        part._replace(weight=low),
    )
