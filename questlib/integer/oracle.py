"""The oracle of integer execution, in int64: what every engine must equal bit for bit.

    y_o = sum_p  base_p * s_{o,p} * acc_{o,p} + bias_o
    acc_{o,p} = sum_{k in part p}  [(qa_k - za_k) m_k] * [(qw_ok - zw_op) 2^{e_k}]

Part p is one half of a split input; most inputs have one part. The activation's scale is
base_p * m_k * 2^{e_k} with integers m_k and e_k (m_k = 1 and e_k = 0 where a tensor has one scale).
Per token, base_p and za are the token's own. With codes of up to 4 bits both brackets fit a signed
byte; padding adds nothing, since its code is the zero point.

Free per-channel scales (act_granularity "channel": the paper's and the release's W4A4) have no such
form and are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from questlib.errors import ConfigError
from questlib.integer.form import BYTE, multipliers
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.layers import QuantLayer


class Carried(NamedTuple):
    """An activation in integers."""

    values: torch.Tensor  # int64 like x
    base: torch.Tensor  # float32 [P]; per token like x, with P where x has its channels
    shift: torch.Tensor  # int64 [C], to be put on the weights


def carry(x: torch.Tensor, act: ActQuantizer) -> Carried:
    """x -> (q - z) * m_k, with codes q by fake quantization's own formula.

    Raises:
        ConfigError: the quantizer has no integer form.
    """
    group = act.steps.current
    if not isinstance(group, int):
        raise ConfigError(
            f"{act.name}: integer execution takes one step group a call, "
            "found timesteps of several groups in the batch"
        )
    if act.granularity == "channel":
        raise ConfigError(
            f"{act.name}: free per-channel scales cannot run in integers; "
            "use act_granularity 'carrier' or 'tensor'"
        )
    multiplier = multipliers(act.ratio[group], act.shift, act.name)
    scale, zero, inverse = act.grid_for(x)
    inverse = 1.0 / scale if inverse is None else inverse
    codes = (x * inverse).round().clamp(-zero, 2**act.bits - 1 - zero).long()  # q - z
    shape = [1] * x.ndim
    shape[act.dim] = -1
    values = codes * multiplier.reshape(shape)
    if act.bits <= 4:
        _check_byte(values, "value", act.name)
    base = act.token_grids(x)[0].scale if act.token else act.scale[group]
    return Carried(values, base.detach(), act.shift)


def _check_byte(values: torch.Tensor, what: str, name: str) -> None:
    largest = int(values.abs().max()) if values.numel() else 0
    if largest > BYTE:
        raise ConfigError(f"{name}: carried {what} {largest} does not fit a signed byte")


def accumulate(x: torch.Tensor, w: torch.Tensor, layer: QuantLayer) -> torch.Tensor:
    """The integer sums of a layer, tap by tap.

    Args:
        x: int64 [..., C] or [B, C, H, W].
        w: int64, shaped like the layer's weight.
        layer: for its geometry.

    Returns:
        int64 [..., O] or [B, O, H', W'].

    Raises:
        ConfigError: padding that is not zero, or not given in pixels.
    """
    if isinstance(layer, nn.Linear):
        return x @ w.T
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ConfigError(
            "integer convolution: expected zero padding given in pixels, "
            f"found {layer.padding_mode} {layer.padding!r}"
        )
    sh, sw = layer.stride
    ph, pw = layer.padding
    dh, dw = layer.dilation
    groups = layer.groups
    kh, kw = w.shape[2:]
    x = F.pad(x, (pw, pw, ph, ph))
    b, c, height, width = x.shape
    rows = (height - dh * (kh - 1) - 1) // sh + 1
    cols = (width - dw * (kw - 1) - 1) // sw + 1
    out = torch.zeros(b, groups, w.shape[0] // groups, rows, cols, dtype=torch.int64)
    w = w.reshape(groups, -1, *w.shape[1:])  # [G, O / G, C / G, kh, kw]
    for i in range(kh):
        for j in range(kw):
            tap = x[:, :, i * dh :: sh, j * dw :: sw][:, :, :rows, :cols]
            tap = tap.reshape(b, groups, c // groups, rows * cols)  # [B, G, C / G, H' W']
            out += (w[None, :, :, :, i, j] @ tap).reshape(out.shape)
    return out.flatten(1, 2)


def layer_forward(layer: QuantLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one quantized layer in integers.

    Returns:
        The output in float32, as the layer's own forward gives it, and the accumulators int64
        [P, ...] of its parts.

    Raises:
        ConfigError: the layer has no integer form.
    """
    act = layer.input_quantizer
    wq = layer.weight_quantizer
    if wq is None or not act.enabled:
        raise ConfigError(f"{act.name}: integer execution needs quantized weights and activations")
    values, base, shift = carry(x, act)
    ndim = layer.weight.ndim
    per_channel = (1, -1, *[1] * (ndim - 2))  # over a weight's input channels
    w = layer.codes().long() - wq.expand(wq.zero_point, ndim).long()
    if getattr(layer, "groups", 1) == 1:
        w = w << shift.reshape(per_channel)
    elif bool(shift.any()):
        raise ConfigError(
            f"{act.name}: block shifts on a grouped convolution have no integer form here"
        )
    if wq.bits <= 4:
        _check_byte(w, "weight", act.name)
    out_shape = (1, -1, 1, 1) if ndim == 4 else (-1,)
    dim = act.dim if act.token else 0  # where `base` has its parts
    sums = []
    y = torch.zeros((), dtype=torch.float64)
    for part in range(wq.scale.shape[1]):
        own = (wq.index == part).long().reshape(per_channel)
        acc = accumulate(values, w * own, layer)
        own_base = base.narrow(dim, part if base.shape[dim] > 1 else 0, 1).double()
        y = y + acc.double() * own_base * wq.scale[:, part].double().reshape(out_shape)
        sums.append(acc)
    if layer.bias is not None:
        y = y + layer.bias.double().reshape(out_shape)
    return y.float(), torch.stack(sums)


def attention_scores(q: Carried, k: Carried, heads: int) -> torch.Tensor:
    """q k^T of each head, before the softmax's scaling.

    Args:
        q: of [B, N, C].
        k: of [B, M, C].
        heads: number of heads.

    Returns:
        float32 [B, heads, N, M].
    """

    def split(x: Carried) -> torch.Tensor:  # [B, N, heads * d] -> [B, heads, N, d]
        return (x.values << x.shift).unflatten(-1, (heads, -1)).transpose(1, 2)

    scores = split(q) @ split(k).transpose(-1, -2)
    return (scores.double() * (q.base.double() * k.base.double())).float()
