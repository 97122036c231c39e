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
from questlib.kernels.sums import add_products, row_sums, window_sums

MIDDLE = 128  # the zero point of carried values as unsigned bytes


class Geometry(NamedTuple):
    """Of a convolution; None stands for a linear layer."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Packed(NamedTuple):
    """Weights of a part as `multiply` takes them."""

    data: torch.Tensor  # opaque; in the reference engine the int8 weights themselves
    exact: bool  # whether `data` is for the reference engine
    window: tuple[int, ...]  # height and width of a convolution's kernel; () of a linear layer
    scale: torch.Tensor  # float32 [O]
    zeros: torch.Tensor  # int64 [O]: weight zero points, which the kernels ask for
    compensation: torch.Tensor | None  # float32 [O], compensation * scale; None: all zero
    scales: dict[float, torch.Tensor]  # base * scale by base, filled when first asked for

    def scale_by(self, base: float) -> torch.Tensor:
        """base * scale, float32 [O]."""
        if base not in self.scales:
            self.scales[base] = self.scale * base
        return self.scales[base]


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
    zeros = torch.zeros(len(w), dtype=torch.int64)
    compensation = None if part.compensation is None else part.compensation * part.scale
    if exact:
        data = w
    elif geometry is None:
        # A strided view would be read wrongly, without an error: [N, K] must be contiguous.
        data = torch.ops.onednn.qlinear_prepack(w.contiguous(), list(shape))
    else:
        data = torch.ops.onednn.qconv_prepack(
            w.contiguous(), torch.ones(len(w)), 1.0, MIDDLE, *geometry, list(shape)
        )
    return Packed(data, exact, tuple(w.shape[2:]), part.scale, zeros, compensation, {})


def multiply(
    x: torch.Tensor,
    zero: int,
    base: float,
    w: Packed,
    geometry: Geometry | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """base * scale_o * sum (x - zero) w + bias, summed in int32.

    Args:
        x: uint8 [..., K] or [B, C, H, W].
        zero: the zero point of x.
        base: of the activation's grid.
        w: from `prepack` with the same geometry.
        geometry: of the convolution; None for a linear layer.
        bias: float32 [O].
        dtype: of the result.
    """
    scale = w.scale_by(base)
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
    return y


def input_sums(
    x: torch.Tensor, zero: int, w: Packed, geometry: Geometry | None, compiled: bool
) -> torch.Tensor:
    """sum (x - zero) of what each output sees, exactly: int32 or int64 [..., 1] or [B, G, H', W'].

    Args:
        x: uint8 [..., K] or [B, C, H, W].
        zero: the zero point of x.
        w: the weights; of them only the window counts.
        geometry: of the convolution, which has G groups; None for a linear layer.
        compiled: whether the compiled kernels sum.
    """
    if geometry is None:
        return row_sums(x, zero) if compiled else (x.int() - zero).sum(-1, keepdim=True)
    stride, padding, dilation, groups = geometry
    if compiled and groups == 1:
        return window_sums(x, zero, w.window, stride, padding, dilation)
    a = x.double().sub_(zero)
    ones = a.new_ones(groups, x.shape[1] // groups, *w.window)
    return F.conv2d(a, ones, None, *geometry).long()


def compensate(
    y: torch.Tensor,
    x: torch.Tensor,
    zero: int,
    base: float,
    w: Packed,
    geometry: Geometry | None,
    compiled: bool,
) -> torch.Tensor:
    """y + base * scale_o * compensation_o * sum (x - zero), in float32 operations, as y's type.

    y is what `multiply` returned for the same arguments.
    """
    if w.compensation is None:
        return y
    sums = input_sums(x, zero, w, geometry, compiled)
    if compiled and (geometry is None or geometry.groups == 1):
        return add_products(y, sums, base, w.compensation)
    return (y.float() + along_outputs(sums.float() * base, w.compensation, geometry)).to(y.dtype)


def along_outputs(
    sums: torch.Tensor, factor: torch.Tensor, geometry: Geometry | None
) -> torch.Tensor:
    """sums * factor_o for each output: [..., O] or [B, O, H', W'].

    Args:
        sums: [..., 1] or [B, G, H', W'].
        factor: [O].
        geometry: of the convolution, which has G groups; None for a linear layer.
    """
    if geometry is None:
        return sums * factor
    outputs = len(factor) // geometry.groups  # of a group
    return sums.repeat_interleave(outputs, 1) * factor[:, None, None]


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
