"""Quantized layers and grids with random contents, for tests and benchmarks: what is exact or fast must be so for any values."""

from __future__ import annotations

import torch
from torch import nn

from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.layers import QuantLayer, convert_layer
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.weight_quantizer import WeightQuantizer

GROUPS = 2  # step groups of a random layer


def random_layer(
    module: nn.Linear | nn.Conv2d,
    weight_bits: int,
    act_bits: int,
    *,
    split: int | None = None,
    carrier: bool = False,
    shift: bool = False,
    token: bool = False,
    seed: int = 0,
) -> tuple[QuantLayer, StepGroups]:
    """`module`, quantized in place with random grids.

    split: the channel at which the second part of a split input starts. carrier: multipliers m_k (up to 4 bits); shift: with
    blocks 2^e. token: a grid for each token.
    """
    g, linear = torch.Generator().manual_seed(seed), isinstance(module, nn.Linear)
    channels, groups = (module.in_features, 1) if linear else (module.in_channels, module.groups)
    index = torch.zeros(channels, dtype=torch.int64)
    index[channels if split is None else split :] = 1
    parts, steps = (
        int(index.max()) + 1,
        StepGroups(torch.arange(2 * GROUPS), torch.arange(2 * GROUPS) // 2),
    )
    act = ActQuantizer(
        "layer.input_quantizer",
        act_bits,
        steps,
        channels,
        -1 if linear else 1,
        index,
        carrier=carrier,
        token=token,
    )
    block = torch.randint(0, 4 if shift else 1, (channels,), generator=g)
    for group in range(GROUPS):
        ratio = torch.randint(5 if shift else 1, 9, (channels,), generator=g) << block
        zero = torch.randint(
            0, 2**act_bits, (channels if act.carrier else parts,), generator=g
        ).float()
        scale = 0.01 + torch.rand(parts, generator=g) * 4 / 2**act_bits
        scale = 1 - scale / 9 if token else scale
        act.set_group(
            group,
            scale,
            zero if act.carrier else zero[index],
            ratio.float() if act.carrier else None,
        )
    act.calibrated.fill_(True)
    wq = WeightQuantizer(
        module.weight, weight_bits, index[: channels // groups].to(module.weight.device), "minmax"
    )
    convert_layer(module, "conv", act.to(module.weight.device), wq)
    module.requires_grad_(False).freeze()
    return module, steps


def random_grids(unet: nn.Module, seed: int = 0) -> None:
    """Plausible activation grids without calibration in all of a UNet: speed does not depend on them, only on their kind."""
    generator = torch.Generator().manual_seed(seed)
    for act in (m for m in unet.modules() if isinstance(m, ActQuantizer)):
        channels, top = act.zero_point.shape[1], 2**act.bits - 1
        block = torch.zeros(channels, dtype=torch.int64)
        block[:64] = int(
            act.shifts and channels > 64
        )  # the shifts of real models stand in blocks of 64
        scale = 0.9 if act.token else 1 / 255 if act.unsigned else 6.0 / top
        for group in range(act.scale.shape[0]):
            ratio = (
                (torch.randint(1, 9, (channels,), generator=generator) << block).float()
                if act.carrier
                else None
            )
            zero = torch.full((channels,), 0.0 if act.unsigned or act.token else (top + 1) / 2)
            act.set_group(group, torch.full_like(act.scale[group], scale), zero, ratio)
        act.calibrated.fill_(True)
