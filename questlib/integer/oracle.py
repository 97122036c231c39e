"""The exact integer form of quantized layers, in int64: what every engine must equal, and what fake quantization simulates.

    y_o = sum_p  base_p * s_{o,p} * acc_{o,p} + bias_o
    acc_{o,p} = sum_{k in part p}  [(qa_k - za_k) m_k] * [(qw_ok - zw_op) 2^{e_k}]

where part p is one half of a split input (one part otherwise), and the activation scale is base_p * m_k * 2^{e_k} with integers
m_k and e_k (m_k = 1, e_k = 0 for one scale a tensor). Per token, base_p and za are the token's own. With 4-bit codes both
brackets fit a signed byte; padding adds nothing, since its code is the zero point.
Free per-channel scales (act_granularity "channel": the paper's and the release's W4A4) have no such form and are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from questlib.errors import ConfigError
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.carrier import split_ratio
from questlib.quantization.layers import QuantLayer

BYTE = 127


class Carried(NamedTuple):
    """An activation in integers: values int64 like x; base float32 [P], or per token like x with P where x has its channels;
    shift int64 [C], to be put on the weights."""

    values: torch.Tensor
    base: torch.Tensor
    shift: torch.Tensor


def carry(x: torch.Tensor, act: ActQuantizer) -> Carried:
    """x -> (q - z) * m_k in int64, codes by fake quantization's own formula. ConfigError without integer form."""
    if not isinstance(act.steps.current, int):
        raise ConfigError(
            f"{act.name}: integer execution takes one step group a call, found timesteps of several groups in the batch"
        )
    group, channels = act.steps.current, len(act.index)
    if channels > 2 and act.scale.shape[1] == channels:
        raise ConfigError(
            f"{act.name}: free per-channel scales cannot run in integers; use act_granularity 'carrier' or 'tensor'"
        )
    multiplier, shift = split_ratio(act.ratio.amax(0), act.ratio[group], act.name)
    scale, zero, inverse = act.grid_for(x)
    inverse = 1.0 / scale if inverse is None else inverse
    codes = (x * inverse).round().clamp(-zero, 2**act.bits - 1 - zero).long()  # q - z
    shape = [1] * x.ndim
    shape[act.dim] = channels
    values = codes * multiplier.reshape(shape)
    if act.bits <= 4 and values.numel() and int(values.abs().max()) > BYTE:
        raise ConfigError(
            f"{act.name}: carried value {int(values.abs().max())} does not fit a signed byte"
        )
    base = act.token_grids(x)[0].scale if act.token else act.scale[group]
    return Carried(values, base.detach(), shift)


def accumulate(x: torch.Tensor, w: torch.Tensor, layer: QuantLayer) -> torch.Tensor:
    """int64 x [B, C, H, W] or [..., C] and w like layer.weight -> int64 accumulators [B, O, H', W'] or [..., O]."""
    if isinstance(layer, nn.Linear):
        return x @ w.T
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ConfigError(
            f"integer convolution: expected zero padding given in pixels, found {layer.padding_mode} {layer.padding!r}"
        )
    (sh, sw), (ph, pw), (dh, dw), g = layer.stride, layer.padding, layer.dilation, layer.groups
    kh, kw = w.shape[2:]
    x = F.pad(x, (pw, pw, ph, ph))
    b, c, height, width = x.shape
    rows, cols = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    out = torch.zeros(b, g, w.shape[0] // g, rows, cols, dtype=torch.int64)
    w = w.reshape(g, -1, *w.shape[1:])  # [G, O / G, C / G, kh, kw]
    for i in range(kh):
        for j in range(kw):
            tap = x[
                :,
                :,
                i * dh : i * dh + sh * (rows - 1) + 1 : sh,
                j * dw : j * dw + sw * (cols - 1) + 1 : sw,
            ]
            tap = tap.reshape(b, g, c // g, rows * cols)  # [B, G, C / G, H' W']
            out += (w[None, :, :, :, i, j] @ tap).reshape(out.shape)
    return out.flatten(1, 2)


def layer_forward(layer: QuantLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one quantized layer in integers: (output float32 as the layer's own forward gives it, accumulators int64 [P, ...])."""
    if layer.weight_quantizer is None or not layer.input_quantizer.enabled:
        raise ConfigError(
            f"{layer.input_quantizer.name}: integer execution needs quantized weights and activations"
        )
    act, base, shift = carry(x, layer.input_quantizer)
    wq, ndim = layer.weight_quantizer, layer.weight.ndim
    w = wq.codes(layer.weight.detach()).long() - wq.expand(wq.zero_point, ndim).long()
    parts, groups = wq.scale.shape[1], getattr(layer, "groups", 1)
    if groups > 1 and bool(shift.any()):
        raise ConfigError(
            f"{layer.input_quantizer.name}: block shifts on a grouped convolution have no integer form here"
        )
    if groups == 1:
        w = w << shift.reshape(1, -1, *[1] * (ndim - 2))
    if layer.weight_quantizer.bits <= 4 and int(w.abs().max()) > BYTE:
        raise ConfigError(
            f"{layer.input_quantizer.name}: carried weight {int(w.abs().max())} does not fit a signed byte"
        )
    out_shape = (1, -1, 1, 1) if ndim == 4 else (-1,)
    accs, y = [], 0.0
    for part in range(parts):
        own = (wq.index == part).long().reshape(1, -1, *[1] * (ndim - 2))
        acc = accumulate(act, w * own, layer)
        dim = layer.input_quantizer.dim if layer.input_quantizer.token else 0
        own_base = base.narrow(dim, part if base.shape[dim] > 1 else 0, 1).double()
        y = y + acc.double() * own_base * wq.scale[:, part].double().reshape(out_shape)
        accs.append(acc)
    if layer.bias is not None:
        y = y + layer.bias.double().reshape(out_shape)
    return y.float(), torch.stack(accs)


def attention_scores(q: Carried, k: Carried, heads: int) -> torch.Tensor:
    """q [B, N, C], k [B, M, C] in integers -> q k^T for each head, float32 [B, heads, N, M], before the softmax's scaling."""

    def split(x: Carried) -> torch.Tensor:  # [B, N, heads * d] -> [B, heads, N, d]
        return (x.values << x.shift).unflatten(-1, (heads, -1)).transpose(1, 2)

    return (
        (split(q) @ split(k).transpose(-1, -2)).double() * (q.base.double() * k.base.double())
    ).float()
