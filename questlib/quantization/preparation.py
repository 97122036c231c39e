"""Insert quantizers into a diffusers UNet."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.baselines.noise_correction import NoiseCorrection
from questlib.config import OFF, QuantConfig
from questlib.errors import ConfigError
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.layers import convert_layer
from questlib.quantization.roles import (
    TIME_ROLES,
    layer_kind,
    layer_roles,
    sees_tokens,
    skip_splits,
)
from questlib.quantization.step_groups import StepGroups, contiguous_groups
from questlib.quantization.weight_quantizer import WeightQuantizer


def _act_bits(layer: nn.Module, role: str, config: QuantConfig) -> int:
    if config.act_layers not in ("all", layer_kind(layer, role)):
        return OFF
    special = {"first": config.first_last_act_bits, "last": config.first_last_act_bits}
    special |= dict.fromkeys(TIME_ROLES, config.te_act_bits)
    bits = special.get(role)
    return config.act_bits if bits is None or config.act_bits == OFF else bits


def _weight_bits(role: str, config: QuantConfig) -> int:
    bits = config.first_last_weight_bits if role in ("first", "last") else None
    return config.weight_bits if bits is None or config.weight_bits == OFF else bits


def prepare(unet: nn.Module, config: QuantConfig, timesteps: torch.Tensor) -> nn.Module:
    """A deep copy of `unet` with quantizers in every Linear, Conv2d and attention; weights have their ranges, activations none.

    timesteps: the sampler's steps [T], from which the step groups are made. ConfigError for anything but a diffusers UNet.
    """
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise ConfigError(
            f"expected a diffusers UNet2DModel or UNet2DConditionModel, found {type(unet).__name__}"
        )
    if hasattr(unet, "quest_steps"):
        raise ConfigError("this UNet is quantized already; start from the full-precision one")
    device = unet.device
    unet = copy.deepcopy(unet).eval().requires_grad_(False)
    roles, splits = layer_roles(unet), skip_splits(unet) if config.split_skip else {}
    timesteps = timesteps.unique().flip(0)  # PLMS calls one twice
    steps = StepGroups(
        timesteps, contiguous_groups(len(timesteps), min(config.ranges.step_groups, len(timesteps)))
    )
    modules = dict(unet.named_modules())
    free, token = (config.ranges.act_granularity == kind for kind in ("channel", "token"))
    carrier = token or config.ranges.act_granularity == "carrier"
    for name, role in roles.items():
        if config.te == "fp" and role in TIME_ROLES:
            continue
        layer = modules[name]
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        split = torch.zeros(channels, dtype=torch.int64)
        split[splits.get(name, channels) :] = 1
        own_token = (token or config.ranges.te_token and role in TIME_ROLES) and sees_tokens(layer)
        act = ActQuantizer(
            f"{name}.input_quantizer",
            _act_bits(layer, role, config),
            steps,
            channels,
            -1 if isinstance(layer, nn.Linear) else 1,
            torch.arange(channels) if free else split,
            carrier=carrier,
            shifts=_weight_bits(role, config) <= 4 and getattr(layer, "groups", 1) == 1,
            token=own_token,
        )
        # a grouped convolution's weight [O, I / groups, ...] has no channel of the other half
        w_index = (
            split
            if getattr(layer, "groups", 1) == 1
            else torch.zeros(layer.weight.shape[1], dtype=torch.int64)
        )
        bits = _weight_bits(role, config)
        wq = (
            WeightQuantizer(layer.weight, bits, w_index, config.weight_range)
            if bits != OFF
            else None
        )
        convert_layer(layer, role, act, wq)
    for name, module in modules.items():
        if isinstance(module, Attention):
            width = module.to_q.out_features
            index = torch.arange(width) if free else torch.zeros(width, dtype=torch.int64)
            act_bits = config.act_bits if config.act_layers == "all" else OFF
            q, k, v = (
                ActQuantizer(
                    f"{name}.{x}",
                    act_bits,
                    steps,
                    width,
                    -1,
                    index.clone(),
                    carrier=carrier,
                    shifts=x == "v",
                )
                for x in "qkv"
            )
            bits = (
                act_bits if config.softmax_bits is None or act_bits == OFF else config.softmax_bits
            )
            probs = ActQuantizer(
                f"{name}.probs",
                bits,
                steps,
                1,
                -1,
                torch.zeros(1, dtype=torch.int64),
                unsigned=True,
            )
            module.processor = QuantAttnProcessor(q, k, v, probs)
    unet.quest_steps = steps
    unet.quest_config = config
    unet.quest_hook = unet.register_forward_pre_hook(steps.hook, with_kwargs=True)
    if config.noise_correction:
        unet.quest_correction = NoiseCorrection(steps.timesteps, unet.config.out_channels)
        unet.register_forward_hook(unet.quest_correction.hook, with_kwargs=True)
    return unet.to(device)  # quantizers and step groups were made on the CPU
