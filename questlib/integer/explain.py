"""One output value of one layer, number by number: for notebooks, and for whoever asks what "executes in integers" means."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from questlib.errors import EngineError
from questlib.integer.form import integer_form
from questlib.quantization.layers import QuantLayer


@torch.no_grad()
def one_output(
    layer: QuantLayer, x: torch.Tensor, output: int = 0, position: int = 0
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The terms of output channel `output` at `position` (row of a linear layer, pixel of a convolution's first image).

    layer: quantized, one group, input in one part; x as the layer takes it. Returns (one row a term: x, code, zero point,
    multiplier, a = (code - zero point) * multiplier, weight w, product a w; and the sums and results of both ways to compute it).
    EngineError when the layer has no integer form, or grids a token.
    """
    form = integer_form(layer, layer.input_quantizer.name.removesuffix(".input_quantizer"))
    grid, part = form.grids[layer.input_quantizer.steps.current][0], form.parts[0]
    if isinstance(layer, nn.Conv2d):
        terms = F.unfold(x[:1], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[
            0, :, position
        ]  # [C * kh * kw]
        simulated = layer(x[:1])[0, output].flatten()[position]
    else:
        terms = x.reshape(-1, x.shape[-1])[position]
        simulated = layer(x).reshape(-1, layer.out_features)[position, output]
    repeat = len(terms) // len(layer.input_quantizer.index)

    def each(values: torch.Tensor) -> torch.Tensor:
        return values.expand(len(layer.input_quantizer.index)).repeat_interleave(repeat)

    if form.token:
        raise EngineError(f"{form.name}: expected a static activation grid, found one a token")
    inverse, low, high = each(grid.inverse), each(grid.low), each(grid.high)
    multiplier = each(torch.ones(1, dtype=torch.int32) if grid.uniform else grid.multiplier)
    centred = (terms * inverse).round().clamp(low, high).int()
    a = centred * multiplier
    w = part.weight[output].flatten().int() + (0 if part.offset is None else part.offset[output])
    total, bias = int((a.long() * w).sum()), 0.0 if form.bias is None else float(form.bias[output])
    table = pd.DataFrame(
        {
            "x": terms,
            "code q": centred - low,
            "zero point z": -low,
            "multiplier m": multiplier,
            "a = (q - z) m": a,
            "w": w,
            "a w": a * w,
        }
    )
    integer = total * grid.base * float(part.scale[output]) + bias
    sums = {
        "sum of a w": total,
        "base": grid.base,
        "scale": float(part.scale[output]),
        "bias": bias,
    }
    return table, sums | {"in integers": integer, "simulated": float(simulated)}
