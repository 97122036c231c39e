"""Attention on bytes, a few queries at a time (`attention.cpp`)."""

from __future__ import annotations

import ctypes

import torch

from questlib.kernels.library import call

POINTERS = ("q", "k", "v", "mask", "factor", "codes_add", "out")
SIZES = ("batch", "heads", "queries", "keys", "dim", "mask_head", "mask_query")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("zero", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("scale", "inverse", "high")),
    ]


def attention(
    q: torch.Tensor,
    zero: int,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    inverse: float,
    high: float,
    factor: torch.Tensor,
    codes_add: torch.Tensor | None,
    heads: int,
) -> torch.Tensor | None:
    """factor * sum_m p_m v_m + codes_add * sum_m p_m, with p the codes of the softmax.

    Args:
        q: uint8 [B, N, C], with zero point `zero`.
        zero: of q.
        k: int8 [B, M, C].
        v: int8 [B, M, C].
        scale: of the scores.
        mask: added to the scores, float [B * heads, 1 or N, M].
        inverse: 1 / scale of the softmax's grid, whose zero point is 0.
        high: its largest code.
        factor: float32 [C].
        codes_add: float32 [C], or None: all zero.
        heads: their number.

    Returns:
        float32 [B, N, C]; None where a query's scores are not finite.
    """
    batch, queries, width = q.shape
    keys = k.shape[1]
    q, k, v, factor = (x.contiguous() for x in (q, k, v, factor))
    mask_head = mask_query = 0
    if mask is not None:
        mask = mask.float().expand(batch * heads, -1, keys).contiguous()
        mask_head = mask.stride(0)
        mask_query = keys if mask.shape[1] > 1 else 0
    out = torch.empty(batch, queries, width)
    tensors = (q, k, v, mask, factor, codes_add, out)
    problem = _Problem(
        *(None if x is None else x.data_ptr() for x in tensors),
        *(batch, heads, queries, keys, width // heads, mask_head, mask_query),
        *(zero, scale, inverse, high),
    )
    return out if call("attention", problem) else None
