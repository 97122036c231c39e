"""The tensors of a quantized UNet as files hold them: packed codes, and tables as bytes.

`questlib.checkpoint` describes the names and the layout.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from questlib.baselines.noise_correction import NoiseCorrection
from questlib.config import QuantConfig
from questlib.denoisers import TRANSFORMERS, UNETS
from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.integrity import LATEST, Tensors, check_finite, check_like, fail_if_any
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.packed_codes import pack, packed_size, unpack
from questlib.quantization.precision import FixedPrecision
from questlib.quantization.seal import check_whole
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.stored_values import wrong_act_values, wrong_weight_values
from questlib.quantization.transforms import Transform
from questlib.quantization.weight_quantizer import WeightQuantizer

CLASSES = {c.__name__: c for c in (*UNETS, FixedHeadsUNet2DModel, *TRANSFORMERS)}

# Biases of the first layer, which a quantized model has in the precision of what is not quantized.
FIRST_BIASES = ("conv_in.bias", "pos_embed.proj.bias")

# Tensors of whole numbers below 256: bytes in the file, float32 or int64 in the model.
BYTES = ("zero_point", "ratio", "shift")

# Factors of FreeU, attributes of the up blocks.
FREEU = ("s1", "s2", "b1", "b2")

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # of what is not quantized


def coded_layers(unet: nn.Module) -> dict[str, tuple[QuantLayer, WeightQuantizer]]:
    """The layers whose weights are stored as codes, each with its quantizer, by name."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in quant_layers(unet).items()
        if layer.weight_quantizer is not None
    }


def last_part(name: str) -> str:
    """The last part of a tensor's dotted name."""
    return name.rpartition(".")[2]


# ---- saving ----


def check_rebuildable(unet: nn.Module) -> None:
    """Check that a UNet can be made again from its config, before anything is written.

    Raises:
        ConfigError: it is of a class of the user's own, or blocks have switches that no config has.
        QuestError: a part of it is no longer quantized, or a value is not finite.
    """
    check_whole(unet)
    if getattr(unet, "quest_engine", None) is not None:
        raise ConfigError(
            "save: expected a simulated UNet, found one that runs in integers; "
            "save it before it is converted"
        )
    if type(unet) not in CLASSES.values():
        raise ConfigError(
            f"save: a {type(unet).__name__} cannot be made again from its config; expected one of "
            f"{', '.join(CLASSES)}"
        )
    for name, block in unet.named_modules():
        if any(getattr(block, key, None) is not None for key in FREEU):
            raise ConfigError(
                f"save: {name} has FreeU's factors, which no config has; run unet.disable_freeu(), "
                "save, and enable it again after loading"
            )
    check_finite("save", unet.state_dict(), QuestError)


def stored_tensors(unet: nn.Module) -> Tensors:
    """What model.safetensors holds of a quantized UNet."""
    state: Tensors = dict(unet.state_dict())
    for name, (layer, quantizer) in coded_layers(unet).items():
        del state[f"{name}.weight"]
        state[f"{name}.codes"] = pack(layer.codes(), quantizer.bits)
    stored = {}
    for name, value in state.items():
        if last_part(name) == "index":
            continue
        value = value.to(torch.uint8) if last_part(name) in BYTES else value
        stored[name] = value.detach().contiguous()
    return stored


# ---- loading ----


def read_quantization(where: Path, quant: Any, timesteps: Any) -> tuple[QuantConfig, torch.Tensor]:
    """How a checkpoint is quantized, and its calibrated timesteps [T], from what JSON holds.

    Raises:
        CheckpointError: they are not such values.
    """
    numbers = isinstance(timesteps, list) and all(type(t) in (int, float) for t in timesteps)
    if not numbers or not timesteps or not all(abs(t) < LATEST for t in timesteps):
        raise CheckpointError(
            f"checkpoint {where}: timesteps: expected a list of numbers below {LATEST}, "
            f"found {reprlib.repr(timesteps)}"
        )
    try:
        return QuantConfig.from_dict(quant), torch.tensor(timesteps)
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {where}: quant: {error}") from error


def load_tensors(path: Path, unet: nn.Module, state: Tensors) -> None:
    """Load a checkpoint's tensors into the UNet that `build_unet` made; all must fit.

    Raises:
        CheckpointError: missing or unexpected tensors, wrong shapes or types, values that are not
            finite or that no quantizer has, codes out of range. The message names them.
    """
    where = f"checkpoint {path} does not fit {type(unet).__name__}"
    layers = coded_layers(unet)
    own = unet.state_dict()
    expected = expected_tensors(unet, own, saved_precision(path, state))
    check_like(where, state, expected)
    check_values(path, unet, state)

    values = {name: state[name].to(own[name].dtype) for name in expected if name in own}
    unet.load_state_dict(values, strict=False)
    for name, (layer, quantizer) in layers.items():
        unpacked = unpack(state[f"{name}.codes"], quantizer.bits, layer.weight.shape, name)
        layer.weight.data.copy_(quantizer.decode(unpacked))


def saved_precision(path: Path, state: Tensors) -> torch.dtype:
    """The precision of what is not quantized. CheckpointError where it is none of three."""
    name = next((name for name in FIRST_BIASES if name in state), FIRST_BIASES[0])
    bias = state.get(name)
    if bias is None or bias.dtype not in PRECISIONS:
        found = "none" if bias is None else bias.dtype
        raise CheckpointError(
            f"checkpoint {path}: {name}: expected float32, float16 or bfloat16, found {found}"
        )
    return bias.dtype


def expected_tensors(unet: nn.Module, own: Tensors, dtype: torch.dtype) -> Tensors:
    """Tensors of the names, shapes and types that a checkpoint of this UNet has, without values.

    Args:
        own: the UNet's state.
        dtype: the precision of what is not quantized.
    """
    fixed = [name for name, m in unet.named_modules() if isinstance(m, FixedPrecision)]
    kept = {f"{name}.{key}" for name in fixed for key in unet.get_submodule(name).state_dict()}
    expected = {}
    for name, value in own.items():
        if last_part(name) == "index":
            continue
        stored = value.dtype if name in kept or not value.is_floating_point() else dtype
        stored = torch.uint8 if last_part(name) in BYTES else stored
        expected[name] = torch.empty(value.shape, dtype=stored, device="meta")
    for name, (layer, quantizer) in coded_layers(unet).items():
        del expected[f"{name}.weight"]
        size = packed_size(layer.weight.numel(), quantizer.bits)
        expected[f"{name}.codes"] = torch.empty(size, dtype=torch.uint8, device="meta")
    return expected


def check_values(path: Path, unet: nn.Module, state: Tensors) -> None:
    """CheckpointError that names the values which no quantizer of this UNet has."""

    def of(name: str) -> Tensors:
        start = f"{name}."
        return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}

    wrong = []
    for name, module in unet.named_modules():
        if isinstance(module, ActQuantizer):
            wrong += [f"{name}.{value}" for value in wrong_act_values(module, of(name))]
        elif isinstance(module, WeightQuantizer):
            wrong += [f"{name}.{value}" for value in wrong_weight_values(module, of(name))]
        elif isinstance(module, StepGroups):
            known = module.state_dict()
            wrong += [f"{name}.{k}" for k, v in of(name).items() if not torch.equal(v, known[k])]
        elif isinstance(module, NoiseCorrection | Transform):
            wrong += [f"{name}.{value}" for value in module.wrong_values(of(name))]
    fail_if_any(f"checkpoint {path}", {"impossible values": wrong})


def check_calibrated(path: Path, unet: nn.Module) -> None:
    """Raise CheckpointError when a quantizer or the noise correction was never calibrated."""
    found = [q.name for q in act_quantizers(unet) if q.enabled and not bool(q.calibrated)]
    if unet.quest_config.noise_correction and not bool(unet.quest_correction.calibrated):
        found.append("quest_correction")
    if found:
        raise CheckpointError(
            f"checkpoint {path}: activation scales were never calibrated: {', '.join(found[:5])}"
        )
