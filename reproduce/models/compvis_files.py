"""The files of the originals: a checkpoint's tensors, read without executing code, and its YAML."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

from questlib.errors import CheckpointError, ConfigError
from reproduce.models.download import check_sha256

CONFIGS = Path(__file__).parent / "configs"  # package data: the YAML of the paper's four models

# Classes that Lightning checkpoints name beside the weights. Empty stand-ins replace them; they are
# never imported.
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf.")


class StandIn:
    """In place of a class of the training framework: takes any arguments, does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def config_names() -> list[str]:
    """Models whose YAML ships with the package."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def load_config(name_or_path: str | Path) -> dict[str, Any]:
    """`model.params` of a CompVis YAML file, or of an embedded one by its name.

    Raises:
        ConfigError: the file cannot be read, or has no such entries.
    """
    path = Path(name_or_path)
    if str(name_or_path) in config_names():
        path = CONFIGS / f"{name_or_path}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = dict(content["model"]["params"])
        missing = {"unet_config", "first_stage_config", "linear_start", "linear_end"} - set(params)
    except OSError as error:
        raise ConfigError(
            f"config {name_or_path}: expected a YAML file or one of {', '.join(config_names())} "
            f"({error.strerror})"
        ) from error
    except (
        yaml.YAMLError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"config {path}: not a CompVis YAML with model.params ({type(error).__name__}: {error})"
        ) from error
    if missing:
        raise ConfigError(f"config {path}: model.params has no {', '.join(sorted(missing))}")
    return params


def read_state_dict(path: str | Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, mapped from the file where its format allows.

    No code in it is ever executed.

    Raises:
        ConfigError: no such file.
        CheckpointError: another sha256, a damaged file, or a pickle that is more than tensors and
            Lightning's bookkeeping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint {path}: no such file")
    check_sha256(path, sha256)
    content: Any = None
    code: list[str] = []
    try:
        mapped = zipfile.is_zipfile(path)  # false for files of torch before 1.6
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        code = sorted(n for n in names if not n.startswith(BOOKKEEPING))
        if not code:
            stand_ins = [(type("StandIn", (StandIn,), {}), n) for n in names]
            with torch.serialization.safe_globals(stand_ins):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        # torch wraps what it found in the advice to load without weights_only.
        found: BaseException = error
        if isinstance(error, pickle.UnpicklingError) and error.__context__:
            found = error.__context__
        reason = (str(found).strip() or type(found).__name__).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path}: truncated, damaged or not tensors alone ({reason})"
        ) from error
    if code:
        raise CheckpointError(
            f"checkpoint {path}: its pickle names code, which was not executed: {', '.join(code)}"
        )
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise CheckpointError(
            f"checkpoint {path}: expected a state_dict of tensors, found {type(content).__name__}"
        )
    return state
