"""What stands before a quantized linear layer, and beside it, in methods that came after QuEST.

    y = Q(x') Q(W')^T + x' (up down)^T + bias     with x' = H (x / d)
                                                  and  W' = (W d) H^T - up down

- d, a divisor for each channel, moves outliers from activations to weights (SmoothQuant, Xiao et
  al. 2023, Eq. 4; SVDQuant, Li et al. 2025).
- H, an orthonormal Hadamard matrix, spreads an outlier over its neighbours (QuaRot, Ashkboos et al.
  2024; ViDiT-Q, Zhao et al. 2025).
- up down, a product of two thin matrices in 16 bits, takes the largest singular values off the
  weight (SVDQuant).

In exact arithmetic and without quantization y is what it was. The layer holds W', so that range
search, AdaRound and finetuning see a layer like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from questlib.quantization.precision import FixedPrecision


def largest_block(channels: int) -> int:
    """The largest power of two that divides a number of channels."""
    return channels & -channels


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply blocks of channels by the orthonormal Walsh-Hadamard matrix, which is its inverse.

    It is computed by additions in a fixed order, so that a row's result does not depend on the
    batch.

    Args:
        x: [..., C].
        block: channels of a block, a power of two that divides C.

    Returns:
        [..., C].

    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    shape = x.shape
    half = 1
    while half < block:
        pairs = x.reshape(-1, block // (2 * half), 2, half)
        a, b = pairs.unbind(2)
        x = torch.stack((a + b, a - b), 2)
        half *= 2
    return x.reshape(shape) * block**-0.5


class Transform(FixedPrecision):
    """What stands before a linear layer and beside it; see the module.

    Args:
        in_features: K.
        out_features: O.
        rotation: whether inputs are rotated.
        rank: r of the branch beside it, 0 for none; at most a quarter of K and of O. With so many a
            square layer's branch takes twice the bits of its 4-bit weights.
        smoothing: whether inputs are divided.

    Attributes:
        block: channels of a block of the rotation; 1: none.
        divisor: d, float32 [K]; None without smoothing.
        down: float16 [r, K]; None without a branch.
        up: float16 [O, r]; None without a branch.
    """

    divisor: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, rotation: bool, rank: int, smoothing: bool
    ) -> None:
        super().__init__()
        self.block = largest_block(in_features) if rotation else 1
        rank = min(rank, in_features // 4, out_features // 4)
        half = torch.float16
        self.register_buffer("divisor", torch.ones(in_features) if smoothing else None)
        self.register_buffer("down", torch.zeros(rank, in_features, dtype=half) if rank else None)
        self.register_buffer("up", torch.zeros(out_features, rank, dtype=half) if rank else None)

    @property
    def words(self) -> str:
        """For reports: "rotated", "smoothed, rank 32 beside it" and so on."""
        found = {
            "rotated": self.block > 1,
            "smoothed": self.divisor is not None,
            f"rank {0 if self.down is None else len(self.down)} beside it": self.down is not None,
        }
        return ", ".join(words for words, has in found.items() if has) or "as it is"

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> x', what the layer's quantizer receives."""
        if self.divisor is not None:
            x = x * (1.0 / self.divisor).to(x.dtype)
        return hadamard(x, self.block)

    def beside(self, x: torch.Tensor) -> torch.Tensor | None:
        """x' [..., K] -> [..., O], what the branch adds; None without one."""
        if self.down is None or self.up is None:
            return None
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def around(
        self, x: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The output [..., O] of a layer with this around it."""
        x = self.before(x)
        out = layer(x)
        beside = self.beside(x)
        return out if beside is None else out + beside

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """W [O, K] -> (W d) H^T, float32, from which the branch is not taken yet."""
        weight = weight.float()
        if self.divisor is not None:
            weight = weight * self.divisor
        return hadamard(weight, self.block)

    def weight(self, full: torch.Tensor) -> torch.Tensor:
        """W [O, K] -> W', float32: the weight that the layer holds."""
        weight = self.turned(full)
        if self.down is None or self.up is None:
            return weight
        return weight - self.up.float() @ self.down.float()

    def set_branch(self, weight: torch.Tensor) -> None:
        """Set the branch to the largest singular values of a weight (W d) H^T [O, K].

        Both factors have the square root of the singular values, so that neither leaves the range
        of 16 bits.
        """
        assert self.down is not None and self.up is not None
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        rank = len(self.down)
        root = s[:rank].sqrt()
        self.up.copy_(u[:, :rank] * root)
        self.down.copy_(root[:, None] * v[:rank])

    def wrong_values(self, values: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of values that no transform has, with the reason.

        Args:
            values: of the transform's own names, shapes and types, finite.
        """
        divisor = values.get("divisor")
        if divisor is not None and not bool((divisor > 0).all()):
            return ["divisor (expected positive numbers)"]
        return []
