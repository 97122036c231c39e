"""The carrier grid: scales s_k = base * m_k * 2^e of single channels that still run in 8-bit integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from questlib.quantization.primitives import fake_quant
from questlib.quantization.range_search import power
from questlib.quantization.token_grid import token_grid

pass
pass
from questlib.errors import ConfigError

# ---- carrier headroom (design/integer.md): s_k = base * m_k * 2^e, applied exactly in 8-bit lanes ----

CARRIER_MULTIPLIER = 8  # m_k in 1..8: |(q - z) m_k| <= 15 * 8 = 120 fits a signed byte
CARRIER_SHIFT = 3  # 2^e on sorted blocks of input channels, moved into asymmetric weights carried as q - z in +-15
CARRIER_BLOCK = 64


def block_shifts(scale: torch.Tensor) -> torch.Tensor:
    """Free scales [G, C] -> shift e [C] (same for all groups): sorted by mean log scale, blocks of 64, e in 0..3."""
    log = scale.log2().mean(0)
    order = log.argsort()
    top = torch.stack([log[b].max() for b in order.split(CARRIER_BLOCK)])
    e_block = (CARRIER_SHIFT - (top.max() - top).floor()).clamp_min(0)
    e_block = e_block - e_block.min()
    e = torch.empty_like(log)
    for b, shift in zip(order.split(CARRIER_BLOCK), e_block, strict=True):
        e[b] = shift
    return e


def snap_to_carrier(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    shift: torch.Tensor,
    bits: int,
    norm: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Free scales [C] -> base (0-d), ratio [C] = m_k * 2^e, zero_point [C]; base has the least |error|^norm on x [C, n]."""
    levels, best = 2**bits - 1, None
    centre = (levels / 2 - zero) * scale  # keep the middle of the range where the search put it
    for base, ratio in carrier_ratios(scale, shift):
        s = base * ratio
        z = torch.where(zero == 0, zero, (levels / 2 - centre / s).round().clamp(0, levels))
        err = power(fake_quant(x, s[:, None], z[:, None], bits).sub_(x), norm).sum()
        if best is None or err < best[0]:
            best = (err, base, ratio, z)
    return best[1:]


def carrier_ratios(
    scale: torch.Tensor, shift: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Candidates (base, ratio [C] = m_k * 2^e) for free scales [C]."""
    unit = scale / 2**shift
    for r in torch.linspace(0.35, 1.3, 39).tolist():
        base = unit.max() * (r / CARRIER_MULTIPLIER)
        yield base, (unit / base).round().clamp(1, CARRIER_MULTIPLIER) * 2**shift


def snap_to_tokens(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, bits: int, norm: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens x [C, n], free scales [C] -> clip (0-d), ratio [C] with the least |error|^norm: first the ratios, then the clip.

    More than 4 bits leave no headroom for ratios: they are 1.
    """

    def error(ratio: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        grid = token_grid(x * (1.0 / ratio)[:, None], clip, bits, 0)
        inverse, full = grid.inverse * (1.0 / ratio)[:, None], grid.scale * ratio[:, None]
        return power(fake_quant(x, full, grid.zero_point, bits, inverse).sub_(x), norm).sum()

    one = torch.ones((), dtype=scale.dtype, device=scale.device)
    ratio = torch.ones_like(scale)
    if bits <= 4:
        ratio = min(
            (r for _, r in carrier_ratios(scale, shift)), key=lambda r: error(r, one).item()
        )
    clip = min(
        (one * c for c in torch.linspace(0.4, 1.0, 25).flip(0).tolist()),
        key=lambda c: error(ratio, c).item(),
    )
    return clip, ratio


def split_ratio(
    top: torch.Tensor, ratio: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer ratios [C] of one group -> (m in 1..8, e in 0..3) with m * 2^e = ratio.

    e follows from `top` [C], the largest ratio over all groups, so that the shifted weights serve every group.
    """
    top, ratio = top.round().long(), ratio.round().long()
    shift = torch.zeros_like(top)
    for _ in range(CARRIER_SHIFT):
        shift = torch.where((top >> shift) > CARRIER_MULTIPLIER, shift + 1, shift)
    multiplier = ratio >> shift
    if (
        (multiplier << shift != ratio).any()
        or multiplier.min() < 1
        or multiplier.max() > CARRIER_MULTIPLIER
    ):
        raise ConfigError(
            f"{name}: scale ratios {ratio.unique().tolist()} are not m * 2^e with m in 1..8 and one e a channel"
        )
    return multiplier, shift
