"""The Triton engine's kernels as torch operators, so that torch.compile and CUDA graphs keep working. Layouts: kernels.py.

`questlib::quantize` (float -> int8), `questlib::group_norm_affine` (what a GroupNorm applies), `questlib::integer_gemm` (int8 x
int8 or packed 4 bit -> float, or int32 accumulators) and `questlib::integer_attention`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch

from questlib.errors import EngineError
from questlib.integer.form import BYTE
from questlib.integer.triton import tiles

CHANNEL_BLOCK = 64  # channels are padded to a multiple, so that no loop over them needs a mask


def _on(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, H, W, C] -> a' int8 [B, H + 2 pad_y, W + 2 pad_x, C'], the sums of a, int32 (empty unless asked for), and the scale
    of each row, float32 (empty without clip).

    table float32 [4, C or 1] as grid_table makes it, or [4, C'] with order int32 [C']: the channel of each column, -1 for none;
    levels 2^bits - 1; flag int32 [1].
    norm_scale, norm_shift float32 [B, C]: x * scale + shift first, then SiLU.
    clip float32 [2]: 1 / clip and clip / levels of grids a token, whose table starts with 1 / ratio.
    """
    a, total, scales = quantize_outputs(x, table, flag, levels, pad, sums, order, clip=clip)
    (_, height, width, channels), padded = x.shape, a.shape[-1]
    if a.numel():
        rows, whole = a.numel() // padded, sums or clip is not None
        block, columns = (
            (8, 256) if whole else (32, CHANNEL_BLOCK)
        )  # whole rows: one warp a row, all its channels
        block = (
            128 if tiles.INTERPRET else block
        )  # interpreted programs cost by their number, not by their size
        grid = (tiles.triton.cdiv(rows, block), 1 if whole else padded // columns)
        norm, unused = (
            norm_scale is not None,
            flag,
        )  # a kernel takes a pointer even where it reads none
        with _on(x):
            tiles.kernels.quantize[grid](
                x,
                table,
                unused if order is None else order,
                a,
                total if sums else unused,
                flag,
                norm_scale if norm else table,
                norm_shift if norm else table,
                table if clip is None else clip,
                scales if len(scales) else table,
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
                NORM=norm,
                SILU=silu,
                TOKEN=clip is not None,
                MIDDLE=levels == 255,
                BR=block,
                BC=columns,
                num_warps=4,
            )
    return a, total, scales


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
):
    b, height, width, channels = x.shape
    shape = (b, height + 2 * pad[0], width + 2 * pad[1])
    padded = -(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK if order is None else len(order)
    a = torch.empty(*shape, padded, dtype=torch.int8, device=x.device)
    total = torch.empty(shape if sums else (0,), dtype=torch.int32, device=x.device)
    return (
        a,
        total,
        torch.empty((0,) if clip is None else shape, dtype=torch.float32, device=x.device),
    )


@torch.library.custom_op("questlib::group_norm_affine", mutates_args=())
def group_norm_affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, C, H, W] -> scale and shift, float32 [B, C], with which GroupNorm(x) = x * scale + shift: `norm` of TritonLayer."""
    scale, shift = group_norm_outputs(x, weight, bias, groups, eps)
    rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    if rows.stride(3) != 1 or rows.stride(1) != rows.shape[2] * rows.stride(2):
        rows = rows.contiguous()
    b, pixels, channels = len(rows), rows.shape[1] * rows.shape[2], rows.shape[3]
    if not rows.numel():
        return scale, shift
    shares = min(64, tiles.triton.cdiv(pixels, 32))
    sums = torch.empty(b, shares, 2, channels, dtype=torch.float32, device=x.device)
    with _on(x):
        tiles.kernels.moments[(shares, tiles.triton.cdiv(channels, 64), b)](
            rows,
            sums,
            pixels,
            channels,
            tiles.triton.cdiv(pixels, shares),
            rows.stride(0),
            rows.stride(2),
            BR=32,
            BC=64,
        )
        tiles.kernels.group_affine[(groups, b)](
            sums,
            weight,
            bias,
            scale,
            shift,
            channels,
            shares,
            float(pixels * (channels // groups)),
            eps,
            BS=tiles.triton.next_power_of_2(shares),
            BC=tiles.triton.next_power_of_2(channels // groups),
        )
    return scale, shift


@group_norm_affine.register_fake
def group_norm_outputs(x, weight, bias, groups, eps):
    return tuple(torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))


@torch.library.custom_op("questlib::integer_gemm", mutates_args=())
def integer_gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    correction: torch.Tensor | None,
    offset: torch.Tensor | None,
    sums: torch.Tensor | None,
    window: list[int],
    stride: list[int],
    ends: list[int],
    dtype: torch.dtype,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """a' [B, H, W, C'] (padded already), w int8 [O, taps, C'] or uint8 [O, taps, C'/2] -> [B, H', W', O] of `dtype`.

    out = float(acc) * scale_o * row_scale + bias_o + residual; acc = dot + correction_o + offset_o * (window sums of `sums`).
    ends: empty, or where the columns of packed w with shifts of at least 1, 2 and 3 end. dtype int32: acc itself, and scale, bias
    and residual are ignored. All vectors [O] but row_scale, [B, H, W] (window and stride 1); residual shaped like
    the output.
    """
    out = gemm_output(
        a,
        w,
        scale,
        bias,
        residual,
        correction,
        offset,
        sums,
        window,
        stride,
        ends,
        dtype,
        row_scale,
    )
    if not out.numel():
        return out
    o, span, padded = w.shape[0], w.shape[2], a.shape[3]
    m, raw = out.numel() // o, dtype == torch.int32
    if max(a.numel(), out.numel(), w.numel()) >= 2**31:
        raise EngineError(
            f"engine triton: tensors of {max(a.numel(), out.numel())} elements are too large for 32-bit indices"
        )
    point = window == [1, 1] and stride == [1, 1]

    def given(
        t: torch.Tensor | None,
    ) -> torch.Tensor:  # a kernel takes a pointer even where it reads none
        return scale if t is None else t

    def run(c: tiles.Config) -> torch.Tensor:
        partial = torch.zeros_like(out, dtype=torch.int32) if c.split > 1 else out
        grid = (tiles.triton.cdiv(m, c.bm) * tiles.triton.cdiv(o, c.bn), c.split)
        tiles.kernels.gemm[grid](
            a,
            w,
            partial,
            scale,
            given(row_scale),
            given(bias),
            given(residual),
            given(correction),
            given(offset),
            given(sums),
            m,
            o,
            span,
            padded,
            *window,
            a.shape[1],
            a.shape[2],
            out.shape[1],
            out.shape[2],
            *stride,
            *(ends or (0, 0, 0)),
            POINT=point,
            PACKED=w.dtype == torch.uint8,
            SHIFTED=bool(ends),
            ASM=not tiles.INTERPRET,
            RAW=raw,
            HAS_ROW=row_scale is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_CORRECTION=correction is not None,
            HAS_OFFSET=offset is not None,
            BM=c.bm,
            BN=c.bn,
            BK=c.bk,
            ATOMIC=c.split > 1,
            GROUP=8,
            num_warps=c.warps,
            num_stages=c.stages,
        )
        if c.split == 1 or raw:
            return partial
        tiles.kernels.finish[(tiles.triton.cdiv(m, 16), tiles.triton.cdiv(o, 128))](
            partial,
            out,
            scale,
            given(row_scale),
            given(bias),
            given(residual),
            m,
            o,
            HAS_ROW=row_scale is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BM=16,
            BN=128,
        )
        return out

    if tiles.INTERPRET:
        return run(next(c for c in tiles.INTERPRETED if span % c.bk == 0))
    with _on(a):
        sms, taps = (
            torch.cuda.get_device_properties(a.device).multi_processor_count,
            window[0] * window[1],
        )
        key = f"{w.dtype}-{bool(ends)}-{dtype}-{window}-{stride}-{o}-{span}-{1 << (m - 1).bit_length()}"
        return run(
            tiles.CACHE.choose(
                key,
                lambda: tiles.fitting(
                    m, o, span, taps, w.dtype == torch.uint8, sms, 64 if ends else 128
                ),
                run,
            )
        )


@integer_gemm.register_fake
def gemm_output(
    a,
    w,
    scale,
    bias,
    residual,
    correction,
    offset,
    sums,
    window,
    stride,
    ends,
    dtype,
    row_scale=None,
):
    high, wide = ((n - k) // s + 1 for n, k, s in zip(a.shape[1:3], window, stride, strict=True))
    return torch.empty(a.shape[0], high, wide, w.shape[0], dtype=dtype, device=a.device)


@torch.library.custom_op("questlib::integer_attention", mutates_args=())
def integer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_scale: torch.Tensor,
    heads: int,
    constants: list[int],
    factor: float,
    p_inverse: float,
    p_levels: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """a' int8 of q [B, N, C'], k, v [B, M, C'] -> [B, N, C] = v_scale_c * sum_m p_m v_mc, p the codes 0..p_levels (at most 255)
    round(softmax(factor * q k^T) * p_inverse). constants: a - a' of q and v. v_scale float32 [C]."""
    out = attention_output(q, k, v, v_scale, heads, constants, factor, p_inverse, p_levels, dtype)
    (batch, queries, width), keys, dim = out.shape, k.shape[1], out.shape[2] // heads
    if not out.numel():
        return out
    # the tensor core wants the index that is summed over innermost
    transposed = v.new_zeros(batch, width, -(-keys // 16) * 16)
    transposed[..., :keys] = v[..., :width].transpose(1, 2)
    q_constant, v_constant = constants
    key_sum, shift = transposed, 0  # not read
    if q_constant:
        key_sum = (
            k[..., :width]
            .unflatten(-1, (heads, dim))
            .sum(-1, dtype=torch.int32)
            .transpose(1, 2)
            .contiguous()
        )
    if p_levels > BYTE:
        shift = 128
    v_sum = transposed.sum(-1, dtype=torch.int32) if shift else transposed
    bd, small = max(32, tiles.triton.next_power_of_2(dim)), tiles.INTERPRET or queries < 128
    bq, bk = (64, 64) if small or dim > 128 else (128, 64)
    with _on(q):
        tiles.kernels_attention.attention[(tiles.triton.cdiv(queries, bq), batch * heads)](
            q,
            k,
            transposed,
            out,
            key_sum,
            v_sum,
            v_scale,
            queries,
            keys,
            transposed.shape[2],
            heads,
            dim,
            q.shape[2],
            q_constant,
            v_constant,
            factor / math.log(2),
            p_inverse,
            float(p_levels),
            HAS_Q=q_constant != 0,
            HAS_V=v_constant != 0,
            P_CONSTANT=shift,
            EVEN=keys % bk == 0,
            ASM=not tiles.INTERPRET,
            BQ=bq,
            BK=bk,
            BD=bd,
            num_warps=4 if bq == 64 else 8,
            num_stages=3,
        )
    return out


@integer_attention.register_fake
def attention_output(q, k, v, v_scale, heads, constants, factor, p_inverse, p_levels, dtype):
    return torch.empty(*q.shape[:2], len(v_scale), dtype=dtype, device=q.device)
