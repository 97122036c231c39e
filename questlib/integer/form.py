"""The integer form of a quantized layer: what every engine executes, made once for each layer.

    y_o = bias_o + sum_p base_p s_op acc_op
    acc_op = sum_k a_k (w_ok + compensation_op)
    a_k = (q_k - z_k) m_k

Part p is one half of a split input; most inputs have one part. Per token, base_p and z are each
token's own, from the range of its channels (`Grid.token`).

w is a signed byte: the centred weight code, shifted left by e_k in the carrier format. Codes of
more than 4 bits do not fit a byte once centred: their part has a `compensation` for each output
channel, and engines add compensation_o * sum_k a_k. a_k is a signed byte for activations of up to 4
bits; wider ones, which have uniform grids only, give q - z in -255..255.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from questlib.errors import ConfigError, EngineError
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.carrier import CARRIER_MULTIPLIER
from questlib.quantization.layers import QuantLayer
from questlib.quantization.packed_codes import packed_size
from questlib.quantization.step_groups import StepGroups

BYTE = 127
INT32 = 2**31 - 1


class Token(NamedTuple):
    """How the range of a token becomes its grid (`quantization.token_grid`)."""

    clip: torch.Tensor  # float32, one value: the share of the range that is kept
    bits: int


class Grid(NamedTuple):
    """The grid of one part of an activation in one step group.

    a = clamp(round(x * inverse), low, high) * multiplier, and x is about base * a * 2^e. A uniform
    grid has one entry in place of C. Per token, `inverse` is 1 / ratio, `low` and `high` are the
    widest bounds that a zero point can give, and `base` is 1.
    """

    inverse: torch.Tensor  # float32 [C] or [1]: 1 / scale, as fake quantization computes it
    low: torch.Tensor  # int32 [C] or [1]: -zero_point
    high: torch.Tensor  # int32 [C] or [1]: 2^bits - 1 - zero_point
    multiplier: torch.Tensor | None  # int32 [C] in 1..8; None for a uniform grid
    base: float
    token: Token | None = None

    @property
    def uniform(self) -> bool:
        return self.multiplier is None

    @property
    def max_abs(self) -> int:
        """The largest |a| that can occur."""
        most = torch.maximum(-self.low, self.high)
        return int((most if self.multiplier is None else most * self.multiplier).max())

    def to(self, device: torch.device | str) -> Grid:
        return Grid(
            inverse=self.inverse.to(device),
            low=self.low.to(device),
            high=self.high.to(device),
            multiplier=None if self.multiplier is None else self.multiplier.to(device),
            base=self.base,
            token=self.token and self.token._replace(clip=self.token.clip.to(device)),
        )


class WeightPart(NamedTuple):
    """The weights for the C input channels start..stop (C / groups in a grouped convolution)."""

    start: int
    stop: int
    weight: torch.Tensor  # int8 [O, C] or [O, C, kh, kw]
    compensation: torch.Tensor | None  # int32 [O]; None: all zero
    scale: torch.Tensor  # float32 [O]
    shift: torch.Tensor  # int64 [C]: the e by which `weight` is shifted already


@dataclass(frozen=True)
class IntegerForm:
    """A layer's name and geometry, its weights as integers, and its activations' grids."""

    name: str
    layer: nn.Linear | nn.Conv2d  # for its geometry: stride, padding, dilation, groups
    weight_bits: int
    act_bits: int
    parts: tuple[WeightPart, ...]
    grids: tuple[tuple[Grid, ...], ...]  # [step group][part]
    bias: torch.Tensor | None  # float32 [O]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights in a checkpoint."""
        return packed_size(self.layer.weight.numel(), self.weight_bits)

    @property
    def carrier(self) -> bool:
        return not all(grid.uniform for group in self.grids for grid in group)

    @property
    def token(self) -> bool:
        return self.grids[0][0].token is not None

    @property
    def format(self) -> str:
        """For reports: "W4A4 carrier", "W8A8 tensor", "W4A4 token carrier" and so on."""
        kinds = {"token": self.token, "carrier": self.carrier}
        words = " ".join(kind for kind, has in kinds.items() if has) or "tensor"
        return f"W{self.weight_bits}A{self.act_bits} {words}"

    def digest(self) -> torch.Tensor:
        """sha256, uint8 [32], of everything that is executed.

        Engines keep it in their state_dict, in place of weights whose layout is theirs alone: it
        tells models apart.
        """
        values: list[object] = [self.bias]
        for grid in (grid for group in self.grids for grid in group):
            values += [*grid[:-1], *(grid.token or ())]
        for part in self.parts:
            values += part
        digest = hashlib.sha256()
        for value in values:
            if isinstance(value, torch.Tensor):
                digest.update(value.cpu().contiguous().numpy())
            else:
                digest.update(repr(value).encode())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def group_in_force(steps: StepGroups, name: str) -> int:
    """The step group of the present call.

    Raises:
        EngineError: the batch has timesteps of several groups.
    """
    if not isinstance(steps.current, int):
        raise EngineError(
            f"{name}: integer execution takes one step group a call, "
            "found timesteps of several groups in the batch"
        )
    return steps.current


# ---- activations ----


def act_grids(
    act: ActQuantizer, part_index: torch.Tensor, name: str
) -> tuple[tuple[tuple[Grid, ...], ...], torch.Tensor]:
    """The grids of an activation quantizer, and the shift e of the weights of each channel.

    Args:
        act: the quantizer, calibrated.
        part_index: int64 [C], the part that each channel is in.
        name: of the layer, for messages.

    Returns:
        Grids [step group][part], and e int64 [C].

    Raises:
        EngineError: the grids have no integer form.
        ConfigError: a scale ratio is not m * 2^e.
    """
    if act.granularity == "channel":
        raise EngineError(
            f"{name}: free per-channel scales cannot run in integers; "
            "use act_granularity 'carrier' or 'tensor'"
        )
    parts = range(int(part_index.max()) + 1)
    groups = []
    for group, ratio in enumerate(act.ratio):
        m = multipliers(ratio, act.shift, name)
        groups.append(tuple(_grid(act, group, part_index == part, m, name) for part in parts))
    return tuple(groups), act.shift


def multipliers(ratio: torch.Tensor, shift: torch.Tensor, name: str) -> torch.Tensor:
    """m_k in 1..8 of the ratios m_k * 2^{e_k} of one step group.

    Args:
        ratio: whole numbers in float32 [C].
        shift: e int64 [C].
        name: of the layer, for the message.

    Returns:
        int64 [C].

    Raises:
        ConfigError: the ratios are not such products.
    """
    whole = ratio.round().long()
    m = whole >> shift
    exact = bool((m << shift == whole).all())
    if not exact or int(m.min()) < 1 or int(m.max()) > CARRIER_MULTIPLIER:
        raise ConfigError(
            f"{name}: scale ratios {whole.unique().tolist()} are not m * 2^e with m in 1..8 "
            f"and the quantizer's e, {shift.unique().tolist()}"
        )
    return m


def _grid(
    act: ActQuantizer, group: int, own: torch.Tensor, multiplier: torch.Tensor, name: str
) -> Grid:
    """The grid of the channels `own` (bool [C]) in one step group."""
    scale = act.scale.detach()[group, act.index]
    bases = scale[own].unique()
    if len(bases) != 1:
        raise EngineError(
            f"{name}: the weights are not split where the activation's scales are: no integer form"
        )
    ratio = act.ratio[group]
    inverse = (1.0 / (ratio if act.token else scale * ratio))[own]
    if not (torch.isfinite(inverse).all() and (inverse > 0).all()):
        raise EngineError(f"{name}: activation scales must be positive and finite")
    zero = act.zero_point[group].round().to(torch.int32)[own]
    m: torch.Tensor | None = multiplier[own].to(torch.int32)
    if len(inverse.unique()) == len(zero.unique()) == 1 and int(multiplier[own].max()) == 1:
        inverse = inverse[:1]
        zero = zero[:1]
        m = None
    levels = 2**act.bits - 1
    low = -zero
    high = levels - zero
    base = float(bases)
    token = None
    if act.token:
        # Bounds that hold for any token. With 8 bits every token's zero is in the middle.
        low = torch.full_like(zero, -128 if act.bits == 8 else -levels)
        high = torch.full_like(zero, levels - 128 if act.bits == 8 else levels)
        base = 1.0
        token = Token(bases.clone(), act.bits)
    grid = Grid(inverse.clone(), low, high, m, base, token)
    if not grid.uniform and grid.max_abs > BYTE:
        raise EngineError(
            f"{name}: carried activations up to {grid.max_abs} do not fit a signed byte"
        )
    return grid


# ---- layers ----


def integer_form(layer: QuantLayer, name: str) -> IntegerForm:
    """The integer form of a quantized layer.

    Raises:
        EngineError: the layer has none, or its sums could overflow int32; the message names it.
        ConfigError: a scale ratio is not m * 2^e.
    """
    wq = layer.weight_quantizer
    act = layer.input_quantizer
    if wq is None or not layer.weights_on or not act.enabled:
        raise EngineError(f"{name}: integer execution needs quantized weights and activations")
    groups = getattr(layer, "groups", 1)
    part_index = wq.index if groups == 1 else torch.zeros(len(act.index), dtype=torch.int64)
    grids, shift = act_grids(act, part_index, name)
    w = _carried_weight(layer, shift, name)
    parts = []
    for p in range(wq.scale.shape[1]):
        own = (part_index == p).nonzero()[:, 0]
        start = int(own[0])
        stop = int(own[-1]) + 1
        if len(own) != stop - start:
            raise EngineError(f"{name}: the channels of a part must stand together")
        wide = w[:, start:stop] if groups == 1 else w
        compensation = None
        stored = wide
        if int(wide.max()) > BYTE or int(wide.min()) < -BYTE - 1:
            compensation = 128 - wq.zero_point[:, p].int()
            stored = wide - compensation.reshape(-1, *[1] * (w.ndim - 1))
        # Engines without a compensation of their own add it by a second sum: bound that too.
        max_abs = max(group[p].max_abs for group in grids)
        _check_sums(max(_largest_sum(wide), _largest_sum(stored)) * max_abs, wide, name)
        parts.append(
            WeightPart(
                start=start,
                stop=stop,
                weight=stored.to(torch.int8),
                compensation=compensation,
                scale=wq.scale[:, p].float().clone(),
                shift=shift[start:stop].to(w.device),
            )
        )
    bias = None if layer.bias is None else layer.bias.detach().float().clone()
    return IntegerForm(name, layer, wq.bits, act.bits, tuple(parts), grids, bias)


def _carried_weight(layer: QuantLayer, shift: torch.Tensor, name: str) -> torch.Tensor:
    """(q_w - z_w) 2^e, int32, shaped like the layer's weight."""
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise EngineError(
                f"{name}: expected zero padding given in pixels, "
                f"found {layer.padding_mode} {layer.padding!r}"
            )
    wq = layer.weight_quantizer
    assert wq is not None
    ndim = layer.weight.ndim
    w = layer.codes().int() - wq.expand(wq.zero_point, ndim).int()
    if not bool(shift.any()):
        return w
    groups = getattr(layer, "groups", 1)
    if groups > 1 or wq.bits > 4:
        raise EngineError(
            f"{name}: shifts 2^e need weights of up to 4 bits and one group, "
            f"found {wq.bits} bits, {groups} groups"
        )
    return w << shift.int().reshape(1, -1, *[1] * (ndim - 2))


def _largest_sum(w: torch.Tensor) -> int:
    """The largest sum of |w| over the inputs of one output channel."""
    return int(w.flatten(1).abs().sum(1, dtype=torch.int64).max())


def _check_sums(bound: int, w: torch.Tensor, name: str) -> None:
    if bound > INT32:
        raise EngineError(
            f"{name}: accumulators up to {bound} could overflow int32 (K = {w[0].numel()})"
        )
