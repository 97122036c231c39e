"""One output value of one layer, number by number: what "executes in integers" means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from questlib.errors import EngineError
from questlib.integer.form import group_in_force, integer_form
from questlib.quantization.layers import QuantLayer

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class OneOutput:
    """The K products of one output value, and the sums and results of both ways to compute it."""

    x: torch.Tensor  # float [K]
    code: torch.Tensor  # int32 [K]: q
    zero_point: torch.Tensor  # int32 [K]: z
    multiplier: torch.Tensor  # int32 [K]: m
    a: torch.Tensor  # int32 [K]: (q - z) m
    w: torch.Tensor  # int32 [K]
    total: int  # the sum of a w
    base: float
    scale: float  # of the output channel
    bias: float
    simulated: float  # the layer's own output

    def __len__(self) -> int:
        return len(self.x)

    @property
    def in_integers(self) -> float:
        """The output from the integer sum."""
        return self.total * self.base * self.scale + self.bias

    def sums(self) -> dict[str, float]:
        """The sum, what it is multiplied with, and both results, by name."""
        return {
            "sum of a w": self.total,
            "base": self.base,
            "scale": self.scale,
            "bias": self.bias,
            "in integers": self.in_integers,
            "simulated": self.simulated,
        }

    def frame(self) -> pd.DataFrame:
        """One row a product, as a table of pandas, which must be installed for this."""
        import pandas as pd

        return pd.DataFrame(
            {
                "x": self.x,
                "code q": self.code,
                "zero point z": self.zero_point,
                "multiplier m": self.multiplier,
                "a = (q - z) m": self.a,
                "w": self.w,
                "a w": self.a * self.w,
            }
        )


@torch.no_grad()
def one_output(layer: QuantLayer, x: torch.Tensor, output: int = 0, position: int = 0) -> OneOutput:
    """Compute one output value of a layer, in integers and simulated.

    Args:
        layer: quantized, with one group and its input in one part.
        x: the layer's input.
        output: the output channel.
        position: a row of a linear layer, or a pixel of a convolution's first image.

    Raises:
        EngineError: the layer has no integer form, or a grid a token.

    Example:
        >>> found = one_output(layer, x, output=0, position=5)
        >>> found.in_integers, found.simulated
    """
    act = layer.input_quantizer
    form = integer_form(layer, act.name.removesuffix(".input_quantizer"))
    if form.token:
        raise EngineError(f"{form.name}: expected a static activation grid, found one a token")
    grid = form.grids[group_in_force(act.steps, form.name)][0]
    part = form.parts[0]
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        terms = F.unfold(x[:1], *geometry)[0, :, position]  # [C * kh * kw]
        simulated = layer(x[:1])[0, output].flatten()[position]
    else:
        terms = x.reshape(-1, x.shape[-1])[position]  # [C]
        simulated = layer(x).reshape(-1, layer.out_features)[position, output]
    channels = len(act.index)
    taps = len(terms) // channels

    def each(values: torch.Tensor) -> torch.Tensor:
        """[C] or [1] -> [K]"""
        return values.expand(channels).repeat_interleave(taps)

    low = each(grid.low)
    one = torch.ones(1, dtype=torch.int32)
    multiplier = each(one if grid.multiplier is None else grid.multiplier)
    centred = (terms * each(grid.inverse)).round().clamp(low, each(grid.high)).int()  # q - z
    a = centred * multiplier
    w = part.weight[output].flatten().int()
    if part.compensation is not None:
        w = w + part.compensation[output]
    return OneOutput(
        x=terms,
        code=centred - low,
        zero_point=-low,
        multiplier=multiplier,
        a=a,
        w=w,
        total=int((a.long() * w).sum()),
        base=grid.base,
        scale=float(part.scale[output]),
        bias=0.0 if form.bias is None else float(form.bias[output]),
        simulated=float(simulated),
    )
