"""Grids of single tokens, from the range of their channels as they come."""

from __future__ import annotations

from typing import NamedTuple

import torch

from questlib.quantization.primitives import EPS

# ---- per-token dynamic grids: s_tk = clip * range_t / (2^b - 1) * ratio_k ----


class TokenGrid(NamedTuple):
    """One entry a token (and part) where x has its channels; zero_point integers, so that q - z is one whatever the token."""

    inverse: torch.Tensor  # 1 / scale
    zero_point: torch.Tensor
    scale: torch.Tensor


def token_grid(u: torch.Tensor, clip: torch.Tensor, bits: int, dim: int) -> TokenGrid:
    """u = x / ratio [..., C at dim, ...] and clip (scalar, or broadcastable) -> the grid of each token's range, zero included.

    Codes of 8 bits have their zero in the middle: q - z must fit a signed byte. The gradient of `scale` reaches `clip` alone.
    """
    with torch.no_grad():
        lo, hi = u.aminmax(dim=dim, keepdim=True)
        levels = 2**bits - 1
        lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
        span = (2 * torch.maximum(-lo, hi) if bits == 8 else hi - lo).clamp_min(EPS)
        unit = levels / span
        zero = torch.full_like(lo, 128.0) if bits == 8 else (-lo * unit).clamp(0, levels).round()
        inverse = unit * (1.0 / clip)
    return TokenGrid(inverse, zero, span * (clip / levels))
