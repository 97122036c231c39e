"""Activation and weight quantizers: modules with buffers and parameters, so state_dict, .to() and .parameters() see them.

A quantizer of b bits yields at most 2^b distinct values for each set of parameters, in every mode.
"""

from __future__ import annotations

import torch
from torch import nn

from questlib import ranges
from questlib.config import OFF
from questlib.errors import NotCalibratedError
from questlib.timesteps import StepGroups

HALF = 0.5 + 2**-24  # the float32 after 1/2: |d| < HALF just where |d| <= 1/2


def sum_to(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum a gradient over the dimensions along which `shape` was broadcast."""
    dims = [i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1]
    return grad.sum(dims, keepdim=True) if dims else grad


class LearnedQuant(torch.autograd.Function):
    """Fake quantization with straight-through rounding and a learned scale (LSQ): x, scale, zero_point broadcast together.

    d/dx = 1 inside the range, 0 outside; d/ds = (q - z) - x/s inside, (q - z) outside. The zero point is not trained.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits, inverse=None):
        inverse = 1.0 / scale if inverse is None else inverse
        d, q, out = (torch.empty_like(x, dtype=torch.result_type(x, inverse)) for _ in range(3))
        for part, u, r, y, s, z, inv in ranges.pieces(x, d, q, out, scale, zero_point, inverse):
            torch.mul(part, inv, out=u)
            ranges.clamp_(torch.round(u, out=r), z, bits)
            torch.sub(r, u, out=u)
            torch.mul(r, s, out=y)
        ctx.save_for_backward(d, q, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        d, q, scale = ctx.saved_tensors  # d = q - u, at most 1/2 just where u is inside the range
        grad_x, product = torch.empty_like(grad), torch.empty_like(grad)
        for g, e, r, inside, slope in ranges.pieces(grad, d, q, grad_x, product):
            # g where |d| <= 1/2, else 0; torch.where is five times as slow
            torch.ops.aten.hardtanh_backward(g, e, -HALF, HALF, grad_input=inside)
            if ctx.needs_input_grad[1]:  # g * d inside, g * q outside
                torch.sub(g, inside, out=slope).mul_(r).addcmul_(inside, e)
        grad_s = sum_to(product, scale.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_s, None, None, None


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
        self.carrier = carrier and bits <= 4  # wider codes leave no headroom in a byte: one scale a tensor
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

    def set_group(self, group: int, scale: torch.Tensor, zero_point: torch.Tensor, ratio: torch.Tensor | None = None) -> None:
        """Set one group's parameters: scale [P], zero_point [C], ratio [C] or None."""
        with torch.no_grad():
            self.scale[group].copy_(scale)
            self.zero_point[group].copy_(zero_point)
            self.ratio[group].copy_(torch.ones_like(zero_point) if ratio is None else ratio)

    def parameters_for(self, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the group in force, shaped to broadcast over an input of `ndim` dimensions."""
        g = self.steps.current
        scale, zero = self.scale[g][..., self.index] * self.ratio[g], self.zero_point[g]  # [C] or [B, C]
        lead = scale.shape[:-1] or (1,)
        shape = [1] * ndim
        shape[0], shape[self.dim] = lead[0], scale.shape[-1]
        return scale.reshape(shape), zero.reshape(shape)

    def token_grids(self, x: torch.Tensor) -> tuple[ranges.TokenGrid, torch.Tensor]:
        """Grids of x's tokens, with a place for each part where x has its channels, and the ratio, shaped to broadcast over x."""
        g, shape = self.steps.current, [1] * x.ndim
        ratio, clip = self.ratio[g], self.scale[g]  # [C], [P] or [B, C], [B, P]
        shape[0], shape[self.dim] = ratio.shape[0] if ratio.ndim == 2 else 1, ratio.shape[-1]
        ratio, u, grids = ratio.reshape(shape), x * (1.0 / ratio.reshape(shape)), []
        for part in range(clip.shape[-1]):
            own = u if clip.shape[-1] == 1 else u.index_select(self.dim, (self.index == part).nonzero()[:, 0])
            shape[self.dim] = 1
            grids.append(ranges.token_grid(own, clip[..., part].reshape(shape), self.bits, self.dim))
        return ranges.TokenGrid(*(torch.cat(v, self.dim) for v in zip(*grids, strict=True))), ratio

    def grid_for(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scale, zero point and (per token) 1 / scale, to broadcast over x."""
        if not self.token:
            return *self.parameters_for(x.ndim), None
        grid, ratio = self.token_grids(x)
        if grid.scale.shape[self.dim] > 1:
            grid = ranges.TokenGrid(*(v.index_select(self.dim, self.index) for v in grid))
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
        return ranges.fake_quant(x, scale, zero, self.bits, inverse)


class WeightQuantizer(nn.Module):
    """Per output channel (and per part of a split input): scale, zero_point float32 [O, P]; input channel i is in part index[i].

    Codes are round(w / s) + z in 0..2^b - 1. While AdaRound runs, `alpha` [like w] decides rounding up by a rectified sigmoid
    (Nagel et al. 2020, Eq. 23); `harden` then moves w into the chosen cell, so that round-to-nearest gives AdaRound's codes.
    """

    GAMMA, ZETA = -0.1, 1.1

    def __init__(self, weight: torch.Tensor, bits: int, index: torch.Tensor, method: str) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("index", index)  # [I]
        w = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach()[..., None]  # [O, I, kh*kw]
        scales, zeros = [], []
        for part in range(int(index.max()) + 1):
            rows = w[:, index == part].flatten(1).float()  # [O, n]
            s, z = ranges.search(rows, rows.amin(1), rows.amax(1), bits, method)
            scales.append(s), zeros.append(z)
        self.register_buffer("scale", torch.stack(scales, 1))
        self.register_buffer("zero_point", torch.stack(zeros, 1))
        self.alpha: nn.Parameter | None = None

    def expand(self, table: torch.Tensor, ndim: int) -> torch.Tensor:
        """[O, P] -> broadcastable over the weight: [O, 1, ...] for one part, else [O, I, ...]."""
        table = table if table.shape[1] == 1 else table[:, self.index]
        return table.reshape(*table.shape, *[1] * (ndim - 2))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        s, z = self.expand(self.scale, w.ndim), self.expand(self.zero_point, w.ndim)
        if self.alpha is not None:
            q = ((w.detach() * (1.0 / s)).floor() + self.rounding()).clamp(-z, 2**self.bits - 1 - z)
            return q * s
        if torch.is_grad_enabled() and w.requires_grad:
            return LearnedQuant.apply(w, s, z, self.bits)
        return ranges.fake_quant(w, s, z, self.bits)

    def codes(self, w: torch.Tensor) -> torch.Tensor:
        """Integer codes, uint8, shaped like w."""
        s, z = self.expand(self.scale, w.ndim), self.expand(self.zero_point, w.ndim)
        return ((w * (1.0 / s)).round() + z).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        s, z = self.expand(self.scale, codes.ndim), self.expand(self.zero_point, codes.ndim)
        return (codes.to(s.dtype) - z) * s

    # ---- AdaRound ----
    def start_adaround(self, w: torch.Tensor) -> nn.Parameter:
        s = self.expand(self.scale, w.ndim)
        u = w.detach() * (1.0 / s)  # as in forward and harden: w / s has another floor for a few weights in a million
        frac = u - u.floor()
        p = (frac - self.GAMMA) / (self.ZETA - self.GAMMA)
        self.alpha = nn.Parameter(torch.log(p / (1 - p)))  # rounding() starts at frac: the full-precision weight
        return self.alpha

    def rounding(self) -> torch.Tensor:
        return (torch.sigmoid(self.alpha) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)

    @torch.no_grad()
    def harden(self, w: torch.Tensor) -> torch.Tensor:
        """End AdaRound: the point of the chosen rounding cell that is nearest to w. Weights near a border stay near it."""
        s, z = self.expand(self.scale, w.ndim), self.expand(self.zero_point, w.ndim)
        u = w * (1.0 / s)
        cell = (u.floor() + (self.rounding() >= 0.5)).clamp(-z, 2**self.bits - 1 - z)
        self.alpha = None
        return u.clamp(cell - 0.49, cell + 0.49).mul_(s)
