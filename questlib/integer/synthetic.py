"""Quantized layers and grids with random contents, for tests and benchmarks.

What is exact or fast must be so for any values.
"""

from __future__ import annotations

import torch
from torch import nn

from questlib.config_groups import Granularity
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.carrier import CARRIER_BLOCK
from questlib.quantization.layers import QuantLayer, add_quantizers
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
    """Quantize a layer in place, with random grids.

    Args:
        module: the layer, with its weights.
        weight_bits: 2 to 8.
        act_bits: 2 to 8.
        split: the channel at which the second part of a split input starts; None: one part.
        carrier: whether channels have multipliers m_k (up to 4 bits).
        shift: whether they have block shifts 2^e as well.
        token: whether each token has a grid.
        seed: of the grids.

    Returns:
        The layer, and its step groups: 2, over 4 timesteps.
    """
    g = torch.Generator().manual_seed(seed)
    linear = isinstance(module, nn.Linear)
    channels = module.in_features if linear else module.in_channels
    groups = 1 if linear else module.groups
    index = torch.zeros(channels, dtype=torch.int64)
    index[channels if split is None else split :] = 1
    parts = int(index.max()) + 1
    steps = StepGroups(torch.arange(2 * GROUPS), torch.arange(2 * GROUPS) // 2)
    granularity: Granularity = "token" if token else "carrier" if carrier else "tensor"
    dim = -1 if linear else 1
    act = ActQuantizer(
        "layer.input_quantizer", act_bits, steps, channels, dim, granularity, parts=index
    )
    ratios = carrier and act.carrier
    e = torch.randint(0, 4 if shift else 1, (channels,), generator=g)
    for group in range(GROUPS):
        ratio = torch.randint(5 if shift else 1, 9, (channels,), generator=g) << e
        zeros = channels if ratios else parts
        zero = torch.randint(0, 2**act_bits, (zeros,), generator=g).float()
        scale = 0.01 + torch.rand(parts, generator=g) * 4 / 2**act_bits
        act.set_group(
            group,
            1 - scale / 9 if token else scale,
            zero if ratios else zero[index],
            ratio.float() if ratios else None,
            e if ratios else None,
        )
    act.calibrated.fill_(True)
    weight = module.weight
    wq = WeightQuantizer.from_weight(
        weight, weight_bits, index[: channels // groups].to(weight.device), "minmax"
    )
    add_quantizers(module, "conv", act.to(weight.device), wq)
    module.requires_grad_(False).freeze()
    return module, steps


def random_grids(unet: nn.Module, seed: int = 0) -> None:
    """Give a whole UNet plausible activation grids without calibration.

    Speed does not depend on their values, only on their kind.
    """
    generator = torch.Generator().manual_seed(seed)
    for act in unet.modules():
        if not isinstance(act, ActQuantizer):
            continue
        channels = act.zero_point.shape[1]
        top = 2**act.bits - 1
        # The shifts of real models stand in blocks.
        e = torch.zeros(channels, dtype=torch.int64)
        e[:CARRIER_BLOCK] = int(act.carrier and act.shifts and channels > CARRIER_BLOCK)
        scale = 0.9 if act.token else 1 / 255 if act.unsigned else 6.0 / top
        from_zero = act.unsigned or act.token
        zero = torch.full((channels,), 0.0 if from_zero else (top + 1) / 2)
        for group in range(act.scale.shape[0]):
            ratio = None
            if act.carrier:
                ratio = (torch.randint(1, 9, (channels,), generator=generator) << e).float()
            act.set_group(group, torch.full_like(act.scale[group], scale), zero, ratio, e)
        act.calibrated.fill_(True)
