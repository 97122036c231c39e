"""Full-precision pipelines: the embedded mini models by name, local diffusers folders, hub ids."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from questlib.errors import CheckpointError, ConfigError
from questlib.models.pipelines import PIPELINES

MINI = Path(__file__).parent / "mini"  # package data, written by questlib.models.export
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def embedded_models() -> list[str]:
    """Names of the pipelines that ship with the package."""
    return sorted(p.parent.name for p in MINI.glob("*/model_index.json"))


def load_pipeline(name_or_path: str | Path) -> DiffusionPipeline:
    """A diffusers pipeline in float32 and eval mode.

    "mini-ldm4" (or another embedded name) -> the model that ships with the package; an existing folder -> that folder and
    nothing else, no network; "owner/name" -> the Hugging Face hub or its local cache. ConfigError for anything else, among it
    a .ckpt file, which has to be converted first.
    """
    name = str(name_or_path)
    if name in embedded_models():
        return _from_folder(MINI / name)
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if Path(name).is_file():
        raise ConfigError(
            f"{name} is a file; make a diffusers folder of a CompVis checkpoint first: "
            f"python -m questlib.models convert {name} --config CONFIG.yaml --out DIR"
        )
    known = ", ".join(embedded_models()) or "none: this installation has no embedded models, see questlib/models/train.py"
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"unknown model {name!r}: give an embedded name ({known}), a diffusers folder, or a hub id owner/name")
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r}: no such folder, and neither the hub nor its local cache gives it ({reason}); embedded: {known}"
        ) from error
    return _prepare(pipe)


def model_digest(pipe_or_path: DiffusionPipeline | nn.Module | str | Path) -> str:
    """sha256 of the UNet's weights in float32: the same for a pipeline, its UNet, and the folder it came from."""
    model = load_pipeline(pipe_or_path) if isinstance(pipe_or_path, (str, Path)) else pipe_or_path
    unet = model if isinstance(model, nn.Module) else model.unet
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def parts_digest(pipe: DiffusionPipeline) -> str:
    """sha256 of what decides a pipeline's images beside its UNet's weights (`model_digest`): configs, the other parts' weights,
    a tokenizer's vocabulary."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if part is None:
            continue
        config = getattr(part, "config", None) or {}
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        about = {k: str(v) for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
        about |= part.get_vocab() if hasattr(part, "get_vocab") else {}
        digest.update(json.dumps([name, type(part).__name__, about], sort_keys=True).encode())
        if isinstance(part, nn.Module) and name != "unet":
            digest.update(model_digest(part).encode())
    return digest.hexdigest()


def _from_folder(folder: Path) -> DiffusionPipeline:
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder}: not a diffusers pipeline folder (no model_index.json)")
    bars = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in bars:
        module.disable_progress_bar()
    try:
        index = json.loads((folder / "model_index.json").read_text())
        pipeline = PIPELINES.get(index["_class_name"], DiffusionPipeline)  # diffusers finds its own classes only
        absent = {name: None for name, part in index.items() if part == [None, None]}  # e.g. the text encoder; must be said again
        pipe = pipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False, **absent)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the pipeline cannot be read ({str(error).strip().splitlines()[0]})") from error
    finally:
        for module in bars:
            module.enable_progress_bar()
    return _prepare(pipe)


def _prepare(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().float().requires_grad_(False)
    return pipe
