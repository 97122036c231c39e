"""Saved states of finetuning, from which a stopped run continues bit for bit."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from questlib.errors import CheckpointError
from questlib.files import atomic_path
from questlib.integrity import digest_of_tree

# Version of the saved file, part of every state's key.
# 1 kept the optimizer's moments of each activation scale apart.
# 2 had the tensor names of checkpoint format 1.
# 3 had no digest, and did not tell which quantized UNet it was of.
STATE_FORMAT = 4

KEPT = "the state before is kept, and the same call goes on from it"
DIGEST = "digest"  # of the file's other entries

# What torch raises at a damaged file.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


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

    unet: str
    """Digest of the quantized UNet before it was finetuned."""

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
        """Write the state; a file that is there already is replaced atomically.

        Raises:
            StorageError: the place cannot be written; the state before is kept.
        """
        values = vars(self)
        with atomic_path(path, KEPT) as temporary, temporary.open("wb") as file:
            torch.save(values | {DIGEST: digest_of_tree(values)}, file)

    @classmethod
    def load(cls, path: str | Path, key: str, unet: str) -> FinetuningState | None:
        """Read the state in `path`; None when there is no such file.

        Args:
            key: of the run that would go on from it.
            unet: digest of the quantized UNet that it would go on with.

        Raises:
            CheckpointError: the file is damaged, or of another run or UNet.
        """
        path = Path(path)
        if not path.exists():
            return None
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            digest = values.pop(DIGEST, None)
            whole = digest is None or digest == digest_of_tree(values)
            found = values.get("key")
        except DAMAGED as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise CheckpointError(
                f"finetune: {path} cannot be read ({type(error).__name__}: {reason}); "
                "remove it to start again"
            ) from error
        if not whole:
            raise CheckpointError(
                f"finetune: {path} does not hold what was saved; remove it to start again"
            )
        if found != key or digest is None:
            raise CheckpointError(
                f"finetune: {path} belongs to another configuration, calibration, model or version "
                "of questlib; remove it or name another"
            )
        state = cls(**values)
        if state.unet != unet:
            raise CheckpointError(
                f"finetune: {path} belongs to another quantized UNet (weights {state.unet[:12]}, "
                f"found {unet[:12]}); remove it or name another"
            )
        return state
