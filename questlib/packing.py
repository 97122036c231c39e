"""The tensors of a quantized UNet as files hold them: packed codes, and tables as bytes.

`questlib.checkpoint` describes the names and the layout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from questlib.denoisers import TRANSFORMERS, UNETS
from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.seal import check_whole
from questlib.quantization.weight_quantizer import WeightQuantizer

CLASSES = {c.__name__: c for c in (*UNETS, FixedHeadsUNet2DModel, *TRANSFORMERS)}

# Biases of the first layer, which a quantized model has in the precision of what is not quantized.
FIRST_BIASES = ("conv_in.bias", "pos_embed.proj.bias")

# Tensors of whole numbers below 256: bytes in the file, float32 or int64 in the model.
BYTES = ("zero_point", "ratio", "shift")

# Factors of FreeU, attributes of the up blocks.
FREEU = ("s1", "s2", "b1", "b2")

Tensors = dict[str, torch.Tensor]


# ---- codes of weights ----


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of any shape -> uint8 [n] bytes.

    Up to 4 bits two consecutive codes share a byte, the first in the low nibble.
    """
    flat = codes.flatten()
    if bits > 4:
        return flat.contiguous()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack(packed: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes of this shape.

    Raises:
        CheckpointError: the number of bytes does not fit the shape, or a code exceeds `bits`.
    """
    n = shape.numel()
    expected = packed_size(n, bits)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise CheckpointError(
            f"packed weight: expected {expected} bytes for shape {list(shape)} at {bits} bits, "
            f"found {packed.numel()}"
        )
    codes = packed if bits > 4 else torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]
    if n and int(codes.max()) >= 2**bits:
        raise CheckpointError(f"packed weight: code {int(codes.max())} exceeds {bits} bits")
    return codes.reshape(shape)


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


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` weight codes in a checkpoint: up to 4 bits two codes share a byte."""
    return (count + 1) // 2 if bits <= 4 else count


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
    state = unet.state_dict()
    infinite = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if infinite:
        raise QuestError(f"save: not finite: {', '.join(infinite[:5])}")


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


def stored_dtype(state: Tensors) -> torch.dtype:
    """The precision in which a file has what is not quantized."""
    return next((state[name].dtype for name in FIRST_BIASES if name in state), torch.float32)


def load_tensors(path: Path, unet: nn.Module, state: Tensors) -> None:
    """Load a checkpoint's tensors into the UNet that `build_unet` made; all must fit.

    Raises:
        CheckpointError: missing or unexpected tensors, wrong shapes, values that are not finite,
            codes out of range.
    """
    layers = coded_layers(unet)
    own = unet.state_dict()
    expected = {name: value.shape for name, value in own.items() if last_part(name) != "index"}
    for name in layers:
        del expected[f"{name}.weight"]
    codes = {f"{name}.codes" for name in layers}

    missing = sorted((expected.keys() | codes) - state.keys())
    unexpected = sorted(state.keys() - expected.keys() - codes)
    wrong = [
        f"{name} {list(state[name].shape)} (expected {list(shape)})"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if missing or unexpected or wrong:
        lists = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        found = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in lists if names)
        raise CheckpointError(f"checkpoint {path} does not fit {type(unet).__name__}: {found}")

    infinite = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if infinite:
        raise CheckpointError(f"checkpoint {path}: not finite: {', '.join(infinite[:5])}")

    values = {name: state[name].to(own[name].dtype) for name in expected}
    unet.load_state_dict(values, strict=False)
    for name, (layer, quantizer) in layers.items():
        unpacked = unpack(state[f"{name}.codes"], quantizer.bits, layer.weight.shape)
        layer.weight.data.copy_(quantizer.decode(unpacked))


def check_calibrated(path: Path, unet: nn.Module) -> None:
    """Raise CheckpointError when a quantizer or the noise correction was never calibrated."""
    found = [q.name for q in act_quantizers(unet) if q.enabled and not bool(q.calibrated)]
    if unet.quest_config.noise_correction and not bool(unet.quest_correction.calibrated):
        found.append("quest_correction")
    if found:
        raise CheckpointError(
            f"checkpoint {path}: activation scales were never calibrated: {', '.join(found[:5])}"
        )
