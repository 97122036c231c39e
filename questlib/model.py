"""Insert quantizers into a diffusers UNet: layer roles by structure, split skip connections, step groups.

`insert(unet, config, timesteps)` returns a copy of the same class; nothing is calibrated yet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.config import OFF, QuantConfig
from questlib.correction import NoiseCorrection
from questlib.errors import ConfigError
from questlib.layers import QuantAttnProcessor, QuantLayer, convert_layer
from questlib.quantizers import ActQuantizer, WeightQuantizer
from questlib.timesteps import StepGroups, contiguous_groups

TIME_ROLES = ("time_embed", "time_proj")


def layer_roles(unet: nn.Module) -> dict[str, str]:
    """Role of each Linear and Conv2d, by the module that owns it:

    first, last | time_embed (t -> embedding) | time_proj (embedding -> ResBlock) | qkv, attn_out | context_kv (keys and values
    of cross-attention) | feed_forward | shortcut | conv | linear
    """
    owned: dict[int, str] = {id(unet.conv_in): "first", id(unet.conv_out): "last"}
    for module in unet.modules():
        if isinstance(module, TimestepEmbedding):
            owned |= {id(m): "time_embed" for m in module.modules() if isinstance(m, nn.Linear)}
        elif isinstance(module, ResnetBlock2D):
            owned[id(module.time_emb_proj)] = "time_proj"
            owned[id(module.conv_shortcut)] = "shortcut"
        elif isinstance(module, Attention):
            kv = "context_kv" if module.is_cross_attention else "qkv"
            owned |= {id(module.to_q): "qkv", id(module.to_k): kv, id(module.to_v): kv, id(module.to_out[0]): "attn_out"}
        elif isinstance(module, FeedForward):
            owned |= {id(m): "feed_forward" for m in module.modules() if isinstance(m, nn.Linear)}
    roles = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            roles[name] = owned.get(id(module), "conv" if isinstance(module, nn.Conv2d) else "linear")
    return roles


def skip_splits(unet: nn.Module) -> dict[str, int]:
    """For each layer that sees a raw concatenation [hidden, skip] (the shortcuts of the up blocks): the channels of `hidden`."""
    names = {id(m): n for n, m in unet.named_modules()}
    channels = unet.mid_block.resnets[-1].out_channels if unet.mid_block is not None else unet.config.block_out_channels[-1]
    splits = {}
    for block in unet.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None and resnet.in_channels > channels:
                splits[names[id(resnet.conv_shortcut)]] = channels
            channels = resnet.out_channels
    return splits


def quant_layers(unet: nn.Module) -> dict[str, QuantLayer]:
    return {n: m for n, m in unet.named_modules() if isinstance(m, QuantLayer)}


def act_quantizers(module: nn.Module) -> Iterator[ActQuantizer]:
    return (m for m in module.modules() if isinstance(m, ActQuantizer))


def step_groups(unet: nn.Module) -> StepGroups:
    groups = getattr(unet, "quest_steps", None)
    if groups is None:
        raise ConfigError(f"expected a UNet made by questlib.quantize, found a plain {type(unet).__name__}")
    return groups


def set_mode(module: nn.Module, *, weights: bool | None = None, acts: bool | None = None) -> None:
    """Switch weight and activation quantization on or off (off: the layer is full precision). Frozen weights are thawed."""
    for m in module.modules():
        if isinstance(m, QuantLayer) and weights is not None:
            m.weights_on = weights
            m.thaw()
        elif isinstance(m, ActQuantizer) and acts is not None:
            m.enabled = acts and m.bits != OFF


def freeze(unet: nn.Module) -> nn.Module:
    """Compute every quantized weight once; eval mode; no gradients. The state in which a model samples."""
    unet.requires_grad_(False).eval()
    for layer in quant_layers(unet).values():
        layer.freeze()
    return unet


def layer_kind(layer: nn.Module, role: str) -> str:
    """feed_forward, linear (all other Linears) or conv: the kinds of the paper's Fig. 3."""
    return "conv" if isinstance(layer, nn.Conv2d) else "feed_forward" if role == "feed_forward" else "linear"


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


def sees_tokens(layer: nn.Module) -> bool:
    """Whether each output comes from one token (or pixel) alone, so that a scale of its own can be put on after the sum."""
    if isinstance(layer, nn.Linear):
        return True
    shape = (*layer.kernel_size, *layer.stride, layer.groups)
    return set(shape) == {1} and layer.padding in (0, (0, 0))


def insert(unet: nn.Module, config: QuantConfig, timesteps: torch.Tensor) -> nn.Module:
    """A deep copy of `unet` with quantizers in every Linear, Conv2d and attention; weights have their ranges, activations none.

    timesteps: the sampler's steps [T], from which the step groups are made. ConfigError for anything but a diffusers UNet.
    """
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise ConfigError(f"expected a diffusers UNet2DModel or UNet2DConditionModel, found {type(unet).__name__}")
    if hasattr(unet, "quest_steps"):
        raise ConfigError("this UNet is quantized already; start from the full-precision one")
    device = unet.device
    unet = copy.deepcopy(unet).eval().requires_grad_(False)
    roles, splits = layer_roles(unet), skip_splits(unet) if config.split_skip else {}
    timesteps = timesteps.unique().flip(0)  # PLMS calls one twice
    steps = StepGroups(timesteps, contiguous_groups(len(timesteps), min(config.step_groups, len(timesteps))))
    modules = dict(unet.named_modules())
    free, token = (config.act_granularity == kind for kind in ("channel", "token"))
    carrier = token or config.act_granularity == "carrier"
    for name, role in roles.items():
        if config.te == "fp" and role in TIME_ROLES:
            continue
        layer = modules[name]
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        split = torch.zeros(channels, dtype=torch.int64)
        split[splits.get(name, channels) :] = 1
        own_token = (token or config.te_token and role in TIME_ROLES) and sees_tokens(layer)
        act = ActQuantizer(
            f"{name}.act", _act_bits(layer, role, config), steps, channels, -1 if isinstance(layer, nn.Linear) else 1,
            torch.arange(channels) if free else split, carrier=carrier,
            shifts=_weight_bits(role, config) <= 4 and getattr(layer, "groups", 1) == 1, token=own_token,
        )  # fmt: skip
        # a grouped convolution's weight [O, I / groups, ...] has no channel of the other half
        w_index = split if getattr(layer, "groups", 1) == 1 else torch.zeros(layer.weight.shape[1], dtype=torch.int64)
        bits = _weight_bits(role, config)
        wq = WeightQuantizer(layer.weight, bits, w_index, config.weight_range) if bits != OFF else None
        convert_layer(layer, role, act, wq)
    for name, module in modules.items():
        if isinstance(module, Attention):
            width = module.to_q.out_features
            index = torch.arange(width) if free else torch.zeros(width, dtype=torch.int64)
            act_bits = config.act_bits if config.act_layers == "all" else OFF
            q, k, v = (
                ActQuantizer(f"{name}.{x}", act_bits, steps, width, -1, index.clone(), carrier=carrier, shifts=x == "v")
                for x in "qkv"
            )
            bits = act_bits if config.softmax_bits is None or act_bits == OFF else config.softmax_bits
            probs = ActQuantizer(f"{name}.probs", bits, steps, 1, -1, torch.zeros(1, dtype=torch.int64), unsigned=True)
            module.processor = QuantAttnProcessor(q, k, v, probs)
    unet.quest_steps = steps
    unet.quest_config = config
    unet.quest_hook = unet.register_forward_pre_hook(steps.hook, with_kwargs=True)
    if config.noise_correction:
        unet.quest_correction = NoiseCorrection(steps.timesteps, unet.config.out_channels)
        unet.register_forward_hook(unet.quest_correction.hook, with_kwargs=True)
    return unet.to(device)  # quantizers and step groups were made on the CPU
