"""Full-precision pipelines from a diffusers folder or the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn

from questlib.errors import CheckpointError, ConfigError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NO_CLASSES: Mapping[str, type[DiffusionPipeline]] = {}


def load_pipeline(
    name_or_path: str | Path, classes: Mapping[str, type[DiffusionPipeline]] = NO_CLASSES
) -> DiffusionPipeline:
    """A diffusers pipeline in float32 and eval mode.

    An existing folder is read as it is, without a network; "owner/name" is looked up on the
    Hugging Face hub or in its local cache.

    Args:
        classes: pipeline classes that diffusers does not have, by name.

    Raises:
        ConfigError: no such folder or hub id, or a file.
        CheckpointError: a folder that cannot be read.
    """
    name = str(name_or_path)
    if Path(name).is_dir():
        return _from_folder(Path(name), classes)
    if Path(name).is_file():
        raise ConfigError(f"{name} is a file; expected a diffusers folder or a hub id owner/name")
    if not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"unknown model {name!r}: expected a diffusers folder or a hub id owner/name"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r}: no such folder, and neither the hub nor its local cache gives it "
            f"({reason})"
        ) from error
    return _prepare(pipe)


def _from_folder(folder: Path, classes: Mapping[str, type[DiffusionPipeline]]) -> DiffusionPipeline:
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder}: not a diffusers pipeline folder (no model_index.json)")
    from transformers.utils import logging as transformers_logging  # slow to import

    bars = [m for m in (diffusers_logging, transformers_logging) if m.is_progress_bar_enabled()]
    for module in bars:
        module.disable_progress_bar()
    try:
        index = json.loads((folder / "model_index.json").read_text())
        pipeline = classes.get(
            index["_class_name"], DiffusionPipeline
        )  # diffusers finds its own classes only
        absent = {
            name: None for name, part in index.items() if part == [None, None]
        }  # e.g. the text encoder; must be said again
        pipe = pipeline.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, **absent
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the pipeline cannot be read ({str(error).strip().splitlines()[0]})"
        ) from error
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
