"""The quantizer of activations (paper, Sec. 3.1)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from questlib.config import OFF
from questlib.config_groups import Granularity
from questlib.errors import NotCalibratedError
from questlib.quantization import primitives
from questlib.quantization.carrier import CARRIER_BITS
from questlib.quantization.precision import FixedPrecision
from questlib.quantization.primitives import LearnedQuant
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.token_grid import TokenGrid, token_grid


class Recorder(Protocol):
    """What watches a quantizer's inputs while its range is searched."""

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch; may set the quantizer's range for the selected group."""

    @property
    def quantizes(self) -> bool:
        """Whether the quantizer then quantizes the batch, or passes it on as it is."""


class ActQuantizer(FixedPrecision):
    """Quantizes activations, with one set of parameters for each step group.

        x_hat = clamp(round(x / s), -z, 2^b - 1 - z) * s     with s_k = scale[p(k)] * ratio_k

    p(k) is the part of a split input that channel k is in. Per token, `scale` is the share of the
    token's range that is kept (`questlib.quantization.token_grid`), and there is no stored z.

    Args:
        name: for messages.
        bits: 2 to 8, or `OFF`.
        steps: the UNet's step groups.
        channels: C; 1 for a whole tensor whose channels do not matter, such as attention's
            probabilities.
        dim: the dimension of channels: 1 for convolutions, -1 for linear layers and attention.
        granularity: what has a scale of its own, see `questlib.config_groups.RangeConfig`.
            "carrier" needs 4 bits or fewer.
        parts: the part of each channel, int64 [C]; None: one part.
        unsigned: whether no input is negative.
        shifts: whether the operand that these activations meet has room for 2^e.

    Attributes:
        scale: float32 parameter [G, P]; per channel P = C.
        ratio: whole numbers m_k * 2^e_k in float32 [G, C]; 1 where a grid has none.
        shift: e_k, int64 [C], the same for all groups; 0 where a grid has none.
        zero_point: whole numbers 0..2^b - 1 in float32 [G, C].
        index: the set of parameters of each channel, int64 [C], values in 0..P - 1.
        calibrated: whether the ranges are set, bool 0-d.
        observer: takes the inputs while ranges are searched; None at all other times.
    """

    scale: torch.Tensor
    ratio: torch.Tensor
    shift: torch.Tensor
    zero_point: torch.Tensor
    index: torch.Tensor
    calibrated: torch.Tensor
    steps: StepGroups

    def __init__(
        self,
        name: str,
        bits: int,
        steps: StepGroups,
        channels: int,
        dim: int,
        granularity: Granularity = "tensor",
        *,
        parts: torch.Tensor | None = None,
        unsigned: bool = False,
        shifts: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.bits = bits
        self.dim = dim
        self.granularity = granularity
        self.unsigned = unsigned
        self.shifts = shifts
        # not a submodule: the UNet registers it once, all its quantizers share it
        self.__dict__["steps"] = steps
        if granularity == "channel":
            index = torch.arange(channels)
        elif parts is None:
            index = torch.zeros(channels, dtype=torch.int64)
        else:
            index = parts.clone()
        groups = steps.num_groups
        sets = int(index.max()) + 1
        self.scale = nn.Parameter(torch.ones(groups, sets))
        self.register_buffer("ratio", torch.ones(groups, channels))
        self.register_buffer("shift", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("zero_point", torch.zeros(groups, channels))
        self.register_buffer("index", index)
        self.register_buffer("calibrated", torch.tensor(False))
        self.enabled = bits != OFF
        self.observer: Recorder | None = None
        self._ready = False  # set once `calibrated` was seen: no device sync at every call

    @property
    def token(self) -> bool:
        """Whether each token has a grid of its own."""
        return self.granularity == "token"

    @property
    def carrier(self) -> bool:
        """Whether channels have ratios m_k * 2^e_k, for which wide codes leave no room."""
        return self.granularity in ("carrier", "token") and self.bits <= CARRIER_BITS

    def set_group(
        self,
        group: int,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        ratio: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> None:
        """Set the parameters of one step group.

        Args:
            group: its number.
            scale: [P].
            zero_point: [C].
            ratio: [C]; None: all 1.
            shift: e of the ratios [C], the same for every group; None: as it is (0 at first).
        """
        with torch.no_grad():
            self.scale[group].copy_(scale)
            self.zero_point[group].copy_(zero_point)
            self.ratio[group].copy_(torch.ones_like(zero_point) if ratio is None else ratio)
            if shift is not None:
                self.shift.copy_(shift)

    def parameters_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the selected group, to broadcast over x."""
        group = self.steps.current_of(len(x))
        scale = self.scale[group][..., self.index] * self.ratio[group]  # [C] or [B, C]
        shape = self._shape(scale, x.ndim)
        return scale.reshape(shape), self.zero_point[group].reshape(shape)

    def token_grids(self, x: torch.Tensor) -> tuple[TokenGrid, torch.Tensor]:
        """The grids of x's tokens, and the ratio, to broadcast over x.

        The grids have P entries at the dimension of channels, one for each part.
        """
        group = self.steps.current_of(len(x))
        ratio = self.ratio[group]  # [C] or [B, C]
        ratio = ratio.reshape(self._shape(ratio, x.ndim))
        clip = self.scale[group]  # [P] or [B, P]
        clip = clip.reshape(self._shape(clip, x.ndim))
        u = x * (1.0 / ratio)
        grids = []
        for part, own_clip in enumerate(clip.split(1, self.dim)):
            own = u
            if clip.shape[self.dim] > 1:
                own = u.index_select(self.dim, (self.index == part).nonzero()[:, 0])
            grids.append(token_grid(own, own_clip, self.bits, self.dim))
        return TokenGrid(*(torch.cat(v, self.dim) for v in zip(*grids, strict=True))), ratio

    def grid_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scale, zero point and (per token) 1 / scale, to broadcast over x."""
        if not self.token:
            return *self.parameters_for(x), None
        grid, ratio = self.token_grids(x)
        if grid.scale.shape[self.dim] > 1:
            grid = TokenGrid(*(v.index_select(self.dim, self.index) for v in grid))
        return grid.scale * ratio, grid.zero_point, grid.inverse * (1.0 / ratio)

    def note_calibrated(self) -> None:
        """See now whether the ranges are set, and not at the first call, which may be compiled."""
        self._ready = bool(self.calibrated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer.update(x.detach())
            if not self.observer.quantizes:
                return x
        if not self.enabled:
            return x
        if not self._ready and self.observer is None:
            if not bool(self.calibrated):
                raise NotCalibratedError(
                    f"{self.name}: activation scales were never calibrated; "
                    "run questlib.quantize with calibration data"
                )
            self._ready = True
        scale, zero_point, inverse = self.grid_for(x)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            return LearnedQuant.apply(x, scale, zero_point, self.bits, inverse).to(x.dtype)
        return primitives.fake_quant(x, scale, zero_point, self.bits, inverse).to(x.dtype)

    def _shape(self, table: torch.Tensor, ndim: int) -> list[int]:
        """The shape of a table [n] or [B, n] that broadcasts over `ndim` dimensions."""
        shape = [1] * ndim
        shape[0] = table.shape[0] if table.ndim == 2 else 1
        shape[self.dim] = table.shape[-1]
        return shape
