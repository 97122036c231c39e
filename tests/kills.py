"""Processes that are killed again and again, at random moments of their work with files."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["questlib.calibration", "questlib.post_training", "reproduce.pipeline"]
)

# What Python tells of a process's work with files; a process is killed at one of these moments.
MOMENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "os.scandir")


def kill_at(folder: Path, moment: int) -> None:
    """Let this process be killed at its n-th moment of working with files of a folder."""
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event in MOMENTS and str(folder) in str(args):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def survive(
    run: Callable[..., None],
    arguments: Callable[[Path], tuple[Any, ...]],
    base: Path,
    kills: int,
    moments: int,
    check: Callable[[Path], None],
) -> Path:
    """Start a job until it was killed so often; check each folder in which it came to its end.

    Args:
        run: the job; takes the arguments and the moment at which it is killed.
        arguments: of a folder.
        base: where the folders are made.
        kills: how often.
        moments: before which of its moments each is killed.
        check: compares what came of it in a folder.

    Returns:
        The last folder, in which it has not.
    """
    rng = random.Random(kills)
    survived = finished = 0
    folder = base / "killed"
    while survived < kills:
        process = SERVER.Process(target=run, args=(*arguments(folder), rng.randrange(1, moments)))
        process.start()
        process.join(300)
        if process.exitcode == 0:  # it has come to its end: another one begins
            check(folder)
            finished += 1
            folder = base / f"killed-{finished}"
        else:
            assert process.exitcode == -signal.SIGKILL
            survived += 1
    return folder
