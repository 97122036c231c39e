"""The quantizer of activations."""

from __future__ import annotations

import torch
from torch import nn

from questlib.config import OFF
from questlib.errors import NotCalibratedError
from questlib.quantization import primitives, token_grid
from questlib.quantization.primitives import LearnedQuant
from questlib.quantization.step_groups import StepGroups


class ActQuantizer(nn.Module):
    """Activation quantizer, one set of parameters for each step group: static, or with the range of each token as it comes.

    scale     float32 [G, P] parameter; P sets of parameters, channel c uses set index[c]; per token: the share of the range
              that is kept
    ratio     float32 [G, C] integers m_k * 2^e of the carrier format, or 1: effective scale = scale[:, index] * ratio
    zero_point float32 [G, C] integers 0..2^b - 1; per token: unused
    `dim` is the channel dimension of the input (1 for convolutions, -1 for linears and attention operands).
    """

    def __init__(
        self,
        name: str,
        bits: int,
        steps: StepGroups,
        channels: int,
        dim: int,
        index: torch.Tensor,
        unsigned: bool = False,
        carrier: bool = False,
        shifts: bool = False,
        token: bool = False,
    ):
        super().__init__()
        self.name, self.bits, self.dim, self.unsigned = name, bits, dim, unsigned
        self.carrier = (
            carrier and bits <= 4
        )  # wider codes leave no headroom in a byte: one scale a tensor
        self.token = token
        self.shifts = shifts  # whether the other operand has room for the 2^e of the carrier format
        self.__dict__["steps"] = steps  # shared state of the whole UNet, registered once there
        groups, sets = steps.num_groups, int(index.max()) + 1
        self.scale = nn.Parameter(torch.ones(groups, sets))
        self.register_buffer("ratio", torch.ones(groups, channels))
        self.register_buffer("zero_point", torch.zeros(groups, channels))
        self.register_buffer("index", index)
        self.register_buffer("calibrated", torch.tensor(False))
        self.enabled = bits != OFF
        self.observer = None
        self._ready = False  # set once `calibrated` was seen: no device sync at every call

    def set_group(
        self,
        group: int,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        ratio: torch.Tensor | None = None,
    ) -> None:
        """Set one group's parameters: scale [P], zero_point [C], ratio [C] or None."""
        with torch.no_grad():
            self.scale[group].copy_(scale)
            self.zero_point[group].copy_(zero_point)
            self.ratio[group].copy_(torch.ones_like(zero_point) if ratio is None else ratio)

    def parameters_for(self, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the group in force, shaped to broadcast over an input of `ndim` dimensions."""
        g = self.steps.current
        scale, zero = (
            self.scale[g][..., self.index] * self.ratio[g],
            self.zero_point[g],
        )  # [C] or [B, C]
        lead = scale.shape[:-1] or (1,)
        shape = [1] * ndim
        shape[0], shape[self.dim] = lead[0], scale.shape[-1]
        return scale.reshape(shape), zero.reshape(shape)

    def token_grids(self, x: torch.Tensor) -> tuple[token_grid.TokenGrid, torch.Tensor]:
        """Grids of x's tokens, with a place for each part where x has its channels, and the ratio, shaped to broadcast over x."""
        g, shape = self.steps.current, [1] * x.ndim
        ratio, clip = self.ratio[g], self.scale[g]  # [C], [P] or [B, C], [B, P]
        shape[0], shape[self.dim] = ratio.shape[0] if ratio.ndim == 2 else 1, ratio.shape[-1]
        ratio, u, grids = ratio.reshape(shape), x * (1.0 / ratio.reshape(shape)), []
        for part in range(clip.shape[-1]):
            own = (
                u
                if clip.shape[-1] == 1
                else u.index_select(self.dim, (self.index == part).nonzero()[:, 0])
            )
            shape[self.dim] = 1
            grids.append(
                token_grid.token_grid(own, clip[..., part].reshape(shape), self.bits, self.dim)
            )
        return token_grid.TokenGrid(
            *(torch.cat(v, self.dim) for v in zip(*grids, strict=True))
        ), ratio

    def grid_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scale, zero point and (per token) 1 / scale, to broadcast over x."""
        if not self.token:
            return *self.parameters_for(x.ndim), None
        grid, ratio = self.token_grids(x)
        if grid.scale.shape[self.dim] > 1:
            grid = token_grid.TokenGrid(*(v.index_select(self.dim, self.index) for v in grid))
        return grid.scale * ratio, grid.zero_point, grid.inverse * (1.0 / ratio)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer.update(x.detach())
            return x
        if not self.enabled:
            return x
        if not self._ready:
            if not bool(self.calibrated):
                raise NotCalibratedError(
                    f"{self.name}: activation scales were never calibrated; run questlib.quantize with calibration data"
                )
            self._ready = True
        scale, zero, inverse = self.grid_for(x)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            return LearnedQuant.apply(x, scale, zero, self.bits, inverse)
        return primitives.fake_quant(x, scale, zero, self.bits, inverse)
