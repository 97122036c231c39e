"""benchmarks/machines.py: pairs by row and seed, and what is left out."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "reproduce")]
import machines  # noqa: E402
from made_results import made_on, made_result, made_table  # noqa: E402

from questlib.errors import QuestError  # noqa: E402
from reproduce.choices import Choices  # noqa: E402
from reproduce.plan import make_plan  # noqa: E402


@pytest.fixture
def plan(tmp_path):
    return make_plan("table2", Choices(scale="mini", results=tmp_path, work=tmp_path), dry=True)


@pytest.fixture
def ids(plan):
    """The row in full precision, and three others."""
    full = next(row.id for row in plan.table.rows if row.full_precision)
    return full, *[row.id for row in plan.table.rows if not row.full_precision][:3]


def result(fids, cpu="A"):
    distances = [2 * fid for fid in fids]
    metrics = {"fid": fids, "feature_distance_to_fp": distances}
    return made_result(metrics, provenance=(made_on(cpu),))


def test_spread_between_machines_and_between_seeds(plan, ids):
    """Left out are full precision, a row not run there, and one that is the same result."""
    full, a, b, c = ids
    same = result([3.0, 4.0])
    here = {
        full: result([1.0, 9.0]),
        a: result([1.0, 2.0]),
        b: result([5.0, 5.0]),
        c: same,
    }
    there = {full: result([7.0, 8.0]), a: result([4.0, 6.0, 50.0], cpu="B"), c: same}
    found = machines.compare(made_table(plan, here), made_table(plan, there))
    assert [(r["row"], r["seed"], r["fid"]) for r in found["rows"]] == [
        (a, 0, [1.0, 4.0]),
        (a, 1, [2.0, 6.0]),
    ]
    spread = {"between_machines": 12.5**0.5, "between_seeds": 2.5**0.5}
    for name, fid in spread.items():
        assert found[name] == pytest.approx({"fid": fid, "feature_distance_to_fp": 2 * fid})
    assert [run["machine"]["cpu"] for run in found["runs"]] == ["A", "B"]


def test_the_same_run_twice_is_no_second_machine(plan, ids):
    here = made_table(plan, {ids[1]: result([1.0, 2.0])})
    with pytest.raises(QuestError, match="found none"):
        machines.compare(here, here)


def test_one_seed_has_no_spread_of_its_own(plan, ids):
    first, second = (made_table(plan, {ids[1]: result([fid])}) for fid in (1.0, 2.0))
    with pytest.raises(QuestError, match="found none"):
        machines.compare(first, second)
