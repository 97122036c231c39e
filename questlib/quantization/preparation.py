"""Insert quantizers into a diffusers UNet or transformer."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.models.attention_processor import Attention
from torch import nn

from questlib.config import OFF, QuantConfig
from questlib.config_groups import Granularity
from questlib.denoisers import TRANSFORMERS, UNETS, unsupported
from questlib.errors import ConfigError, unknown
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import FloatAttnProcessor, QuantAttnProcessor
from questlib.quantization.carrier import CARRIER_BITS
from questlib.quantization.layers import add_quantizers
from questlib.quantization.precision import cast
from questlib.quantization.roles import (
    TIME_ROLES,
    layer_kind,
    layer_roles,
    sees_tokens,
    skip_splits,
)
from questlib.quantization.seal import seal
from questlib.quantization.step_groups import StepGroups, contiguous_groups
from questlib.quantization.transforms import Transform
from questlib.quantization.weight_quantizer import WeightQuantizer

# Processors of diffusers that compute one and the same attention, or the one with added keys and
# values of the text.
PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnAddedKVProcessor",
    "AttnAddedKVProcessor2_0",
    "SlicedAttnProcessor",
    "SlicedAttnAddedKVProcessor",
    "XFormersAttnProcessor",
    "XFormersAttnAddedKVProcessor",
    "FusedAttnProcessor2_0",
)


def prepare(
    unet: nn.Module,
    config: QuantConfig,
    timesteps: torch.Tensor,
    *,
    search_weights: bool = True,
) -> nn.Module:
    """A float32 copy of a UNet with quantizers in every Linear, Conv2d and attention.

    The ranges of activations are not set yet.

    Args:
        unet: a diffusers UNet or transformer in full precision.
        config: what is quantized, and how.
        timesteps: the sampler's timesteps [T], from which the step groups are made.
        search_weights: whether the ranges of weights are searched; not where a checkpoint has them.

    Raises:
        ConfigError: the model is of another class, or is quantized already.
    """
    check_unet(unet)
    unet = cast(plain_copy(unet), torch.float32)
    insert(unet, config, timesteps, search_weights=search_weights)
    return unet


def insert(
    unet: nn.Module, config: QuantConfig, timesteps: torch.Tensor, *, search_weights: bool
) -> None:
    """Put quantizers into a float32 UNet in place; see `prepare`."""
    device = unet.device
    unet.eval().requires_grad_(False)
    splits = skip_splits(unet) if config.split_skip else {}
    timesteps = timesteps.unique().flip(0)  # PLMS calls one twice
    num_groups = min(config.ranges.step_groups, len(timesteps))
    steps = StepGroups(timesteps, contiguous_groups(len(timesteps), num_groups))
    modules = dict(unet.named_modules())
    roles = layer_roles(unet)
    check_layer_bits(config, roles)
    for name, role in roles.items():
        if config.te == "fp" and role in TIME_ROLES or is_skipped(name, config):
            continue
        layer = modules[name]
        parts = _parts(layer, splits.get(name))
        act = _input_quantizer(name, layer, role, parts, config, steps)
        weight_quantizer = _weight_quantizer(name, layer, role, parts, config)
        transform = _transform(layer, role, config)
        if transform is not None:
            layer.weight.data = transform.weight(layer.weight.data)
        if weight_quantizer is not None and search_weights:
            weight_quantizer.to(device).search(
                layer.weight, config.weight_range, config.weight_range_norm
            )
        add_quantizers(layer, role, act, weight_quantizer, transform)
    for name, module in modules.items():
        if isinstance(module, Attention) and not is_skipped(f"{name}.to_q", config):
            width = module.to_q.out_features
            module.processor = _attention_processor(name, width, config, steps)
    leave_in_float(unet, config.float_attention)
    unet.quest_steps = steps
    unet.quest_config = config
    unet.quest_hook = unet.register_forward_pre_hook(steps.hook, with_kwargs=True)
    unet.to(device)  # quantizers and step groups were made on the CPU
    seal(unet)


def leave_in_float(unet: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take the quantizers of some attentions' products out, in place.

    Args:
        unet: with quantizers.
        patterns: names of attentions, or patterns of them.

    Returns:
        The names of the attentions.
    """
    found = []
    for name, module in unet.named_modules():
        quantized = isinstance(module, Attention) and isinstance(
            module.processor, QuantAttnProcessor
        )
        if quantized and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            module.processor = FloatAttnProcessor()
            found.append(name)
    return found


def check_unet(unet: nn.Module) -> None:
    """ConfigError unless this is a denoiser in full precision that can be quantized."""
    if not isinstance(unet, UNETS + TRANSFORMERS):
        raise unsupported(unet)
    if hasattr(unet, "quest_steps"):
        raise ConfigError("this UNet is quantized already; start from the full-precision one")
    for name, module in unet.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ConfigError(
                f"{name} has an adapter that is not fused; run pipe.fuse_lora() and "
                "pipe.unload_lora_weights() first"
            )
        if isinstance(module, Attention):
            check_attention(name, module)


def is_skipped(name: str, config: QuantConfig) -> bool:
    """Whether a layer stays in full precision by `config.skip_layers`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in config.skip_layers)


def check_layer_bits(config: QuantConfig, roles: Mapping[str, str]) -> None:
    """ConfigError that names the layers of `layer_weight_bits` and `layer_act_bits` which the model
    does not have."""
    for field in ("layer_weight_bits", "layer_act_bits"):
        for name in getattr(config, field):
            if name not in roles:
                raise unknown(field, name, roles)


def check_attention(name: str, module: Attention) -> None:
    """ConfigError unless this attention computes what `QuantAttnProcessor` does."""
    processor = type(module.processor).__name__
    if processor not in PROCESSORS:
        hint = "; run pipe.unload_ip_adapter()" if processor.startswith("IPAdapter") else ""
        raise ConfigError(
            f"{name}: attention with {processor} cannot be quantized{hint}; expected one of "
            f"{', '.join(PROCESSORS)}"
        )
    for norm in ("norm_q", "norm_k"):
        if getattr(module, norm, None) is not None:
            raise ConfigError(f"{name}: attention with {norm} cannot be quantized")


def plain_copy(unet: nn.Module) -> nn.Module:
    """A copy without what others have put around its modules: offloading, fused projections.

    Raises:
        ConfigError: a module's forward is wrapped; the copy would run the original's.
    """
    unet = remove_hook_from_module(copy.deepcopy(unet), recurse=True)
    for name, module in unet.named_modules():
        own = vars(module).get("forward")
        if getattr(own, "__func__", None) is type(module).forward and own.__self__ is module:
            del module.forward  # accelerate leaves the class's own one on the instance
        elif own is not None:
            where = f"its module {name}" if name else "it"
            raise ConfigError(
                f"{type(unet).__name__}: the forward of {where} is replaced, as DeepCache and "
                "others do; undo that, and apply it to the quantized UNet"
            )
        if isinstance(module, Attention) and module.fused_projections:
            module.fused_projections = False
            for fused in ("to_qkv", "to_kv", "to_added_qkv"):
                module._modules.pop(fused, None)
    return unet


# ---- granularity, bits and parts of a layer ----


def _granularity(wanted: Granularity, bits: int, channels: int, tokens: bool) -> Granularity:
    """What has a scale of its own, where the config's wish cannot always be met.

    Args:
        wanted: the config's granularity.
        bits: of the activations; more than 4 leave no room for the carrier's ratios.
        channels: of the input; one channel is the whole tensor.
        tokens: whether tokens can have grids of their own.
    """
    if wanted == "token" and tokens:
        return "token"
    if wanted == "channel" and channels > 1:
        return "channel"
    if wanted in ("carrier", "token") and bits <= CARRIER_BITS:
        return "carrier"
    return "tensor"


def _act_bits(name: str, layer: nn.Module, role: str, config: QuantConfig) -> int:
    if config.act_layers not in ("all", layer_kind(layer, role)):
        return OFF
    bits = config.layer_act_bits.get(name)
    if bits is not None:
        return bits
    if role in ("first", "last"):
        bits = config.first_last_act_bits
    elif role in TIME_ROLES:
        bits = config.te_act_bits
    return config.act_bits if bits is None or config.act_bits == OFF else bits


def _weight_bits(name: str, role: str, config: QuantConfig) -> int:
    if (own := config.layer_weight_bits.get(name)) is not None:
        return own
    bits = config.first_last_weight_bits if role in ("first", "last") else None
    return config.weight_bits if bits is None or config.weight_bits == OFF else bits


def _parts(layer: nn.Module, split: int | None) -> torch.Tensor:
    """The part of each input channel [C]: 1 from channel `split` on, else 0."""
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    parts = torch.zeros(channels, dtype=torch.int64)
    if split is not None:
        parts[split:] = 1
    return parts


# ---- quantizers ----


def _input_quantizer(
    name: str,
    layer: nn.Module,
    role: str,
    parts: torch.Tensor,
    config: QuantConfig,
    steps: StepGroups,
) -> ActQuantizer:
    bits = _act_bits(name, layer, role, config)
    wanted = config.ranges.act_granularity
    if config.ranges.te_token and role in TIME_ROLES:
        wanted = "token"
    return ActQuantizer(
        f"{name}.input_quantizer",
        bits,
        steps,
        len(parts),
        -1 if isinstance(layer, nn.Linear) else 1,
        _granularity(wanted, bits, len(parts), sees_tokens(layer)),
        parts=parts,
        shifts=_weight_bits(name, role, config) <= CARRIER_BITS
        and getattr(layer, "groups", 1) == 1,
    )


def _weight_quantizer(
    name: str, layer: nn.Module, role: str, parts: torch.Tensor, config: QuantConfig
) -> WeightQuantizer | None:
    bits = _weight_bits(name, role, config)
    if bits == OFF:
        return None
    if getattr(layer, "groups", 1) > 1:
        # a grouped convolution's weight [O, I / groups, ...] has no channel of the other half
        parts = torch.zeros(layer.weight.shape[1], dtype=torch.int64)
    return WeightQuantizer(len(layer.weight), bits, parts)


def _transform(layer: nn.Module, role: str, config: QuantConfig) -> Transform | None:
    """What stands around a linear layer outside of the time path."""
    chosen = config.transforms
    if not chosen.any or not isinstance(layer, nn.Linear) or role in (*TIME_ROLES, "first", "last"):
        return None
    return Transform(
        layer.in_features,
        layer.out_features,
        rotation=chosen.rotation,
        rank=chosen.low_rank,
        smoothing=chosen.smoothing,
    ).to(layer.weight.device)


def _attention_processor(
    name: str, width: int, config: QuantConfig, steps: StepGroups
) -> QuantAttnProcessor:
    bits = config.act_bits if config.act_layers == "all" else OFF
    granularity = _granularity(config.ranges.act_granularity, bits, width, tokens=False)
    q, k, v = (
        # v alone meets an operand with room for 2^e: the softmax output
        ActQuantizer(f"{name}.{x}", bits, steps, width, -1, granularity, shifts=x == "v")
        for x in "qkv"
    )
    if config.softmax_bits is not None and bits != OFF:
        bits = config.softmax_bits
    probs = ActQuantizer(f"{name}.probs", bits, steps, 1, -1, unsigned=True)
    return QuantAttnProcessor(q, k, v, probs, rotation=config.transforms.rotation)
