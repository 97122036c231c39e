"""Codes of weights as bytes: up to 4 bits two consecutive codes share one."""

from __future__ import annotations

import torch

from questlib.errors import CheckpointError


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of any shape -> uint8 [n] bytes.

    Up to 4 bits two consecutive codes share a byte, the first in the low nibble.
    """
    flat = codes.flatten()
    if bits > 4:
        return flat.contiguous()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack(
    packed: torch.Tensor, bits: int, shape: torch.Size, name: str = "packed weight"
) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes of this shape. `name` is the layer's, for messages.

    Raises:
        CheckpointError: the number of bytes does not fit the shape, or a code exceeds `bits`.
    """
    n = shape.numel()
    expected = packed_size(n, bits)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise CheckpointError(
            f"{name}: expected {expected} bytes for shape {list(shape)} at {bits} bits, "
            f"found {packed.numel()}"
        )
    codes = packed if bits > 4 else torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]
    if n and int(codes.max()) >= 2**bits:
        raise CheckpointError(f"{name}: code {int(codes.max())} exceeds {bits} bits")
    return codes.reshape(shape)


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` weight codes in a checkpoint: up to 4 bits two codes share a byte."""
    return (count + 1) // 2 if bits <= 4 else count
