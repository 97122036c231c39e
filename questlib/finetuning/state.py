"""Saved states of finetuning, from which a stopped run goes on bit for bit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from questlib.distributed import processes
from questlib.errors import CheckpointError

STATE_FORMAT = 2  # of saved states; 1 held the optimizer's moments of each activation scale apart


def _save_state(path, key, unet, stage, iteration, log, opt, schedule, generator) -> None:
    if not processes().is_main_process:
        return
    tmp = Path(path).with_suffix(f".tmp{os.getpid()}")
    state = dict(
        key=key,
        stage=stage,
        iteration=iteration,
        log=log,
        model=unet.state_dict(),
        opt=opt.state_dict(),
        schedule=schedule.state_dict(),
        rng=generator.get_state(),
    )
    torch.save(state, tmp)
    os.replace(tmp, path)


def _load_state(path, key: str) -> dict | None:
    if path is None or not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state.get("key")
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
            f"finetune: {path} belongs to another configuration, calibration or version of questlib; remove it or name another"
        )
    return state
