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

The metadata of model.safetensors has the digests of all tensors (`questlib.integrity`), and what
config.json holds, whose last entry is a digest of the others. So the file is complete by itself: a
save that was stopped between the two files leaves the new weights with their own configuration.

Format 1, and format 2 without digests, are read, too; see `from_format_1`.
"""

from __future__ import annotations

import inspect
import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from questlib.baselines.noise_correction import insert_correction
from questlib.diffusers_quantizer import (
    CONFIG_FILE,
    METHOD,
    attach,
    check_saved_config,
    read_config,
)
from questlib.errors import CheckpointError, ConfigError
from questlib.files import atomic_path
from questlib.integer.conversion import convert
from questlib.integer.engines import choose_engine, fastest
from questlib.integer.float_attention import apply_attention, check_attention
from questlib.integrity import Tensors, digest_of_json, fail_if_any, read_tensors, with_digests
from questlib.packing import (
    CLASSES,
    check_calibrated,
    check_rebuildable,
    last_part,
    load_tensors,
    read_quantization,
    saved_precision,
    stored_tensors,
)
from questlib.quantization.carrier import split_ratio
from questlib.quantization.model import freeze, step_groups
from questlib.quantization.precision import cast
from questlib.quantization.preparation import prepare

FORMAT = 2
WEIGHTS_FILE = "model.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"  # of a UNet that diffusers has saved
DIGEST = "digest"  # the entry of config.json
CONFIG = "config"  # what the weights' metadata say of config.json: all of it

# What diffusers and torch raise at a config that they cannot build.
BUILDING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        StorageError: the folder cannot be written; an older checkpoint in it is kept.

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
    config = json.loads(json.dumps(config, default=str))
    config[DIGEST] = digest_of_json(config)
    state = stored_tensors(unet)
    out = Path(out_dir)
    # Both are written before one takes its place: a full disk leaves both old ones.
    with (
        atomic_path(out / CONFIG_FILE) as config_file,
        atomic_path(out / WEIGHTS_FILE) as weights_file,
    ):
        config_file.write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file(state, weights_file, with_digests(state, {CONFIG: config}))
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
    fuse: bool | None = None,
    graphs: bool | None = None,
    attention: str = "quantized",
    fallback: bool = False,
) -> nn.Module:
    """Load what `save_pretrained` wrote: a frozen quantized UNet.

    Args:
        path: the checkpoint's folder.
        engine: "fake" is simulated quantization, with the outputs of the saved model bit for bit.
            Others run in integers: "cpu", "triton", "reference", or "auto"; see
            `questlib.convert`, also for the other arguments. Where "triton" finds a GPU, the UNet
            is put there.
        dtype: of what is not quantized; None: float16 for "triton" on a GPU, otherwise as it was
            saved.
        weights: for an integer engine: how weights are kept in memory.
        fuse: for engines "cpu" and "triton": whether layers that follow each other are fused; None:
            on a GPU.
        graphs: for engine "triton": whether steps run as CUDA graphs; None: on a GPU.
        attention: "quantized", "float" or "auto": whether attention's products are left in floating
            point, as for `questlib.convert`. Engine "fake" takes it too, and simulates the same.
        fallback: for an integer engine: whether layers without an integer form are simulated.

    Raises:
        CheckpointError: damaged files, missing or unexpected tensors, or an unknown format.
        ConfigError: an unknown engine, or arguments that it does not have.
        EngineError: the engine cannot run here, or a layer has no integer form.

    Example:
        >>> pipe.unet = questlib.from_pretrained("ldm4-w4a4", engine="auto")
    """
    if engine != "fake":
        # An engine that cannot run is refused before any long work.
        defaults = fastest(choose_engine(engine))
    elif weights != "packed" or fuse or graphs or fallback:
        raise ConfigError(
            "weights, fuse, graphs and fallback are choices of the integer engines, "
            "not of engine 'fake'"
        )
    check_attention(attention)
    path = Path(path)
    config, state = read_files(path)
    unet = build_unet(path, config, state)
    load_tensors(path, unet, state)
    check_calibrated(path, unet)
    saved = check_saved_dtype(path, config, state)
    if engine == "fake":
        apply_attention(unet, attention)
        return cast(freeze(unet), saved if dtype is None else dtype)
    made = convert(
        unet,
        engine,
        dtype=dtype or defaults.dtype or saved,
        weights=weights,
        fuse=defaults.fuse if fuse is None else fuse,
        graphs=defaults.graphs if graphs is None else graphs,
        attention=attention,
        fallback=fallback,
        inplace=True,
    )
    return made if defaults.device == "cpu" else nn.Module.to(made, defaults.device)


def check_saved_dtype(path: Path, config: dict[str, Any], state: Tensors) -> torch.dtype:
    """The precision of a checkpoint's UNet. CheckpointError where its files disagree."""
    found = saved_precision(path, state)
    name = config.get("dtype", "float32")
    if name != str(found).removeprefix("torch."):
        raise CheckpointError(
            f"checkpoint {path}: {CONFIG_FILE}: dtype: expected that of conv_in.bias, {found}, "
            f"found {name!r}"
        )
    return found


def read_files(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Both files of a checkpoint, in format 2.

    Raises:
        CheckpointError: a file cannot be read, does not hold what was saved, or is of an unknown
            format.
    """
    config = read_config(path / CONFIG_FILE)
    if "quantization_config" in config:
        state, about = read_tensors(path / DIFFUSERS_FILE)
        check_saved_config(path / CONFIG_FILE, config, about)
        config = from_diffusers(path, config, state)
    else:
        state, about = read_tensors(path / WEIGHTS_FILE)
        config = own_config(path, config, about)
    if type(config.get("format")) is not int or config["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"checkpoint {path}: expected format 1 or {FORMAT}, found {config.get('format')!r}"
        )
    own = check_structure(path, config)
    if CONFIG not in about:
        # Without digests nothing tells an entry that was lost from one that was never there.
        # diffusers would take a default for it.
        fail_if_any(f"checkpoint {path}: {CONFIG_FILE}", {"missing": entries_of(config) - own})
    return config, from_format_1(path, state) if config["format"] == 1 else state


def check_structure(path: Path, config: dict[str, Any]) -> set[str]:
    """The names of the UNet's own entries, once it is clear that the config has all its parts.

    Raises:
        CheckpointError: a part is missing, or is of another type; the class of the UNet is not
            known, or does not have an entry.
    """
    name = config.get("class")
    if not isinstance(name, str) or name not in CLASSES:
        raise CheckpointError(
            f"checkpoint {path}: expected one of {', '.join(CLASSES)}, found {name!r}"
        )
    for key, kind in (("unet", dict), ("quant", dict), ("timesteps", list)):
        if not isinstance(config.get(key), kind):
            raise CheckpointError(
                f"checkpoint {path}: {CONFIG_FILE} does not describe a quantized UNet: {key}: "
                f"expected a {kind.__name__}, found {reprlib.repr(config.get(key))}"
            )
    own = {key for key in config["unet"] if is_own(key)}
    fail_if_any(f"checkpoint {path}: {CONFIG_FILE}", {"unexpected": own - entries_of(config)})
    return own


def entries_of(config: dict[str, Any]) -> set[str]:
    """The entries that the config of this class of UNet has."""
    return set(inspect.signature(CLASSES[config["class"]].__init__).parameters) - {"self"}


def own_config(path: Path, config: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the weights: config.json's, or a newer one that came with them.

    Raises:
        CheckpointError: config.json is not what was saved, or is not of these weights.
    """
    own = about.get(CONFIG)
    whole = config.get(DIGEST) == digest_of_json(without(config, DIGEST))
    if own is None and DIGEST in config:
        raise CheckpointError(
            f"checkpoint {path}: {WEIGHTS_FILE} has no digests, {CONFIG_FILE} has one: they were "
            "not saved together, or a tool has written the weights again"
        )
    # A whole one of another save: the save of these weights has stopped before it was replaced.
    if own is not None and config != own and not whole:
        raise CheckpointError(
            f"checkpoint {path}: {CONFIG_FILE} is not what was saved with {WEIGHTS_FILE}"
        )
    return without(config if own is None else own, DIGEST)


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A configuration without one of its entries."""
    return {k: v for k, v in config.items() if k != key}


def from_diffusers(path: Path, config: dict[str, Any], state: Tensors) -> dict[str, Any]:
    """The config of a folder that diffusers' `save_pretrained` wrote, as `save_pretrained` has it.

    Raises:
        CheckpointError: it is of another quantizer.
    """
    quant = config["quantization_config"]
    if not isinstance(quant, dict) or quant.get("quant_method") != METHOD:
        raise CheckpointError(f"checkpoint {path}: expected quant_method {METHOD!r}, found {quant}")
    dtype = str(saved_precision(path, state)).removeprefix("torch.")
    return {
        "format": quant.get("format"),
        "class": config.get("_class_name"),
        "unet": config,
        "quant": quant.get("quant"),
        "timesteps": quant.get("timesteps"),
        "dtype": dtype,
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


def build_unet(path: Path, config: dict[str, Any], state: Tensors) -> nn.Module:
    """A quantized UNet of this structure, whose tensors are still to be loaded.

    Raises:
        CheckpointError: `config` does not describe a quantized UNet, or one that is larger than
            the checkpoint.
    """
    quant, timesteps = read_quantization(path, config["quant"], config["timesteps"])
    name = config["class"]
    own = {key: value for key, value in config["unet"].items() if is_own(key)}
    check_layers(path, own, len(state))
    try:
        # First without memory: what a file describes can be larger than any machine.
        with torch.device("meta"):
            planned = sum(p.numel() for p in CLASSES[name].from_config(own).parameters())
        # two codes of 4 bits a byte are the smallest weights
        if planned > 2 * sum(tensor.nbytes for tensor in state.values()):
            raise CheckpointError(
                f"checkpoint {path} does not fit {name}: {CONFIG_FILE} describes {planned} "
                "weights, more than its file holds"
            )
        unet = CLASSES[name].from_config(own)
        unet = prepare(unet, quant, timesteps, search_weights=False)
    except CheckpointError:
        raise
    except BUILDING as error:
        raise CheckpointError(
            f"checkpoint {path}: {CONFIG_FILE} does not describe a quantized UNet ({error!r})"
        ) from error
    if quant.noise_correction:
        insert_correction(unet)
    attach(unet)
    return unet


def check_layers(path: Path, own: dict[str, Any], tensors: int) -> None:
    """Check the numbers of layers in a UNet's config, before anything is built of it.

    Args:
        own: the config, without private entries.
        tensors: how many the checkpoint has; no UNet has more layers.

    Raises:
        CheckpointError: one of them is not such a number.
    """
    wrong = [
        f"{key} = {reprlib.repr(value)}"
        for key, value in own.items()
        if "layers" in key and not all(_is_count(n, tensors) for n in _numbers(value))
    ]
    fail_if_any(f"checkpoint {path}: {CONFIG_FILE}", {f"expected 1..{tensors} layers": wrong})


def _numbers(value: Any) -> list[Any]:
    """The entries of nested lists, or the value itself; nothing for None."""
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [] if value is None else [value]


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
