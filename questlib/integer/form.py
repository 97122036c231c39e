"""The integer form of a quantized layer: what every engine executes. Made once; no arithmetic of the model here.

    y_o = bias_o + sum_p base_p s_op acc_op,    acc_op = sum_k a_k (w_ok + offset_op),    a_k = (q_k - z_k) m_k

Per token, base_p and z are each token's own, from the range of its channels as they come (`Grid.token`).
Part p is one half of a split input (one part otherwise). w is a signed byte: the centred code, shifted by 2^e_k (carrier format).
Codes of more than 4 bits do not fit a byte once centred; their part has an `offset` per output channel, and engines add
offset_o * sum_k a_k. a_k is a signed byte for codes of up to 4 bits; for wider ones (uniform grids only) it is q - z,
in -255..255.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from questlib.errors import EngineError
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.carrier import split_ratio
from questlib.quantization.layers import QuantLayer
from questlib.quantization.step_groups import StepGroups

BYTE = 127
INT32 = 2**31 - 1


class Token(NamedTuple):
    """How a token's range becomes its grid (ranges.token_grid)."""

    clip: torch.Tensor  # float32, one value: the share of the range that is kept
    bits: int


class Grid(NamedTuple):
    """One part of an activation in one step group: a = clamp(round(x * inverse), low, high) * multiplier, x ~ base * a * 2^e."""

    inverse: torch.Tensor  # float32 [C], or [1] for a uniform grid: 1 / scale, as fake quantization computes it; token: 1 / ratio
    low: torch.Tensor  # int32 like inverse: -zero_point; token: the least that any zero point gives
    high: torch.Tensor  # int32 like inverse: 2^bits - 1 - zero_point; token: the most
    multiplier: torch.Tensor | None  # int32 [C] in 1..8; None for a uniform grid
    base: float  # token: 1
    token: Token | None = None

    @property
    def uniform(self) -> bool:
        return self.multiplier is None

    @property
    def limit(self) -> int:
        """The largest |a| that can occur."""
        m = 1 if self.multiplier is None else self.multiplier
        return int((torch.maximum(-self.low, self.high) * m).max())

    def to(self, device: torch.device | str) -> Grid:
        token = None if self.token is None else self.token._replace(clip=self.token.clip.to(device))
        return Grid(*(v.to(device) if torch.is_tensor(v) else v for v in self[:-1]), token)


class Part(NamedTuple):
    """The weights for input channels start..stop."""

    start: int
    stop: int
    weight: torch.Tensor  # int8 [O, stop - start] or [O, (stop - start) / groups, kh, kw]
    offset: torch.Tensor | None  # int32 [O]; None: all zero
    scale: torch.Tensor  # float32 [O]


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` weight codes in a checkpoint: up to 4 bits two codes share a byte."""
    return (count + 1) // 2 if bits <= 4 else count


def group_in_force(steps: StepGroups, name: str) -> int:
    """The step group of the present call. EngineError when the batch has timesteps of several."""
    if not isinstance(steps.current, int):
        raise EngineError(
            f"{name}: integer execution takes one step group a call, found timesteps of several groups in the batch"
        )
    return steps.current


@dataclass(frozen=True)
class IntegerForm:
    name: str
    layer: nn.Linear | nn.Conv2d  # for its geometry: stride, padding, dilation, groups
    weight_bits: int
    act_bits: int
    parts: tuple[Part, ...]
    grids: tuple[tuple[Grid, ...], ...]  # [step group][part]
    bias: torch.Tensor | None  # float32 [O]

    @property
    def packed_bytes(self) -> int:
        """Of the weights in the checkpoint."""
        return packed_size(self.layer.weight.numel(), self.weight_bits)

    @property
    def carrier(self) -> bool:
        return not all(g.uniform for group in self.grids for g in group)

    @property
    def token(self) -> bool:
        return self.grids[0][0].token is not None

    def digest(self) -> torch.Tensor:
        """sha256 uint8 [32] of everything that is executed. Engines keep it in their state_dict, in place of weights whose layout
        is theirs alone: it tells models apart."""
        digest = hashlib.sha256()
        tensors = [v for group in self.grids for grid in group for v in grid] + [
            v for part in self.parts for v in part
        ]
        for value in (*tensors, self.bias):
            digest.update(
                value.cpu().contiguous().numpy() if torch.is_tensor(value) else repr(value).encode()
            )
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

    @property
    def format(self) -> str:
        kinds = (("token", self.token), ("carrier", self.carrier))
        return f"W{self.weight_bits}A{self.act_bits} {' '.join(k for k, has in kinds if has) or 'tensor'}"


def act_grids(
    act: ActQuantizer, part_index: torch.Tensor, name: str
) -> tuple[tuple[tuple[Grid, ...], ...], torch.Tensor]:
    """Grids [step group][part] of an activation quantizer and the shift e [C] to be put on the weights.

    part_index int64 [C] says which part each channel is in. EngineError for grids without integer form.
    """
    channels = len(act.index)
    if channels > 2 and act.scale.shape[1] == channels:
        raise EngineError(
            f"{name}: free per-channel scales cannot run in integers; use act_granularity 'carrier' or 'tensor'"
        )
    top, groups = act.ratio.amax(0), []
    shift = torch.zeros(channels, dtype=torch.int64)
    for g in range(act.ratio.shape[0]):
        multiplier, shift = split_ratio(top, act.ratio[g], name)
        inverse = 1.0 / (
            act.ratio[g] if act.token else act.scale.detach()[g, act.index] * act.ratio[g]
        )
        zero = act.zero_point[g].round().to(torch.int32)
        parts = []
        for part in range(int(part_index.max()) + 1):
            own = part_index == part
            bases = act.scale.detach()[g, act.index[own]].unique()
            if len(bases) != 1:
                raise EngineError(
                    f"{name}: the weights are not split where the activation's scales are: no integer form"
                )
            inv, z, m = inverse[own], zero[own], multiplier[own].to(torch.int32)
            if len(inv.unique()) == len(z.unique()) == 1 and int(m.max()) == 1:
                inv, z, m = inv[:1], z[:1], None
            grid = Grid(inv.clone(), -z, 2**act.bits - 1 - z, m, float(bases))
            if act.token:
                z = torch.full_like(z, 128 if act.bits == 8 else 2**act.bits - 1)
                high = 2**act.bits - 1 - (z if act.bits == 8 else 0)
                grid = Grid(
                    inv.clone(),
                    -z,
                    torch.zeros_like(z) + high,
                    m,
                    1.0,
                    Token(bases.clone(), act.bits),
                )
            if not (torch.isfinite(inv).all() and (inv > 0).all()):
                raise EngineError(f"{name}: activation scales must be positive and finite")
            if grid.limit > BYTE and m is not None:
                raise EngineError(
                    f"{name}: carried activations up to {grid.limit} do not fit a signed byte"
                )
            parts.append(grid)
        groups.append(tuple(parts))
    return tuple(groups), shift


def integer_form(layer: QuantLayer, name: str) -> IntegerForm:
    """The integer form of a quantized layer. EngineError, naming the layer, when it has none or int32 could overflow."""
    wq, act, groups = layer.weight_quantizer, layer.input_quantizer, getattr(layer, "groups", 1)
    if wq is None or not layer.weights_on or not act.enabled:
        raise EngineError(f"{name}: integer execution needs quantized weights and activations")
    if isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        raise EngineError(
            f"{name}: expected zero padding given in pixels, found {layer.padding_mode} {layer.padding!r}"
        )
    channels = len(act.index)
    part_index = wq.index if groups == 1 else torch.zeros(channels, dtype=torch.int64)
    grids, shift = act_grids(act, part_index, name)
    codes, zero = (
        wq.codes(layer.weight.detach()).int(),
        wq.expand(wq.zero_point, layer.weight.ndim).int(),
    )
    w = codes - zero  # like layer.weight
    if bool(shift.any()):
        if groups > 1 or wq.bits > 4:
            raise EngineError(
                f"{name}: shifts 2^e need weights of up to 4 bits and one group, found {wq.bits} bits, {groups} groups"
            )
        w = w << shift.int().reshape(1, -1, *[1] * (w.ndim - 2))
    parts = []
    for p in range(wq.scale.shape[1]):
        own = (part_index == p).nonzero()[:, 0]
        start, stop = int(own[0]), int(own[-1]) + 1
        if len(own) != stop - start:
            raise EngineError(f"{name}: the channels of a part must stand together")
        wide = w[:, part_index == p] if groups == 1 else w
        flat = wide.flatten(1)
        offset = None
        if int(flat.max()) > BYTE or int(flat.min()) < -BYTE - 1:
            offset = 128 - wq.zero_point[:, p].int()
            wide = wide - offset.reshape(-1, *[1] * (w.ndim - 1))
        limit = max(group[p].limit for group in grids)
        bound = int(flat.abs().sum(1, dtype=torch.int64).max()) * limit
        # engines without an offset of their own add it by a second sum: bound that too
        bound = max(bound, int(wide.flatten(1).abs().sum(1, dtype=torch.int64).max()) * limit)
        if bound > INT32:
            raise EngineError(
                f"{name}: accumulators up to {bound} could overflow int32 (K = {flat.shape[1]})"
            )
        parts.append(Part(start, stop, wide.to(torch.int8), offset, wq.scale[:, p].float().clone()))
    bias = None if layer.bias is None else layer.bias.detach().float().clone()
    return IntegerForm(name, layer, wq.bits, act.bits, tuple(parts), grids, bias)
