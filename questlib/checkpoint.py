"""Checkpoints: model.safetensors (packed integer weights, scales) and config.json. Loading gives bit-identical outputs.

Per quantized layer NAME:
  NAME.codes          uint8 [ceil(n / 2)] for up to 4 bits: two consecutive codes a byte, the first in the low nibble;
                      uint8 [n] otherwise. n = O * I * kh * kw, in the layer's own order (row-major)
  NAME.wq.scale, NAME.wq.zero_point    float32, uint8 [O, P]; NAME.wq.index (only for split inputs)
  *.scale float32 [G, P], *.zero_point, *.ratio uint8 [G, C] of each activation quantizer, where G is the number of step groups
All else (biases, norms, layers left in full precision) is stored as it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from questlib.config import QuantConfig
from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.integer.conversion import convert
from questlib.integer.engines import LAYERS, choose_engine
from questlib.integer.form import packed_size
from questlib.quantization.model import act_quantizers, freeze, quant_layers, step_groups
from questlib.quantization.preparation import prepare

FORMAT = 1
UNETS = {c.__name__: c for c in (UNet2DModel, UNet2DConditionModel, FixedHeadsUNet2DModel)}
SMALL = ("zero_point", "ratio")  # integers below 256: stored as bytes, float32 in the model


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of any shape -> uint8 [n]; up to 4 bits two consecutive codes share a byte, the first in the low nibble."""
    flat = codes.flatten()
    if bits > 4:
        return flat.contiguous()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack(packed: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """Inverse of `pack`. CheckpointError when the number of bytes does not fit `shape`, or a code exceeds `bits`."""
    n = shape.numel()
    expected = packed_size(n, bits)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise CheckpointError(
            f"packed weight: expected {expected} bytes for shape {list(shape)} at {bits} bits, found {packed.numel()}"
        )
    codes = packed if bits > 4 else torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]
    if n and int(codes.max()) >= 2**bits:
        raise CheckpointError(f"packed weight: code {int(codes.max())} exceeds {bits} bits")
    return codes.reshape(shape)


def save_pretrained(unet: nn.Module, out_dir: str | Path) -> int:
    """Write a quantized UNet; returns the size of model.safetensors in bytes, as it is on disk. Files are replaced atomically.

    ConfigError for a plain UNet, and for one that `convert` made: its weights lie in the engine's own layout.
    """
    step_groups(unet)
    if any(isinstance(m, LAYERS) for m in unet.modules()):
        raise ConfigError(
            "save: expected a simulated UNet, found one that runs in integers; save it before it is converted"
        )
    out = Path(out_dir)
    state = dict(unet.state_dict())
    for name, layer in quant_layers(unet).items():
        if layer.weight_quantizer is not None:
            del state[f"{name}.weight"]
            state[f"{name}.codes"] = pack(
                layer.weight_quantizer.codes(layer.weight.detach()), layer.weight_quantizer.bits
            )
    for name in list(state):
        last = name.rsplit(".", 1)[-1]
        if last in SMALL:
            state[name] = state[name].to(torch.uint8)
        elif last == "index":
            del state[name]  # follows from the model's structure and the config
    config = {
        "format": FORMAT,
        "class": type(unet).__name__,
        "unet": dict(unet.config),
        "quant": unet.quest_config.to_dict(),
    }
    config["timesteps"] = unet.quest_steps.timesteps.flip(0).tolist()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tmp = out / f"tmp{os.getpid()}"
        save_file({k: v.detach().contiguous() for k, v in state.items()}, tmp)
        os.replace(tmp, out / "model.safetensors")
        tmp.write_text(json.dumps(config, indent=1, default=str))
        os.replace(tmp, out / "config.json")
    except OSError as error:
        raise QuestError(f"save: cannot write to {out}: {error.strerror}") from error
    return (out / "model.safetensors").stat().st_size


def from_pretrained(
    path: str | Path,
    engine: str = "fake",
    *,
    dtype: torch.dtype = torch.float32,
    weights: str = "packed",
    fuse: bool = False,
    fallback: bool = False,
) -> nn.Module:
    """Load what `save_pretrained` wrote: a frozen quantized UNet.

    engine: "fake", simulated quantization, whose outputs equal the saved model's bit for bit; or integers ("cpu", "reference",
    "auto": see `questlib.integer.conversion`, also for the other choices).
    CheckpointError for damaged files, missing or unexpected tensors; EngineError when the engine cannot run here or a layer has
    no integer form.
    """
    if engine != "fake":
        choose_engine(engine)  # before any long work
    elif dtype != torch.float32 or weights != "packed" or fuse or fallback:
        raise ConfigError(
            "dtype, weights, fuse and fallback are choices of the integer engines, not of engine 'fake'"
        )
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text())
        state = load_file(path / "model.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"checkpoint {path}: config.json: expected an object, found {type(config).__name__}"
        )
    if config.get("format") != FORMAT or config.get("class") not in UNETS:
        raise CheckpointError(
            f"checkpoint {path}: expected format {FORMAT} of a diffusers UNet, found {config.get('format')} {config.get('class')}"
        )
    try:
        quant = QuantConfig.from_dict(config["quant"])
        unet = UNETS[config["class"]].from_config(
            {k: v for k, v in config["unet"].items() if not k.startswith("_")}
        )
        # ranges are overwritten below: skip the search
        unet = prepare(
            unet, quant.replace(weight_range="minmax"), torch.tensor(config["timesteps"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: config.json does not describe a quantized UNet ({error!r})"
        ) from error
    unet.quest_config = quant
    packed = {
        n: state.pop(f"{n}.codes", None)
        for n, layer in quant_layers(unet).items()
        if layer.weight_quantizer is not None
    }
    missing = [f"{n}.codes" for n, v in packed.items() if v is None]
    own = unet.state_dict()
    derived = {f"{n}.weight" for n in packed} | {k for k in own if k.rsplit(".", 1)[-1] == "index"}
    missing += sorted(set(own) - set(state) - derived)
    unexpected = sorted(set(state) - set(own))
    wrong = [
        f"{k} {list(v.shape)} (expected {list(own[k].shape)})"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or unexpected or wrong:
        lists = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        found = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in lists if names)
        raise CheckpointError(f"checkpoint {path} does not fit {config['class']}: {found}")
    unet.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=False)
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"checkpoint {path}: not finite: {', '.join(bad[:5])}")
    for name, layer in quant_layers(unet).items():
        if layer.weight_quantizer is not None:
            layer.weight.data.copy_(
                layer.weight_quantizer.decode(
                    unpack(packed[name], layer.weight_quantizer.bits, layer.weight.shape)
                )
            )
    uncalibrated = [q.name for q in act_quantizers(unet) if q.enabled and not bool(q.calibrated)]
    if quant.noise_correction and not bool(unet.quest_correction.calibrated):
        uncalibrated.append("quest_correction")
    if uncalibrated:
        raise CheckpointError(
            f"checkpoint {path}: activation scales were never calibrated: {', '.join(uncalibrated[:5])}"
        )
    return (
        freeze(unet)
        if engine == "fake"
        else convert(
            unet, engine, dtype=dtype, weights=weights, fuse=fuse, fallback=fallback, inplace=True
        )
    )
