"""A row that is stopped again and again comes to its end, with the same numbers.

Its process is killed, or its disk is full.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_bedrooms import tiny_bedrooms

from questlib.errors import StorageError
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


def crowded(tiny: Path, folder: Path, limit: int, said) -> None:
    """`row_of` where no file can be longer than `limit` bytes; puts what it says into a queue."""
    sys.stderr = io.StringIO()  # which may be such a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        done = row_of(tiny, folder).done
    except StorageError as error:
        done = False
        print(error, file=sys.stderr)
    said.put((done, sys.stderr.getvalue()))


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


def test_a_row_on_a_full_disk_says_so_and_goes_on_when_there_is_space(tiny, tmp_path):
    expected = numbers(tiny, tmp_path / "whole")
    folder = tmp_path / "crowded"
    said = SERVER.Queue()
    for limit in (0, 100, 1_000, 5_000, 20_000, 60_000):
        process = SERVER.Process(target=crowded, args=(tiny, folder, limit, said))
        process.start()
        done, text = said.get(timeout=300)
        process.join()
        assert not done, limit
        assert f"cannot write {folder}" in text
        assert "File too large" in text
        assert not [p for p in folder.rglob("*.tmp*")]
    assert numbers(tiny, folder) == expected
