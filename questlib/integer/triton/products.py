"""Operators of the Triton products: `questlib::integer_gemm` (int8 x int8 or packed 4 bit -> float,
or int32 accumulators) and `questlib::integer_attention`.

They are registered with torch, so that torch.compile and CUDA graphs keep working. Layouts:
`gemm_kernels`.
"""

from __future__ import annotations

import math

import torch

from questlib.integer.form import BYTE
from questlib.integer.triton import runtime, tiles
from questlib.integer.triton.packing import CHANNEL_BLOCK, padded_to


@torch.library.custom_op("questlib::integer_gemm", mutates_args={"arrived"})
def integer_gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    correction: torch.Tensor | None,
    compensation: torch.Tensor | None,
    sums: torch.Tensor | None,
    window: list[int],
    stride: list[int],
    ends: list[int],
    dtype: torch.dtype,
    arrived: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    levels: int = 0,
    transposed: bool = False,
) -> torch.Tensor:
    """float(acc) * scale_o * row_scale + bias_o + shift_bo + residual.

    With dtype int32 it is acc itself.

        acc = dot + correction_o + compensation_o * (sums under the window)

    Args:
        a: a' int8 [B, H, W, C'], padded already.
        w: int8 [O, taps, C'], or packed uint8 [O, taps, C'/2].
        scale: float32 [O].
        bias: float32 [O].
        residual: like the output.
        correction: int32 [O].
        compensation: int32 [O], with `sums`.
        sums: int32 [B, H, W], from `quantize`.
        window: kernel height and width.
        stride: of the window.
        ends: where the columns of packed w with shifts of at least 1, 2 and 3 end; or empty.
        dtype: of the output.
        arrived: int32 [tiles.MOST_SPLIT] zeros, which are zeros again afterwards.
        row_scale: float32 [B, H, W], for a window and stride of 1.
        shift: float [B, O], of each picture, with a stride of 1 in O.
        table: float32 [4, O], with dtype int8: the grid of the outputs, whose codes a' are the
            result (`packing.grid_table`).
        levels: of that grid, 2^bits - 1.
        transposed: whether these codes have pixels innermost.

    Returns:
        [B, H', W', O]; codes [B, 1, N, O'], or transposed [B, O, N'].

    Raises:
        EngineError: a tensor is too large for 32-bit indices.
    """
    out = gemm_output(
        a,
        w,
        scale,
        bias,
        residual,
        correction,
        compensation,
        sums,
        window,
        stride,
        ends,
        dtype,
        arrived,
        table=table,
        transposed=transposed,
    )
    if not out.numel():
        return out
    runtime.check_size(a, out, w)
    o, _, span = w.shape
    high, wide = _places(a, window, stride)
    m = a.shape[0] * high * wide
    raw = dtype == torch.int32
    packed = w.dtype == torch.uint8
    cdiv = runtime.triton.cdiv
    shift_stride = 0 if shift is None else shift.stride(0)

    def given(t: torch.Tensor | None) -> torch.Tensor:
        """A kernel takes a pointer even where it reads none."""
        return scale if t is None else t

    def run(c: tiles.Config) -> torch.Tensor:
        grid = (cdiv(m, c.bm) * cdiv(o, c.bn), c.split)
        partial = arrived
        if c.split > 1:
            partial = arrived.new_empty(grid[0] * c.split * c.bm * c.bn)
        runtime.gemm_kernels.gemm[grid](
            a,
            w,
            out,
            scale,
            given(row_scale),
            given(bias),
            given(shift),
            given(residual),
            given(correction),
            given(compensation),
            given(sums),
            given(table),
            partial,
            arrived,
            m,
            o,
            span,
            a.shape[3],
            *window,
            a.shape[1],
            a.shape[2],
            high,
            wide,
            *stride,
            *(ends or (0, 0, 0)),
            shift_stride,
            float(levels),
            out.shape[-1],
            POINT=window == [1, 1] and stride == [1, 1],
            PACKED=packed,
            SHIFTED=bool(ends),
            ASM=not runtime.INTERPRET,
            RAW=raw,
            CODES="no" if table is None else "columns" if transposed else "rows",
            HAS_ROW=row_scale is not None,
            HAS_BIAS=bias is not None,
            HAS_SHIFT=shift is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_CORRECTION=correction is not None,
            HAS_COMPENSATION=compensation is not None,
            BM=c.bm,
            BN=c.bn,
            BK=c.bk,
            SPLIT=c.split > 1,
            GROUP=8,
            num_warps=c.warps,
            num_stages=c.stages,
        )
        return out

    if runtime.INTERPRET:
        return run(next(c for c in tiles.INTERPRETED if span % c.bk == 0))
    with runtime.on_device(a):
        gpu = tiles.Gpu.of(a.device)
        taps = window[0] * window[1]
        longest = 64 if ends else 128
        shape_class = (w.dtype, bool(ends), dtype, window, stride, o, span)
        key = "-".join(map(str, (*shape_class, 1 << (m - 1).bit_length())))
        return run(
            tiles.CACHE.choose(
                key, lambda: tiles.fitting(m, o, span, taps, packed, gpu, longest), run
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
    compensation,
    sums,
    window,
    stride,
    ends,
    dtype,
    arrived,
    row_scale=None,
    shift=None,
    table=None,
    levels=0,
    transposed=False,
):
    high, wide = _places(a, window, stride)
    outputs = w.shape[0]
    if transposed:
        shape = (a.shape[0], outputs, padded_to(high * wide, 16))
    else:
        width = outputs if table is None else padded_to(outputs, CHANNEL_BLOCK)
        shape = (a.shape[0], high, wide, width)
    return torch.empty(shape, dtype=dtype, device=a.device)


def _places(a: torch.Tensor, window: list[int], stride: list[int]) -> tuple[int, int]:
    """H' and W'."""
    high, wide = ((n - k) // s + 1 for n, k, s in zip(a.shape[1:3], window, stride, strict=True))
    return high, wide


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
    """v_scale_c * sum_m p_m v_mc with codes p = round(softmax(factor * q k^T) * p_inverse).

    Args:
        q: a' int8 [B, N, C'].
        k: a' int8 [B, M, C'].
        v: a' int8 [B, C, M'], M' a multiple of 16. What is behind key M is not used.
        v_scale: float32 [C].
        heads: number of heads.
        constants: a - a' of q and of v.
        factor: of the scores.
        p_inverse: 1 / scale of the probabilities.
        p_levels: the largest code of a probability, at most 255.
        dtype: of the output.

    Returns:
        [B, N, C].

    Raises:
        EngineError: a tensor is too large for 32-bit indices.
    """
    out = attention_output(q, k, v, v_scale, heads, constants, factor, p_inverse, p_levels, dtype)
    if not out.numel():
        return out
    runtime.check_size(q, k, v, out)
    batch, queries, width = out.shape
    keys = k.shape[1]
    dim = width // heads
    triton = runtime.triton
    q_constant, v_constant = constants
    p_constant = 128 if p_levels > BYTE else 0
    # Sums that q's constant makes necessary; without it the kernel does not read them.
    key_sum = v
    if q_constant:
        by_head = k[..., :width].unflatten(-1, (heads, dim))
        key_sum = by_head.sum(-1, dtype=torch.int32).transpose(1, 2).contiguous()
    # What spills nothing. Heads that are not aligned to 8 bytes take more registers.
    small = runtime.INTERPRET or queries < 128 or dim > 128 or dim % 8
    bq = 64 if small else 128
    bk = 64
    with runtime.on_device(q):
        grid = (triton.cdiv(queries, bq), batch * heads)
        runtime.attention_kernels.attention[grid](
            q,
            k,
            v,
            out,
            key_sum,
            v_scale,
            queries,
            keys,
            v.shape[2],
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
            P_CONSTANT=p_constant,
            EVEN=keys % bk == 0,
            ASM=not runtime.INTERPRET,
            BQ=bq,
            BK=bk,
            BD=max(32, triton.next_power_of_2(dim)),
            num_warps=4 if bq == 64 and dim <= 128 else 8,
            num_stages=3,
        )
    return out


@integer_attention.register_fake
def attention_output(q, k, v, v_scale, heads, constants, factor, p_inverse, p_levels, dtype):
    return torch.empty(*q.shape[:2], len(v_scale), dtype=dtype, device=q.device)
