"""Checkpoints of quantized UNets. A loaded model has the same outputs, bit for bit.

A checkpoint is a folder with two files.

config.json
  format      2
  class       the diffusers class of the UNet
  unet        its configuration
  quant       the quantization's: `QuantConfig.to_dict()`, groups as nested objects
  timesteps   the calibrated timesteps, in the sampler's order
  dtype       of what is not quantized, "float16" or "bfloat16"; float32 where it is missing

model.safetensors, for a quantized layer NAME with weight [O, I, kh, kw] or [O, I]
  NAME.codes                         uint8 [ceil(n / 2)] for up to 4 bits: two consecutive codes a
                                     byte, the first in the low nibble; uint8 [n] for more bits.
                                     n is the size of the weight, in row-major order
  NAME.weight_quantizer.scale        float32 [O, P], P parts of a split input
  NAME.weight_quantizer.zero_point   uint8 [O, P]
  NAME.input_quantizer.*             those of an activation quantizer

and for an activation quantizer, of a layer or of attention (NAME.processor.q, k, v, probs), with G
step groups, P sets of parameters and C channels
  scale        float32 [G, P]
  zero_point   uint8 [G, C]
  ratio        uint8 [G, C]
  shift        uint8 [C]
  calibrated   bool, 0-d

All else (biases, norms, layers in full precision, the calibrated steps, a noise correction) is
stored as it is in the model. Tensors named `index` follow from the configuration and are left out.

Format 1 is read, too; see `from_format_1`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from questlib.baselines.noise_correction import insert_correction
from questlib.config import QuantConfig
from questlib.diffusers_quantizer import METHOD, attach
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.files import atomic_path
from questlib.integer.conversion import convert
from questlib.integer.engines import choose_engine
from questlib.packing import (
    CLASSES,
    Tensors,
    check_calibrated,
    check_rebuildable,
    last_part,
    load_tensors,
    stored_dtype,
    stored_tensors,
)
from questlib.quantization.carrier import split_ratio
from questlib.quantization.model import freeze, step_groups
from questlib.quantization.precision import cast
from questlib.quantization.preparation import prepare

FORMAT = 2
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # of a UNet that diffusers has saved


# ---- saving ----


def save_pretrained(unet: nn.Module, out_dir: str | Path) -> int:
    """Write a quantized UNet to a folder; files that are there already are replaced atomically.

    Args:
        unet: a quantized UNet, finetuned or not, before `questlib.convert`.
        out_dir: the folder; it is made when it is missing.

    Returns:
        The size of model.safetensors on disk, in bytes.

    Raises:
        ConfigError: the UNet is not quantized, or runs in integers: its weights then lie in the
            engine's own layout.
        QuestError: the folder cannot be written.

    Example:
        >>> size = questlib.save_pretrained(unet, "ldm4-w4a4")
        >>> unet = questlib.from_pretrained("ldm4-w4a4")
    """
    steps = step_groups(unet)
    check_rebuildable(unet)
    config = {
        "format": FORMAT,
        "class": type(unet).__name__,
        # Without private entries, among them the folder that the model was loaded from.
        "unet": {key: value for key, value in unet.config.items() if is_own(key)},
        "quant": unet.quest_config.to_dict(),
        "timesteps": steps.timesteps.flip(0).tolist(),
    }
    if unet.dtype != torch.float32:
        config["dtype"] = str(unet.dtype).removeprefix("torch.")
    state = stored_tensors(unet)
    out = Path(out_dir)
    try:
        with atomic_path(out / WEIGHTS_FILE) as temporary:
            save_file(state, temporary)
        with atomic_path(out / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(config, indent=1, default=str))
    except OSError as error:
        raise QuestError(f"save: cannot write to {out}: {error.strerror}") from error
    return (out / WEIGHTS_FILE).stat().st_size


def is_own(key: str) -> bool:
    """Whether an entry of a UNet's config says how it is built: not a path, a version, or this."""
    return not key.startswith("_") and key != "quantization_config"


# ---- loading ----


def from_pretrained(
    path: str | Path,
    engine: str = "fake",
    *,
    dtype: torch.dtype | None = None,
    weights: str = "packed",
    fuse: bool = False,
    fallback: bool = False,
) -> nn.Module:
    """Load what `save_pretrained` wrote: a frozen quantized UNet.

    Args:
        path: the checkpoint's folder.
        engine: "fake" is simulated quantization, with the outputs of the saved model bit for bit.
            Others run in integers: "cpu", "triton", "reference", or "auto"; see
            `questlib.convert`, also for the other arguments.
        dtype: of what is not quantized; None: as it was saved.
        weights: for an integer engine: how weights are kept in memory.
        fuse: for an integer engine: whether layers that follow each other are fused.
        fallback: for an integer engine: whether layers without an integer form are simulated.

    Raises:
        CheckpointError: damaged files, missing or unexpected tensors, or an unknown format.
        ConfigError: an unknown engine, or arguments that it does not have.
        EngineError: the engine cannot run here, or a layer has no integer form.

    Example:
        >>> pipe.unet = questlib.from_pretrained("ldm4-w4a4", engine="auto")
    """
    if engine != "fake":
        choose_engine(engine)  # an engine that cannot run is refused before any long work
    elif weights != "packed" or fuse or fallback:
        raise ConfigError(
            "weights, fuse and fallback are choices of the integer engines, not of engine 'fake'"
        )
    path = Path(path)
    config, state = read_files(path)
    unet = build_unet(path, config)
    load_tensors(path, unet, state)
    check_calibrated(path, unet)
    dtype = saved_dtype(path, config) if dtype is None else dtype
    if engine == "fake":
        return cast(freeze(unet), dtype)
    return convert(
        unet, engine, dtype=dtype, weights=weights, fuse=fuse, fallback=fallback, inplace=True
    )


def saved_dtype(path: Path, config: dict[str, Any]) -> torch.dtype:
    """The precision of a checkpoint's UNet. CheckpointError for one that there is not."""
    name = config.get("dtype", "float32")
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise CheckpointError(
            f"checkpoint {path}: dtype: expected one of {', '.join(dtypes)}, found {name!r}"
        )
    return dtypes[name]


def read_files(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Both files of a checkpoint, in format 2.

    Raises:
        CheckpointError: a file cannot be read, or the format is unknown.
    """
    try:
        config = json.loads((path / CONFIG_FILE).read_text())
        diffusers_own = isinstance(config, dict) and "quantization_config" in config
        state = load_file(path / (DIFFUSERS_FILE if diffusers_own else WEIGHTS_FILE))
    except (OSError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"checkpoint {path}: config.json: expected an object, found {type(config).__name__}"
        )
    if diffusers_own:
        config = from_diffusers(path, config, state)
    if config.get("format") == 1:
        return config, from_format_1(path, state)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path}: expected format 1 or {FORMAT}, found {config.get('format')!r}"
        )
    return config, state


def from_diffusers(path: Path, config: dict[str, Any], state: Tensors) -> dict[str, Any]:
    """The config of a folder that diffusers' `save_pretrained` wrote, as `save_pretrained` has it.

    Raises:
        CheckpointError: it is of another quantizer.
    """
    quant = config["quantization_config"]
    if not isinstance(quant, dict) or quant.get("quant_method") != METHOD:
        raise CheckpointError(f"checkpoint {path}: expected quant_method {METHOD!r}, found {quant}")
    return {
        "format": quant.get("format"),
        "class": config.get("_class_name"),
        "unet": config,
        "quant": quant.get("quant"),
        "timesteps": quant.get("timesteps"),
        "dtype": str(stored_dtype(state)).removeprefix("torch."),
    }


def from_format_1(path: Path, state: Tensors) -> Tensors:
    """The tensors of format 1 as format 2 has them, bit for bit.

    Format 1 differs in three ways:
    - a layer's quantizers are called `act` and `wq`, not `input_quantizer` and `weight_quantizer`;
    - `shift`, the e of ratios m * 2^e, is missing; it follows from each channel's largest ratio;
    - in config.json, the fields of `quant` are flat. `QuantConfig.from_dict` reads both.
    """
    names = {"act": "input_quantizer", "wq": "weight_quantizer"}
    renamed: Tensors = {}
    for name, value in state.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[-2] in names:
            parts[-2] = names[parts[-2]]
        renamed[".".join(parts)] = value
    for name in [name for name in renamed if last_part(name) == "ratio"]:
        ratio = renamed[name].float()  # [G, C]
        owner = name.removesuffix(".ratio")
        try:
            _, shift = split_ratio(ratio.amax(0), ratio, owner)
        except ConfigError as error:
            raise CheckpointError(f"checkpoint {path}: {error}") from error
        renamed[f"{owner}.shift"] = shift.to(torch.uint8)
    return renamed


def build_unet(path: Path, config: dict[str, Any]) -> nn.Module:
    """A quantized UNet of this structure, whose tensors are still to be loaded.

    Raises:
        CheckpointError: `config` does not describe a quantized UNet.
    """
    found = config.get("class")
    if found not in CLASSES:
        raise CheckpointError(
            f"checkpoint {path}: expected one of {', '.join(CLASSES)}, found {found!r}"
        )
    try:
        own = {k: v for k, v in config["unet"].items() if is_own(k)}
        unet = CLASSES[found].from_config(own)
        quant = QuantConfig.from_dict(config["quant"])
        unet = prepare(unet, quant, torch.tensor(config["timesteps"]), search_weights=False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: config.json does not describe a quantized UNet ({error!r})"
        ) from error
    if quant.noise_correction:
        insert_correction(unet)
    attach(unet)
    return unet
