"""Damaged files give an error of ours or what they gave before; `fuzzer.py` shows the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzzer import GOOD, fuzz  # noqa: E402
from subjects import make_subjects  # noqa: E402


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return make_subjects(tmp_path_factory.mktemp("subjects"))


@pytest.mark.parametrize("total", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_damage_goes_unnoticed(subjects, total):
    shares = sum(subject.share for subject in subjects)
    for subject in subjects:
        counts, faults = fuzz(subject, total * subject.share // shares, seed=total)
        assert not faults, "\n".join(map(str, faults[:20]))
        assert set(counts) <= set(GOOD) and counts["typed"] > counts["same"]
