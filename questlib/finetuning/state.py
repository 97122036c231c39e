"""Saved states of finetuning, from which a stopped run continues bit for bit."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from questlib.errors import CheckpointError
from questlib.files import atomic_path

# Version of the saved file, part of every state's key.
# 1 kept the optimizer's moments of each activation scale apart.
# 2 had the tensor names of checkpoint format 1.
STATE_FORMAT = 3


class FinetuningLog(TypedDict):
    """What `finetune` reports."""

    seconds: float
    """Time spent in the iterations, of all sessions."""

    loss: list[tuple[str, int, float, float]]
    """For each iteration: stage, number of the iteration, local loss, global loss."""

    trained_weights: int
    """Number of trainable parameters, activation scales not counted."""

    trained_fraction: float
    """`trained_weights` as a fraction of all weights of quantized layers."""


@dataclass
class FinetuningState:
    """Everything that the next iteration depends on."""

    key: str
    """Digest of the configuration, the calibration, the teacher and the versions; see `load`."""

    stage: int
    """Number of the stage that runs next."""

    iteration: int
    """The next iteration of this stage. 0: the stage has not started; the model is then as the
    stage before left it, and there is no state of an optimizer to restore."""

    log: FinetuningLog
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    generator: torch.Tensor | None
    """State of the generator that draws the batches."""

    @property
    def between_stages(self) -> bool:
        return self.iteration == 0

    def save(self, path: str | Path) -> None:
        """Write the state; a file that is there already is replaced atomically."""
        with atomic_path(path) as temporary:
            torch.save(vars(self), temporary)

    @classmethod
    def load(cls, path: str | Path, key: str) -> FinetuningState | None:
        """Read the state in `path`; None when there is no such file.

        Raises:
            CheckpointError: the file is damaged, or its key differs from `key`.
        """
        path = Path(path)
        if not path.exists():
            return None
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            found = values.get("key")
        except (
            OSError,
            RuntimeError,
            EOFError,
            LookupError,
            AttributeError,
            pickle.UnpicklingError,
        ) as error:
            raise CheckpointError(
                f"finetune: {path} cannot be read ({error!r}); remove it to start again"
            ) from error
        if found != key:
            raise CheckpointError(
                f"finetune: {path} belongs to another configuration, calibration, model or version "
                "of questlib; remove it or name another"
            )
        return cls(**values)
