"""Activations on the CPU as the bytes that a product takes.

The compiled kernel and torch's operations give the same bytes; the kernel goes over memory once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from questlib.errors import EngineError
from questlib.integer.cpu.products import MIDDLE
from questlib.integer.form import BYTE, Grid
from questlib.kernels.library import kernels
from questlib.kernels.quantize import Table, TokenRule, quantize, table
from questlib.kernels.rows import Target
from questlib.quantization.primitives import EPS
from questlib.quantization.token_grid import token_grid


def uses_kernels(exact: bool, wanted: bool | None) -> bool:
    """Whether the compiled kernels run: never in the reference engine.

    Args:
        exact: whether for the reference engine.
        wanted: whether the caller wants them; None: where there are any.
    """
    return not exact and (kernels().library is not None if wanted is None else wanted)


def engine_name(exact: bool, compiled: bool, split: bool = False) -> str:
    """What runs a layer, for reports: "-torch" where there are no compiled kernels."""
    if exact:
        return "reference"
    return "cpu-int8" + "-split" * split + "-torch" * (not compiled)


class Sent(NamedTuple):
    """An activation as bytes."""

    bytes: torch.Tensor  # uint8 like x
    scale: torch.Tensor | None  # of tokens, float32 with one entry where x has channels


class Prepared(NamedTuple):
    """An activation that a fused kernel has quantized already, for the layers that take it.

    Layers take it in place of the tensor: of the tensor it has the shape and the precision.
    """

    of: dict[str, list[Sent]]  # by layer, the bytes of each part
    shape: torch.Size
    dtype: torch.dtype


class Sender:
    """Quantizes to bytes by fake quantization's own formula: round(x * inverse), clamped.

    As an unsigned operand, a uniform code travels as it is, with its zero point; a carried value a,
    or one on the grid of its token, as a + 128. As a signed operand, a travels as it is where it
    fits; what does not is sent as a - `compensation`.

    Args:
        grid: of the activation.
        dim: of its channels: -1, or 1 of an image.
        name: of the layer, for messages.
        compiled: whether the compiled kernel does it.
        signed: whether as the signed operand.

    Attributes:
        offset: bytes are a + offset; the zero point of an unsigned operand.
    """

    def __init__(
        self, grid: Grid, dim: int, name: str, compiled: bool, signed: bool = False
    ) -> None:
        self.grid = grid
        self.dim = dim
        self.name = name
        self.signed = signed
        if signed:
            self.offset = 0 if grid.max_abs <= BYTE else -MIDDLE - int(grid.low)
        else:
            self.offset = -int(grid.low) if grid.uniform and not grid.token else MIDDLE
        self.table: Table | None = None
        if compiled:
            self.table = table(grid.inverse, grid.low, grid.high, grid.multiplier)
        self.rule: TokenRule | None = None
        if grid.token is not None:
            levels = 2**grid.token.bits - 1
            clip = grid.token.clip
            self.rule = TokenRule(float(1.0 / clip), float(clip / levels), float(levels), EPS)

    @property
    def compensation(self) -> int:
        """What the bytes of a signed operand lack: a = byte + compensation."""
        return -self.offset

    def target(self, start: int, stop: int) -> Target:
        """Where a fused kernel sends these channels of its rows."""
        assert self.table is not None
        return Target(self.table, self.offset, start, stop, self.rule)

    def __call__(self, x: torch.Tensor) -> Sent:
        """
        Args:
            x: float [..., C], or [B, C, H, W], whose bytes are channels_last.

        Raises:
            EngineError: x has NaN or infinite values.
        """
        if self.table is not None:
            sent, scale, finite = quantize(x, self.table, self.offset, self.dim, self.rule)
            if not finite:
                raise not_finite(self.name)
            return Sent(sent, scale)
        check_finite(x, self.name)
        a, scale = self._on_token_grids(x) if self.rule else (self._on_grid(x), None)
        if self.grid.multiplier is not None:
            a = a.mul_(self._along(self.grid.multiplier, x).to(torch.int8))
        sent = a.view(torch.uint8)
        if not self.signed:
            sent = sent.bitwise_xor_(MIDDLE)  # adds 128
        layout = torch.channels_last if self.dim == 1 else torch.contiguous_format
        return Sent(sent.contiguous(memory_format=layout), scale)

    def _on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """int8 q - z; where the grid is uniform, the byte as it travels, less 128 if unsigned."""
        grid = self.grid
        if grid.uniform:
            # x * tensor, not x * float: the product is float32 for any x
            a = (x * grid.inverse).round_().clamp_(float(grid.low), float(grid.high))
            # by way of int8: from float straight to uint8 is slow
            return a.add_(self.offset - (0 if self.signed else MIDDLE)).to(torch.int8)
        low = self._along(grid.low, x).float()
        high = self._along(grid.high, x).float()
        return (x * self._along(grid.inverse, x)).round_().clamp_(low, high).to(torch.int8)

    def _on_token_grids(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, each token on the grid of its own range; the scales of tokens."""
        grid = self.grid
        assert grid.token is not None
        inverse = self._along(grid.inverse, x)
        own = token_grid(x * inverse, grid.token.clip, grid.token.bits, self.dim)
        high = 2**grid.token.bits - 1 - own.zero_point
        a = (x * (own.inverse * inverse)).round_().clamp_(-own.zero_point, high)
        return a.to(torch.int8), own.scale

    def _along(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[C] or [1] -> broadcastable over x."""
        shape = [1] * x.ndim
        shape[self.dim] = -1
        return values.reshape(shape)


def check_finite(x: torch.Tensor, name: str) -> None:
    """Check that every value has an integer code.

    Raises:
        EngineError: x has NaN or infinite values.
    """
    # The sum is one cheap pass, but it can overflow where all values are finite.
    if not torch.isfinite(x.sum(dtype=torch.float32)) and not torch.isfinite(x).all():
        raise not_finite(name)


def not_finite(name: str) -> EngineError:
    return EngineError(f"{name}: the input has NaN or infinite values")
