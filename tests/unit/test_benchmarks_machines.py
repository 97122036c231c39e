"""benchmarks/machines.py: pairs by row and seed, and what is left out."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import machines

from questlib.errors import QuestError


def row(cell, fids, preset="quest", status="done", cpu="A"):
    seeds = [
        {"seed": s, "metrics": {"fid": f, "feature_distance_to_fp": 2 * f}}
        for s, f in enumerate(fids)
    ]
    about = {"commit": "c", "dirty": False, "versions": {}, "machine": {"cpu": cpu}}
    return {
        "cell": cell,
        "preset": preset,
        "status": status,
        "per_seed": seeds,
        "provenance": about if status == "done" else None,
    }


def test_spread_between_machines_and_between_seeds():
    here = [
        row("fp", [1.0, 9.0], preset=None),
        row("a", [1.0, 2.0]),
        row("b", [5.0, 5.0]),
        row("c", [3.0, 4.0]),
    ]
    there = [
        row("fp", [7.0, 8.0], preset=None),
        row("a", [4.0, 6.0, 50.0], cpu="B"),
        row("b", [], status="not run"),
        here[3],
    ]
    found = machines.compare(here, copy.deepcopy(there))
    assert [(r["cell"], r["seed"], r["fid"]) for r in found["rows"]] == [
        ("a", 0, [1.0, 4.0]),
        ("a", 1, [2.0, 6.0]),
    ]
    assert found["between_machines"] == pytest.approx(
        {"fid": 12.5**0.5, "feature_distance_to_fp": 2 * 12.5**0.5}
    )
    assert found["between_seeds"] == pytest.approx(
        {"fid": 2.5**0.5, "feature_distance_to_fp": 2 * 2.5**0.5}
    )
    assert [r["machine"]["cpu"] for r in found["runs"]] == ["A", "B"]


def test_the_same_run_twice_is_no_second_machine():
    here = [row("a", [1.0, 2.0])]
    with pytest.raises(QuestError, match="found none"):
        machines.compare(here, copy.deepcopy(here))
    with pytest.raises(
        QuestError, match="found none"
    ):  # one seed has no spread of its own to compare with
        machines.compare([row("a", [1.0])], [row("a", [2.0])])
