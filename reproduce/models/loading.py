"""Full-precision pipelines: the embedded mini models by name, local diffusers folders, hub ids."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from questlib.diffusion import loading
from questlib.errors import ConfigError, did_you_mean
from reproduce.models.embedded import MINI, embedded_models
from reproduce.models.pipelines import PIPELINES


def load_pipeline(name_or_path: str | Path) -> DiffusionPipeline:
    """A diffusers pipeline in float32 and eval mode.

    "mini-ldm4" (or another embedded name) is the model that ships with the package; for folders
    and hub ids see `questlib.diffusion.loading.read_pipeline`.

    Raises:
        ConfigError: anything else, among it a .ckpt file, which has to be converted first.
        CheckpointError: a folder that cannot be read.
    """
    name = str(name_or_path)
    if name in embedded_models():
        return loading.read_pipeline(MINI / name, PIPELINES)
    if Path(name).is_file():
        raise ConfigError(
            f"{name} is a file; make a diffusers folder of a CompVis checkpoint first: "
            f"python -m reproduce.models convert {name} --config CONFIG.yaml --out DIR"
        )
    known = ", ".join(embedded_models()) or "none: this installation has no embedded models"
    try:
        return loading.read_pipeline(name, PIPELINES)
    except ConfigError as error:
        near = did_you_mean(name, embedded_models())
        raise ConfigError(f"{error}; embedded: {known}{near}") from error
