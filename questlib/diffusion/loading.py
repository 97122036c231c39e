"""Full-precision pipelines from a diffusers folder or the Hugging Face hub."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn

# diffusers takes a folder's own classes only from modules that are imported already.
import questlib.diffusion.unets  # noqa: F401
from questlib.denoisers import PARTS
from questlib.errors import CheckpointError, ConfigError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
VARIANT = re.compile(r"diffusion_pytorch_model\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
LOADERS = "questlib.pipelines"  # a group of entry points, see `load_pipeline`

Loader = Callable[[str], DiffusionPipeline]


def load_pipeline(name_or_path: str | Path) -> DiffusionPipeline:
    """A diffusers pipeline in float32 and eval mode.

    A package that ships models of its own, as `reproduce` does with "mini-ldm4" and others,
    registers a loader as an entry point of the group `questlib.pipelines`. The first one by name
    is used. Without any, folders and hub ids can be loaded (`read_pipeline`).

    Args:
        name_or_path: a shipped model's name, a diffusers folder, or a hub id owner/name.

    Raises:
        ConfigError: none of these.
        CheckpointError: a folder that cannot be read.

    Example:
        >>> pipe = questlib.load_pipeline("mini-ldm4")
    """
    return _find_loader()(str(name_or_path))


def _find_loader() -> Loader:
    loaders = sorted(importlib.metadata.entry_points(group=LOADERS), key=lambda e: e.name)
    return loaders[0].load() if loaders else read_pipeline


def read_pipeline(
    name_or_path: str | Path, classes: Mapping[str, type[DiffusionPipeline]] | None = None
) -> DiffusionPipeline:
    """A diffusers pipeline of a folder or the hub, in float32 and eval mode.

    An existing folder is read as it is, without a network; "owner/name" is looked up on the
    Hugging Face hub or in its local cache.

    Args:
        classes: pipeline classes that diffusers does not have, by name.

    Raises:
        ConfigError: no such folder or hub id, or a file.
        CheckpointError: a folder that cannot be read.

    Example:
        >>> pipe = read_pipeline("CompVis/ldm-celebahq-256")
    """
    name = str(name_or_path)
    if Path(name).is_dir():
        return _from_folder(Path(name), classes or {})
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
    return _full_precision(pipe)


def _from_folder(folder: Path, classes: Mapping[str, type[DiffusionPipeline]]) -> DiffusionPipeline:
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder}: not a diffusers pipeline folder (no model_index.json)")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        # diffusers finds its own pipeline classes only.
        pipeline = classes.get(index["_class_name"], DiffusionPipeline)
        # Components that the folder says are absent, e.g. a text encoder, have to be said again.
        absent = {name: None for name, part in index.items() if part == [None, None]}
        with _no_progress_bars():
            pipe = pipeline.from_pretrained(
                folder,
                local_files_only=True,
                low_cpu_mem_usage=False,
                variant=_only_variant(folder),
                **absent,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the pipeline cannot be read ({str(error).strip().splitlines()[0]})"
        ) from error
    return _full_precision(pipe)


def _only_variant(folder: Path) -> str | None:
    """The variant of a folder whose denoiser has no weights without one, such as "fp16"."""
    parts = [path for part in PARTS for path in (folder / part).glob("diffusion_pytorch_model*")]
    names = [path.name for path in parts]
    plain = any(VARIANT.fullmatch(name) is None for name in names)
    found = sorted({match[1] for name in names if (match := VARIANT.fullmatch(name))})
    return None if plain or not found else found[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Inside the block, loading shows no bars; afterwards they are as the user had them."""
    loggers = [diffusers_logging]
    try:
        from transformers.utils import logging as transformers_logging  # slow to import

        loggers.append(transformers_logging)
    except ImportError:  # a pipeline without text can be loaded without transformers
        pass
    shown = [module for module in loggers if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


def _full_precision(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().float().requires_grad_(False)
    return pipe
