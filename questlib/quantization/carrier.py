"""The carrier grid: scales of single channels that still run in 8-bit integers.

    s_k = base * m_k * 2^e_k        channel k, m_k in 1..8, e_k in 0..3

A layer's sum over channels becomes base * sum_k [(q_k - z_k) * m_k] * [2^e_k * w_k]. Codes of up to
4 bits leave room for both factors: |(q - z) m_k| <= 15 * 8 = 120 fits a signed byte, and so does a
weight |q_w - z_w| <= 15 times 2^3. e is the same in all step groups, so that the shifted weights
serve every one of them. Channels that are sorted by scale get one e for each block of 64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from questlib.errors import ConfigError
from questlib.quantization.primitives import fake_quant
from questlib.quantization.range_search import power
from questlib.quantization.token_grid import token_grid

CARRIER_BITS = 4  # codes of more bits leave no room
CARRIER_MULTIPLIER = 8  # the largest m_k
CARRIER_SHIFT = 3  # the largest e_k
CARRIER_BLOCK = 64  # channels that share an e
BASES = torch.linspace(0.35, 1.3, 39)  # bases that are tried, relative to the largest scale / 8
CLIPS = torch.linspace(0.4, 1.0, 25).flip(0)  # shares of a token's range that are tried


def block_shifts(scale: torch.Tensor) -> torch.Tensor:
    """The shift e of each channel, from its free scales.

    Channels are sorted by their mean log scale, and each block of 64 has one e.

    Args:
        scale: free scales of all step groups [G, C].

    Returns:
        e [C], whole numbers 0..3 in float, at least one of them 0.
    """
    log = scale.log2().mean(0)
    order = log.argsort()
    top = torch.stack([log[block].max() for block in order.split(CARRIER_BLOCK)])
    e_block = (CARRIER_SHIFT - (top.max() - top).floor()).clamp_min(0)
    e_block = e_block - e_block.min()
    e = torch.empty_like(log)
    for block, shift in zip(order.split(CARRIER_BLOCK), e_block, strict=True):
        e[block] = shift
    return e


def carrier_ratios(
    scale: torch.Tensor, shift: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Candidates (base 0-d, ratio [C] = m_k * 2^e_k) for free scales [C] and shifts e [C]."""
    unit = scale / 2**shift
    for r in BASES.tolist():
        base = unit.max() * (r / CARRIER_MULTIPLIER)
        yield base, (unit / base).round().clamp(1, CARRIER_MULTIPLIER) * 2**shift


def snap_to_carrier(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    shift: torch.Tensor,
    bits: int,
    norm: float = 2.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The carrier grid with the least |error|^norm.

    Args:
        x: sampled values of each channel [C, n].
        scale: free scales [C].
        zero_point: their zero points [C].
        shift: e of each channel [C].
        bits: 2 to 4.
        norm: of the error.

    Returns:
        base (0-d), ratio [C] = m_k * 2^e_k, zero point [C].
    """
    levels = 2**bits - 1
    # the middle of each range stays where the search put it
    centre = (levels / 2 - zero_point) * scale

    def grids() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for base, ratio in carrier_ratios(scale, shift):
            z = (levels / 2 - centre / (base * ratio)).round().clamp(0, levels)
            yield base, ratio, torch.where(zero_point == 0, zero_point, z)

    def error(grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
        base, ratio, z = grid
        x_hat = fake_quant(x, (base * ratio)[:, None], z[:, None], bits)
        return power(x_hat.sub_(x), norm).sum().item()

    return min(grids(), key=error)


def snap_to_tokens(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, bits: int, norm: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grids of single tokens with the least |error|^norm: first the ratios, then the clip.

    More than 4 bits leave no room for ratios: they are 1.

    Args:
        x: sampled tokens [C, n].
        scale: free scales of the channels [C].
        shift: e of each channel [C].
        bits: 2 to 8.
        norm: of the error.

    Returns:
        clip (0-d), the share of a token's range that is kept, and ratio [C] = m_k * 2^e_k.
    """

    def error(ratio: torch.Tensor, clip: torch.Tensor) -> float:
        grid = token_grid(x * (1.0 / ratio)[:, None], clip, bits, 0)
        inverse = grid.inverse * (1.0 / ratio)[:, None]
        x_hat = fake_quant(x, grid.scale * ratio[:, None], grid.zero_point, bits, inverse)
        return power(x_hat.sub_(x), norm).sum().item()

    one = torch.ones((), dtype=scale.dtype, device=scale.device)
    ratio = torch.ones_like(scale)
    if bits <= CARRIER_BITS:
        ratio = min((r for _, r in carrier_ratios(scale, shift)), key=lambda r: error(r, one))
    clip = min((one * c for c in CLIPS.tolist()), key=lambda c: error(ratio, c))
    return clip, ratio


def split_ratio(
    top: torch.Tensor, ratio: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recover m and e from their product, for checkpoints of format 1, which do not hold e.

    Args:
        top: the largest ratio over all step groups [C], from which e follows.
        ratio: whole numbers of one step group [C].
        name: of the quantizer, for the error's message.

    Returns:
        m in 1..8 and e in 0..3 with m * 2^e = ratio, int64 [C] each.

    Raises:
        ConfigError: the ratios are not such products.
    """
    top = top.round().long()
    ratio = ratio.round().long()
    shift = torch.zeros_like(top)
    for _ in range(CARRIER_SHIFT):
        shift = torch.where((top >> shift) > CARRIER_MULTIPLIER, shift + 1, shift)
    multiplier = ratio >> shift
    inexact = (multiplier << shift != ratio).any()
    if inexact or multiplier.min() < 1 or multiplier.max() > CARRIER_MULTIPLIER:
        raise ConfigError(
            f"{name}: scale ratios {ratio.unique().tolist()} are not m * 2^e with m in 1..8 "
            "and one e a channel"
        )
    return multiplier, shift
