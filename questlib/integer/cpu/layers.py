"""Quantized layers on the CPU: the activation is sent as bytes, multiplied, and rescaled.

A uniform code travels as it is, with its zero point; a carried value a travels as a + 128 with zero
point 128. Both are undone by the kernel, in int32 (`products`). Weights whose products could
saturate on this machine are split into two nibbles, at twice the work.
"""

from __future__ import annotations

import torch
from torch import nn

from questlib.errors import EngineError
from questlib.integer.cpu.products import (
    MIDDLE,
    Geometry,
    multiply,
    nibbles,
    prepack,
    saturates,
)
from questlib.integer.form import Grid, IntegerForm, WeightPart, group_in_force
from questlib.integer.modules import IntegerLayer
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.token_grid import token_grid

INT16 = 2**15 - 1

Sent = tuple[torch.Tensor, int, torch.Tensor | None]  # uint8 codes, zero point, scale of tokens


def send(x: torch.Tensor, grid: Grid, dim: int, inplace: bool = False) -> tuple[torch.Tensor, int]:
    """Quantize to bytes by fake quantization's own formula: round(x * inverse), clamped.

    Args:
        x: float, with the channels at `dim`.
        grid: not a grid a token.
        dim: of the channels.
        inplace: whether x, in float32, may be overwritten. That saves fresh memory, the dearest
            part of large products.

    Returns:
        uint8 like x, and its zero point.
    """
    if grid.uniform:
        zero = -int(grid.low)
        # x * tensor, not x * float: the product is float32 for any x
        codes = x.mul_(grid.inverse) if inplace else x * grid.inverse
        codes = codes.round_().clamp_(float(grid.low), float(grid.high)).add_(zero - MIDDLE)
        # by way of int8: from float straight to uint8 is slow
        return _unsigned(codes.to(torch.int8)), zero
    codes = x * _along(grid.inverse, x, dim)
    low = _along(grid.low, x, dim).float()
    high = _along(grid.high, x, dim).float()
    codes = codes.round_().clamp_(low, high).to(torch.int8)
    return _unsigned(codes.mul_(_multiplier(grid, x, dim))), MIDDLE


def send_tokens(x: torch.Tensor, grid: Grid, dim: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """As `send`, each token on the grid of its own range.

    Returns:
        uint8 like x, the zero point, and the scale float32, with one entry where x has channels.
    """
    assert grid.token is not None
    inverse = _along(grid.inverse, x, dim)
    own = token_grid(x * inverse, grid.token.clip, grid.token.bits, dim)
    high = 2**grid.token.bits - 1 - own.zero_point
    codes = (x * (own.inverse * inverse)).round_().clamp_(-own.zero_point, high).to(torch.int8)
    if not grid.uniform:
        codes = codes.mul_(_multiplier(grid, x, dim))
    return _unsigned(codes), MIDDLE, own.scale


def _along(values: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """[C] or [1] -> broadcastable over x, whose channels are at `dim`."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.reshape(shape)


def _multiplier(grid: Grid, x: torch.Tensor, dim: int) -> torch.Tensor:
    assert grid.multiplier is not None
    return _along(grid.multiplier, x, dim).to(torch.int8)


def _unsigned(a: torch.Tensor) -> torch.Tensor:
    """int8 a -> uint8 a + 128, in place."""
    return a.view(torch.uint8).bitwise_xor_(MIDDLE)


def check_finite(x: torch.Tensor, name: str) -> None:
    """Check that every value has an integer code.

    Raises:
        EngineError: x has NaN or infinite values.
    """
    # The sum is one cheap pass, but it can overflow where all values are finite.
    if not torch.isfinite(x.sum(dtype=torch.float32)) and not torch.isfinite(x).all():
        raise EngineError(f"{name}: the input has NaN or infinite values")


class CpuLayer(IntegerLayer):
    """A Linear or Conv2d on the CPU; a convolution's output is channels_last.

    Args:
        form: the layer's integer form.
        steps: the UNet's step groups.
        exact: whether for the reference engine.
        split: whether weights are split into nibbles where products could saturate; None: where
            this machine needs it.
    """

    def __init__(
        self, form: IntegerForm, steps: StepGroups, exact: bool = False, split: bool | None = None
    ) -> None:
        super().__init__(form, steps)
        self.bias = form.bias
        self.grids = form.grids
        self.token = form.token
        self.geometry: Geometry | None = None
        self.dim = -1
        self.shape: tuple[int, ...] = (-1,)  # of the bias, to broadcast over the output
        layer = form.layer
        if isinstance(layer, nn.Conv2d):
            self.geometry = Geometry(
                list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
            )
            self.dim = 1
            self.shape = (-1, 1, 1)
        self.engine = "reference" if exact else "cpu-int8"
        parts: list[tuple[WeightPart, int]] = []
        for i, part in enumerate(form.parts):
            risk = 2 * _largest_byte(form, i) * int(part.weight.int().abs().max()) > INT16
            if risk and not exact and (saturates() if split is None else split):
                parts += [(nibble, i) for nibble in nibbles(part)]
                self.engine = "cpu-int8-split"
            else:
                parts.append((part, i))
        self.parts = [
            (p.start, p.stop, i, prepack(p, self.geometry, exact=exact)) for p, i in parts
        ]
        self._resident_bytes = sum(p.weight.numel() for p, _ in parts)

    @property
    def resident_bytes(self) -> int:
        return self._resident_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.grids[group_in_force(self.steps, self.name)]
        check_finite(x, self.name)
        # The kernels write bfloat16 themselves where nothing is added to their output.
        native = x.dtype in (torch.float32, torch.bfloat16)
        dtype = x.dtype if native and len(self.parts) == 1 and not self.token else torch.float32
        out: torch.Tensor | None = None
        sent: dict[int, Sent] = {}
        for start, stop, i, packed in self.parts:
            if i not in sent:
                sent[i] = self._sent(self._own(x, start, stop), group[i])
            codes, zero, scale = sent[i]
            bias = self.bias if out is None else None
            fused = None if self.token else bias
            y = multiply(codes, zero, group[i].base, packed, self.geometry, fused, dtype)
            if scale is not None:
                y = y * scale if bias is None else torch.addcmul(bias.reshape(self.shape), y, scale)
            out = y if out is None else out.add_(y)
        assert out is not None
        return out.to(x.dtype)

    @torch.no_grad()
    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """int64 [..., O] or [B, O, H', W'] of each part, as the kernels made them.

        The kernels hand them over in float32: exact below 2^24.
        """
        group = self.grids[group_in_force(self.steps, self.name)]
        found: dict[int, torch.Tensor] = {}
        for start, stop, i, packed in self.parts:
            codes, zero, _ = self._sent(self._own(x, start, stop), group[i])
            plain = packed._replace(scale=torch.ones_like(packed.scale), compensation=None)
            y = multiply(codes, zero, 1.0, plain, self.geometry, None, torch.float32)
            y = y.movedim(self.dim, -1).long()
            if packed.compensation is not None:
                compensation = packed.compensation.flatten() / packed.scale[:-1]
                y = y[..., :-1] + compensation.round().long() * y[..., -1:]
            # the high nibbles come first
            found[i] = y if i not in found else found[i] * 16 + y
        return [y.movedim(-1, self.dim) for y in found.values()]

    def _own(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The channels of a part."""
        whole = len(self.grids[0]) == 1
        return x if whole else x.narrow(self.dim, start, stop - start)

    def _sent(self, x: torch.Tensor, grid: Grid) -> Sent:
        if self.token:
            codes, zero, scale = send_tokens(x, grid, self.dim)
        else:
            codes, zero = send(x, grid, self.dim)
            scale = None
        linear = self.geometry is None
        layout = torch.contiguous_format if linear else torch.channels_last
        return codes.contiguous(memory_format=layout), zero, scale


def _largest_byte(form: IntegerForm, part: int) -> int:
    """The largest byte that a part's activation is sent as."""

    def largest(grid: Grid) -> int:
        code = grid.uniform and not form.token
        return 2**form.act_bits - 1 if code else MIDDLE + grid.max_abs

    return max(largest(group[part]) for group in form.grids)
