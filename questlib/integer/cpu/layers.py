"""The CPU engine: quantized layers on oneDNN's int8 kernels (torch.ops.onednn), weights prepacked once, exact on every ISA.

Activations travel as unsigned bytes (signed ones fall to a reference kernel thousands of times slower): a uniform code as it is,
with its zero point; a carried value as a + 128 with zero point 128. Both are undone by the kernel, in int32.
Weights travel as signed bytes. CPUs without VNNI add pairs of products in int16, which can saturate; there, layers that could are
split into two nibbles (w = 16 w_high + w_low), twice the work and exact. `saturates` finds out by trying.

The kernels rescale as acc * (base * scale) + bias, in float32; the scales are multiplied here, because kernels differ in which
product they take first (VNNI acc * base, AMX base * scale). The same layers with float64 products of the same integers and that
same epilogue are the "reference" engine: slow, on any machine, and bit for bit equal.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from questlib.errors import EngineError
from questlib.integer.form import Grid, IntegerForm, Part, group_in_force
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.token_grid import token_grid

MIDDLE = 128
INT16 = 2**15 - 1


class Geometry(NamedTuple):
    """Of a convolution; None stands for a linear layer."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Packed(NamedTuple):
    """Weights of a part, prepacked: `rows` outputs, the last one all ones (it sums the activations) when there is an offset."""

    data: torch.Tensor  # opaque; in the reference engine the int8 weights themselves
    exact: bool  # whether `data` is for the reference engine
    scale: torch.Tensor  # float32 [rows]
    zeros: torch.Tensor  # int64 [rows]: the kernels' weight zero points, unused
    offset: (
        torch.Tensor | None
    )  # float32, offset * scale, shaped to broadcast over the output; None: no row of ones


def prepack(part: Part, geometry: Geometry | None, rows: int = 1, exact: bool = False) -> Packed:
    """rows: of the activations that a linear layer's weights are laid out for, a hint."""
    w, scale, offset = part.weight, part.scale, None
    if part.offset is not None:
        offset = (part.offset * scale).reshape(-1, *[1] * (w.ndim - 2))  # [O] or [O, 1, 1]
        w, scale = torch.cat([w, torch.ones_like(w[:1])]), torch.cat([scale, torch.ones(1)])
    zeros = torch.zeros(len(w), dtype=torch.int64)
    if exact:
        return Packed(w, True, scale, zeros, offset)
    if geometry is None:
        # a strided view would be read wrongly, without an error: [N, K] must be contiguous
        data = torch.ops.onednn.qlinear_prepack(w.contiguous(), [rows, w.shape[1]])
        return Packed(data, False, scale, zeros, offset)
    g = geometry
    args = (
        w.contiguous(),
        torch.ones(len(w)),
        1.0,
        MIDDLE,
        g.stride,
        g.padding,
        g.dilation,
        g.groups,
        None,
    )
    return Packed(torch.ops.onednn.qconv_prepack(*args), False, scale, zeros, offset)


def multiply(
    x: torch.Tensor,
    zero: int,
    base: float,
    w: Packed,
    geometry: Geometry | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """uint8 x [..., K] or [B, C, H, W] -> base * scale_o * sum (x - zero) (w + offset_o) + bias, in `dtype`; int32 inside."""
    if w.offset is not None and bias is not None:
        bias = torch.cat([bias, bias.new_zeros(1)])
    scale = w.scale * base
    if w.exact:
        y = multiply_exactly(x, zero, scale, w, geometry, bias, dtype)
    elif geometry is None:
        y = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, zero, w.data, scale, w.zeros, bias, 1.0, 0, dtype, "none", [], ""
        )
    else:
        g = geometry
        shape = (g.stride, g.padding, g.dilation, g.groups)
        y = torch.ops.onednn.qconv2d_pointwise(
            x, 1.0, zero, w.data, scale, w.zeros, bias, *shape, 1.0, 0, dtype, "none", [], ""
        )
    if w.offset is None:
        return y
    dim, last = -1 if geometry is None else 1, len(w.scale) - 1
    return torch.addcmul(y.narrow(dim, 0, last), y.narrow(dim, last, 1), w.offset.to(dtype))


def multiply_exactly(
    x: torch.Tensor,
    zero: int,
    scale: torch.Tensor,
    w: Packed,
    geometry: Geometry | None,
    bias,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What oneDNN's kernels compute: float64 holds the int32 sums exactly; the epilogue is theirs, operation by operation."""
    a = x.double().sub_(zero)
    if geometry is None:
        acc, shape = a @ w.data.double().T, (-1,)
    else:
        acc, shape = F.conv2d(a, w.data.double(), None, *geometry), (-1, 1, 1)
    y = acc.float().mul_(scale.reshape(shape))
    return (y if bias is None else y.add_(bias.reshape(shape))).to(dtype)


@functools.cache
def saturates() -> bool:
    """Whether oneDNN's int8 products saturate at full range here. EngineError where its kernels are missing or inexact."""
    if (
        not hasattr(torch.ops.onednn, "qlinear_pointwise")
        or not torch.backends.mkldnn.is_available()
    ):
        raise EngineError(
            "engine cpu needs torch with oneDNN's int8 kernels (torch.ops.onednn.qlinear_pointwise): not in this build"
        )
    x, one = torch.full((16, 64), 255, dtype=torch.uint8), torch.ones(16)
    small = Part(0, 64, torch.full((16, 64), 15, dtype=torch.int8), None, one)
    large = small._replace(weight=torch.full((16, 64), 127, dtype=torch.int8))
    geometry = Geometry([1, 1], [1, 1], [1, 1], 1)
    sums = []
    for part in (small, large):
        taps = part._replace(weight=part.weight[:, :, None, None].expand(-1, -1, 3, 3).contiguous())
        image = (
            x[:1, :, None, None].expand(1, -1, 3, 3).contiguous(memory_format=torch.channels_last)
        )
        linear = multiply(x, 0, 1.0, prepack(part, None, 16), None, None, torch.float32)
        conv = multiply(image, 0, 1.0, prepack(taps, geometry), geometry, None, torch.float32)
        product = 255.0 * int(part.weight[0, 0]) * 64
        sums.append(
            bool((linear == product).all()) and bool((conv[:, :, 1, 1] == 9 * product).all())
        )
    if not sums[0]:
        raise EngineError("engine cpu: oneDNN's int8 kernels gave wrong sums on this machine")
    return not sums[1]


def nibbles(part: Part) -> tuple[Part, Part]:
    """w = 16 w_high + w_low: two parts of the same channels whose products cannot saturate."""
    high, low = part.weight >> 4, part.weight & 15
    return part._replace(weight=high, offset=None, scale=part.scale * 16), part._replace(weight=low)


def send(x: torch.Tensor, grid: Grid, dim: int, inplace: bool = False) -> tuple[torch.Tensor, int]:
    """x float [..., C at dim, ...] -> (uint8, zero point), by fake quantization's own formula: round(x * inverse), clamped.

    inplace: x is float32 and may be overwritten, which saves fresh memory, the dearest part of large products.
    """
    if grid.uniform:
        zero = -int(grid.low)
        # x * tensor, not x * float: the product is float32 for any x
        codes = x.mul_(grid.inverse) if inplace else x * grid.inverse
        codes = codes.round_().clamp_(float(grid.low), float(grid.high)).add_(zero - MIDDLE)
        return codes.to(torch.int8).view(torch.uint8).bitwise_xor_(
            MIDDLE
        ), zero  # float -> uint8 is slow: by way of int8
    shape = [1] * x.ndim
    shape[dim] = -1
    inverse, low, high, multiplier = (
        v.reshape(shape) for v in (grid.inverse, grid.low, grid.high, grid.multiplier)
    )
    codes = (
        (x * inverse)
        .round_()
        .clamp_(low.float(), high.float())
        .to(torch.int8)
        .mul_(multiplier.to(torch.int8))
    )
    return codes.view(torch.uint8).bitwise_xor_(MIDDLE), MIDDLE


def send_tokens(x: torch.Tensor, grid: Grid, dim: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """As `send`, each token on the grid of its own range: (uint8, zero point, scale float32 with one entry where x has C)."""
    shape = [1] * x.ndim
    shape[dim] = -1
    inverse = grid.inverse.reshape(shape)
    own = token_grid(x * inverse, grid.token.clip, grid.token.bits, dim)
    high = 2**grid.token.bits - 1 - own.zero_point
    codes = (x * (own.inverse * inverse)).round_().clamp_(-own.zero_point, high).to(torch.int8)
    if not grid.uniform:
        codes = codes.mul_(grid.multiplier.reshape(shape).to(torch.int8))
    return codes.view(torch.uint8).bitwise_xor_(MIDDLE), MIDDLE, own.scale


def check_finite(x: torch.Tensor, name: str) -> None:
    """EngineError on NaN or infinity, which no integer code stands for. The sum is one cheap pass; it decides nothing alone."""
    if not torch.isfinite(x.sum(dtype=torch.float32)) and not torch.isfinite(x).all():
        raise EngineError(f"{name}: the input has NaN or infinite values")


class CpuLayer(nn.Module):
    """A Linear or Conv2d in integers. Input and output as the layer it replaces; output in the input's dtype, channels_last."""

    def __init__(
        self, form: IntegerForm, steps: StepGroups, exact: bool = False, split: bool | None = None
    ) -> None:
        """exact: the reference engine. split: into nibbles, where products could saturate; None: if this machine needs it."""
        super().__init__()
        self.name, self.format, self.bias, self.grids = (
            form.name,
            form.format,
            form.bias,
            form.grids,
        )
        self.__dict__["steps"] = steps
        layer = form.layer
        conv = isinstance(layer, nn.Conv2d)
        self.geometry = None
        if conv:
            self.geometry = Geometry(
                list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
            )
        self.dim, self.shape, self.token = (
            (1, (-1, 1, 1), form.token) if conv else (-1, (-1,), form.token)
        )
        parts: list[tuple[Part, int]] = []
        self.engine = "reference" if exact else "cpu-int8"
        for i, part in enumerate(form.parts):
            # bytes as sent: codes up to 2^bits - 1, or carried values up to 128 + limit
            top = max(
                2**form.act_bits - 1 if g[i].uniform and not form.token else MIDDLE + g[i].limit
                for g in form.grids
            )
            risk = 2 * top * int(part.weight.int().abs().max()) > INT16
            if risk and not exact and (saturates() if split is None else split):
                parts += [(p, i) for p in nibbles(part)]
                self.engine = "cpu-int8-split"
            else:
                parts.append((part, i))
        self.parts = [
            (p.start, p.stop, i, prepack(p, self.geometry, exact=exact)) for p, i in parts
        ]
        self.packed_bytes = form.packed_bytes
        self.resident_bytes = sum(p.weight.numel() for p, _ in parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.grids[group_in_force(self.steps, self.name)]
        check_finite(x, self.name)
        native = (
            x.dtype in (torch.float32, torch.bfloat16) and len(self.parts) == 1 and not self.token
        )
        dtype = x.dtype if native else torch.float32
        out, sent = None, {}
        for start, stop, i, packed in self.parts:
            if i not in sent:
                sent[i] = self._sent(
                    x if len(group) == 1 else x.narrow(self.dim, start, stop - start), group[i]
                )
            codes, zero, scale = sent[i]
            bias = self.bias if out is None else None
            y = multiply(
                codes,
                zero,
                group[i].base,
                packed,
                self.geometry,
                None if self.token else bias,
                dtype,
            )
            if self.token:
                y = y * scale if bias is None else torch.addcmul(bias.reshape(self.shape), y, scale)
            out = y if out is None else out.add_(y)
        return out.to(x.dtype)

    def _sent(self, x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        codes, zero, scale = (
            send_tokens(x, grid, self.dim) if self.token else (*send(x, grid, self.dim), None)
        )
        layout = torch.contiguous_format if self.geometry is None else torch.channels_last
        return codes.contiguous(memory_format=layout), zero, scale

    @torch.no_grad()
    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """int64 [..., O] or [B, O, H', W'] of each part as the kernels made them, exact below 2^24: float32 carries them."""
        group, found = self.grids[group_in_force(self.steps, self.name)], {}
        for start, stop, i, packed in self.parts:
            codes, zero, _ = self._sent(
                x if len(group) == 1 else x.narrow(self.dim, start, stop - start), group[i]
            )
            plain = packed._replace(scale=torch.ones_like(packed.scale), offset=None)
            y = (
                multiply(codes, zero, 1.0, plain, self.geometry, None, torch.float32)
                .movedim(self.dim, -1)
                .long()
            )
            if packed.offset is not None:
                y = (
                    y[..., :-1]
                    + (packed.offset.flatten() / packed.scale[:-1]).round().long() * y[..., -1:]
                )
            # the high nibbles come first
            found[i] = y if i not in found else found[i] * 16 + y
        return [y.movedim(-1, self.dim) for y in found.values()]
