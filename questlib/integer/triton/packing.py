"""How weights and grids lie in memory for the Triton kernels. Layouts: `gemm_kernels`."""

from __future__ import annotations

import torch
from torch import nn

from questlib.integer.form import BYTE, INT32, Grid, WeightPart

CHANNEL_BLOCK = 64  # channels are padded to a multiple, so that no loop over them needs a mask


def padded_to(n: int, block: int) -> int:
    """n rounded up to a multiple of the block."""
    return -(-n // block) * block


def unshifted(part: WeightPart) -> torch.Tensor:
    """The part's weight without its shifts 2^e, int16."""
    return part.weight.short() >> part.shift.short().reshape(1, -1, *[1] * (part.weight.ndim - 2))


def packable(part: WeightPart) -> bool:
    """Whether each output channel's weights are 4-bit codes around a zero point of its own."""
    taps = part.weight[0].numel()
    if part.compensation is not None or taps * 15 * 8 * 128 > INT32:
        return False
    codes = unshifted(part).flatten(1)  # [O, n]
    span = codes.amax(1).clamp_min(0) - codes.amin(1).clamp_max(0)
    return int(span.max()) <= 15


def column_order(shift: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Columns sorted by falling shift, those of each shift padded to whole blocks.

    Args:
        shift: e int64 [C], 0 to 3.

    Returns:
        The channel of each column or -1, int32 [C'], and where the columns with e of at least 1, 2
        and 3 end.
    """
    blocks = []
    ends: list[int] = []
    for e in (3, 2, 1, 0):
        own = (shift == e).nonzero()[:, 0].int()
        blocks.append(nn.functional.pad(own, (0, -len(own) % CHANNEL_BLOCK), value=-1))
        ends.insert(0, sum(map(len, blocks)))
    return torch.cat(blocks), ends[1:]


def sent_constant(grid: Grid) -> int:
    """What is added to a so that it fits a signed byte.

    That is 0, or for static 8-bit grids z - 128 (a' = q - 128).
    """
    return 0 if grid.max_abs <= BYTE or grid.token is not None else -int(grid.low[0]) - 128


def grid_table(grid: Grid) -> torch.Tensor:
    """The float32 [4, C or 1] that `quantize` reads: inverse, low, multiplier, constant.

    All are exact in float32.
    """
    one = torch.ones_like(grid.inverse)
    multiplier = one if grid.multiplier is None else grid.multiplier
    rows = (grid.inverse, grid.low, multiplier, one * sent_constant(grid))
    return torch.stack([row.float() for row in rows])


def stored_weight(w: torch.Tensor, order: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The resident weight of a part.

    Args:
        w: integers [O, C] or [O, C, kh, kw].
        order: int32 [C'], the channel of each column or -1.
        zero: int32 [O], subtracted to give codes of 4 bits, which are packed; None: not packed.

    Returns:
        int8 [O, taps, C'], or packed uint8 [O, taps, C'/2].
    """
    w = w.flatten(2).transpose(1, 2) if w.ndim == 4 else w[:, None]  # [O, taps, C]
    if zero is not None:
        w = w - zero.reshape(-1, 1, 1)
    w = torch.where(order >= 0, w[..., order.clamp_min(0)], 0)
    if zero is None:
        return w.to(torch.int8)
    low, high = w.to(torch.uint8).chunk(2, dim=2)
    return (low | high << 4).contiguous()


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """int64 [O]: the sum of a resident weight's values, as the kernels multiply them."""
    flat = weight.flatten(1).long()
    return flat.sum(1) if weight.dtype == torch.int8 else (flat & 15).sum(1) + (flat >> 4).sum(1)
