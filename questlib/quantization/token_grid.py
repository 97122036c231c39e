"""Grids of single tokens, from the range of their channels as they come.

s_tk = clip * range_t / (2^b - 1) * ratio_k        token t, channel k
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from questlib.quantization.primitives import EPS


class TokenGrid(NamedTuple):
    """The grids of tokens: one entry a token (and part) where x has its channels."""

    inverse: torch.Tensor  # 1 / scale
    zero_point: torch.Tensor  # an integer, so that q - z is one whatever the token
    scale: torch.Tensor


def token_grid(u: torch.Tensor, clip: torch.Tensor, bits: int, dim: int) -> TokenGrid:
    """The grid of each token's range, zero included.

    Codes of 8 bits have their zero in the middle: q - z must fit a signed byte. The gradient of
    `scale` reaches `clip` alone.

    Args:
        u: x / ratio [..., C, ...], channels at `dim`.
        clip: the share of the range that is kept: a scalar, or it broadcasts over u.
        bits: 2 to 8.
        dim: the dimension of channels.
    """
    with torch.no_grad():
        lo, hi = u.aminmax(dim=dim, keepdim=True)
        levels = 2**bits - 1
        lo = lo.clamp_max(0.0)
        hi = hi.clamp_min(0.0)
        span = (2 * torch.maximum(-lo, hi) if bits == 8 else hi - lo).clamp_min(EPS)
        unit = levels / span
        zero = torch.full_like(lo, 128.0) if bits == 8 else (-lo * unit).clamp(0, levels).round()
        inverse = unit * (1.0 / clip)
    return TokenGrid(inverse, zero, span * (clip / levels))
