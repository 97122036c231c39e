"""Operators that give the Triton products their operands: `questlib::quantize` and
`questlib::group_norm_affine`.

They are registered with torch, so that torch.compile and CUDA graphs keep working. Layouts:
`quantize_kernels`.
"""

from __future__ import annotations

import torch
from torch import nn

from questlib.integer.triton import runtime
from questlib.integer.triton.packing import CHANNEL_BLOCK, padded_to


@torch.library.custom_op("questlib::quantize", mutates_args={"flag"})
def quantize(
    x: torch.Tensor,
    table: torch.Tensor,
    flag: torch.Tensor,
    levels: int,
    pad: list[int],
    sums: bool,
    order: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
    norm_shift: torch.Tensor | None = None,
    silu: bool = False,
    clip: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize an activation.

    Args:
        x: [B, H, W, C].
        table: float32 [4, C or 1] (`packing.grid_table`), or [4, C'] with `order`.
        flag: int32 [1], set to 1 when an x is NaN or infinite.
        levels: 2^bits - 1.
        pad: rows and columns of padding on each side.
        sums: whether the sums of a are wanted.
        order: int32 [C'], the channel of each column, -1 for none.
        norm_scale: float32 [B, C]: first x * norm_scale + norm_shift.
        norm_shift: float32 [B, C].
        silu: whether a SiLU comes next.
        clip: float32 [2], 1 / clip and clip / levels of grids a token, whose table starts with
            1 / ratio.
        gated: whether x is [B, H, W, 2 C], values and gates of a GEGLU.

    Returns:
        a' int8 [B, H + 2 pad, W + 2 pad, C']; the sums of a, int32, empty unless wanted; and the
        scale of each row, float32, empty without clip.

    Raises:
        EngineError: a tensor is too large for 32-bit indices.
    """
    a, total, scales = quantize_outputs(
        x, table, flag, levels, pad, sums, order, clip=clip, gated=gated
    )
    if not a.numel():
        return a, total, scales
    runtime.check_size(x, a)
    _, height, width, channels = _shape(x, gated)
    padded = a.shape[-1]
    rows = a.numel() // padded
    # Sums and ranges need whole rows: one warp a row, all its channels. With two rows a warp, the
    # form with an order, a norm and a SiLU spills on sm_80.
    whole = sums or clip is not None
    block, columns = (4, 256) if whole else (32, CHANNEL_BLOCK)
    if runtime.INTERPRET:
        block = 128  # interpreted programs cost by their number, not by their size
    grid = (runtime.triton.cdiv(rows, block), 1 if whole else padded // columns)
    # A kernel takes a pointer even where it reads none.
    unused_int = flag
    unused_float = table
    with runtime.on_device(x):
        runtime.quantize_kernels.quantize[grid](
            x,
            table,
            unused_int if order is None else order,
            a,
            total if sums else unused_int,
            flag,
            unused_float if norm_scale is None else norm_scale,
            unused_float if norm_shift is None else norm_shift,
            unused_float if clip is None else clip,
            unused_float if clip is None else scales,
            float(levels),
            rows,
            height,
            width,
            *pad,
            *x.stride()[:3],
            channels,
            padded,
            UNIFORM=table.shape[1] == 1,
            ORDERED=order is not None,
            HAS_SUMS=sums,
            NORM=norm_scale is not None,
            SILU=silu,
            GATED=gated,
            TOKEN=clip is not None,
            MIDDLE=levels == 255,
            BR=block,
            BC=columns,
            num_warps=4,
        )
    return a, total, scales


def _shape(x: torch.Tensor, gated: bool) -> tuple[int, int, int, int]:
    """B, H, W and C of what is quantized."""
    b, height, width, channels = x.shape
    return b, height, width, channels // 2 if gated else channels


@quantize.register_fake
def quantize_outputs(
    x,
    table,
    flag,
    levels,
    pad,
    sums,
    order=None,
    norm_scale=None,
    norm_shift=None,
    silu=False,
    clip=None,
    gated=False,
):
    b, height, width, channels = _shape(x, gated)
    shape = (b, height + 2 * pad[0], width + 2 * pad[1])
    padded = padded_to(channels, CHANNEL_BLOCK) if order is None else len(order)
    a = torch.empty(*shape, padded, dtype=torch.int8, device=x.device)
    total = torch.empty(shape if sums else (0,), dtype=torch.int32, device=x.device)
    scales = torch.empty((0,) if clip is None else shape, dtype=torch.float32, device=x.device)
    return a, total, scales


@torch.library.custom_op("questlib::quantize_rows", mutates_args={"flag"})
def quantize_rows(
    x: torch.Tensor,
    tables: list[torch.Tensor],
    orders: list[torch.Tensor],
    flag: torch.Tensor,
    levels: int,
    sums: bool,
    norm_scale: torch.Tensor | None = None,
    norm_shift: torch.Tensor | None = None,
    eps: float | None = None,
) -> list[torch.Tensor]:
    """Quantize the same rows on up to three grids, in one pass.

    Args:
        x: [B, N, C].
        tables: of each grid, as `quantize` takes them.
        orders: of each grid; empty for none.
        flag: as in `quantize`.
        levels: as in `quantize`.
        sums: as in `quantize`.
        norm_scale: float [B, C]: first x * norm_scale + norm_shift. With eps [C]: the weight of a
            LayerNorm.
        norm_shift: float [B, C], or [C].
        eps: of a LayerNorm before the quantization.

    Returns:
        a' int8 [B, 1, N, C'] and the sums of a, as `quantize` gives them, one after the other.
    """
    out = rows_outputs(x, tables, orders, flag, levels, sums)
    if not x.numel():
        return out
    runtime.check_size(x, *out)
    batch, pixels, channels = x.shape
    rows = batch * pixels
    given = [
        (
            tables[i],
            orders[i] if orders else flag,
            out[2 * i],
            out[2 * i + 1] if sums else flag,
        )
        for i in range(len(tables))
    ]
    given += given[:1] * (3 - len(given))  # a kernel takes a pointer even where it reads none
    block = 128 if runtime.INTERPRET else 4
    with runtime.on_device(x):
        runtime.quantize_kernels.quantize_rows[(runtime.triton.cdiv(rows, block),)](
            x,
            *(pointer for four in given for pointer in four),
            flag,
            tables[0] if norm_scale is None else norm_scale,
            tables[0] if norm_shift is None else norm_shift,
            float(levels),
            rows,
            pixels,
            x.stride(0),
            x.stride(1),
            channels,
            *(four[2].shape[-1] for four in given),
            0.0 if eps is None else eps,
            RESULTS=len(tables),
            LAYER=eps is not None,
            NORM=norm_scale is not None,
            UNIFORM=tables[0].shape[1] == 1,
            ORDERED=bool(orders),
            HAS_SUMS=sums,
            BR=block,
            BC=256,
            num_warps=4,
        )
    return out


@quantize_rows.register_fake
def rows_outputs(x, tables, orders, flag, levels, sums, norm_scale=None, norm_shift=None, eps=None):
    found = []
    for i in range(len(tables)):
        order = orders[i] if orders else None
        found += quantize_outputs(x[:, None], tables[i], flag, levels, [0, 0], sums, order)[:2]
    return found


@torch.library.custom_op("questlib::group_norm_affine", mutates_args=())
def group_norm_affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift, float32 [B, C], with which GroupNorm(x) = x * scale + shift.

    x is [B, C, H, W]; the result is what `TritonLayer.forward` takes as `norm`.
    """
    scale, shift = group_norm_outputs(x, weight, bias, groups, eps)
    rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    if rows.stride(3) != 1 or rows.stride(1) != rows.shape[2] * rows.stride(2):
        rows = rows.contiguous()
    if not rows.numel():
        return scale, shift
    runtime.check_size(rows)
    b, height, width, channels = rows.shape
    pixels = height * width
    triton = runtime.triton
    shares = min(64, triton.cdiv(pixels, 32))
    sums = torch.empty(b, shares, 2, channels, dtype=torch.float32, device=x.device)
    with runtime.on_device(x):
        runtime.norm_kernels.moments[(shares, triton.cdiv(channels, 64), b)](
            rows,
            sums,
            pixels,
            channels,
            triton.cdiv(pixels, shares),
            rows.stride(0),
            rows.stride(2),
            BR=32,
            BC=64,
        )
        runtime.norm_kernels.group_affine[(groups, b)](
            sums,
            weight,
            bias,
            scale,
            shift,
            channels,
            shares,
            float(pixels * (channels // groups)),
            eps,
            BS=triton.next_power_of_2(shares),
            BC=triton.next_power_of_2(channels // groups),
        )
    return scale, shift


@group_norm_affine.register_fake
def group_norm_outputs(x, weight, bias, groups, eps):
    return tuple(torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))


def affine_of(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GroupNorm applies to x [B, C, H, W]: `group_norm_affine`."""
    return group_norm_affine(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
