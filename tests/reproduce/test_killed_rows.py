"""A row whose process is killed again and again comes to its end, with the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_bedrooms import tiny_bedrooms

from reproduce import datasets
from reproduce.choices import Choices
from reproduce.evaluation import features
from reproduce.pipeline import run_row
from reproduce.plan import make_plan
from reproduce.results import Result

ROW = "bedrooms-w4a4-quest"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["reproduce.pipeline"])

# What Python tells of a process's work with files; a process is killed at one of these moments.
MOMENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.chmod", "os.scandir")


def row_of(tiny: Path, folder: Path) -> Result:
    """Make the row."""
    torch.set_num_threads(1)
    features.MINI_FEATURES = tiny / "classifier"
    datasets.DATASETS["bedrooms"] = tiny_bedrooms(tiny)
    places = {"results": folder / "results", "work": folder / "work"}
    plan = make_plan("table3", Choices(scale="smoke", rows=[ROW], **places))
    (row,) = plan.rows
    return run_row(row, plan)


def killed(tiny: Path, folder: Path, moment: int) -> None:
    """`row_of`, but the process is killed at its n-th moment of working with files."""
    seen = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal seen
        if event in MOMENTS and str(folder) in str(args):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    row_of(tiny, folder)


def whole(tiny: Path, folder: Path, answers) -> None:
    """Put what the row came to into a queue."""
    found = row_of(tiny, folder)
    answers.put([(seed.seed, seed.metrics, seed.artifacts) for seed in found.seeds])


def numbers(tiny: Path, folder: Path) -> list:
    """What the row comes to in a process of its own."""
    answers = SERVER.Queue()
    process = SERVER.Process(target=whole, args=(tiny, folder, answers))
    process.start()
    found = answers.get(timeout=300)
    process.join()
    return found


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_row_that_is_killed_again_and_again_has_the_same_numbers(tiny, tmp_path, kills):
    expected = numbers(tiny, tmp_path / "whole")
    assert expected
    rng = random.Random(kills)
    survived = 0
    folder = tmp_path / "killed"
    while survived < kills:
        process = SERVER.Process(target=killed, args=(tiny, folder, rng.randrange(1, 120)))
        process.start()
        process.join(300)
        if process.exitcode == 0:  # the row has come to its end: another one begins
            assert numbers(tiny, folder) == expected
            folder = tmp_path / f"killed-{survived}"
        else:
            assert process.exitcode == -signal.SIGKILL
            survived += 1
    assert numbers(tiny, folder) == expected
    left = [p for p in folder.rglob("*.tmp*")]
    assert not left, left
