"""Seeds that several processes make: each once, with the numbers of one process."""

import subprocess
import sys
import threading
import time

import psutil
import pytest

from questlib.distributed import cpu_threads
from questlib.errors import ConfigError
from reproduce.choices import Choices
from reproduce.pipeline import run_row
from reproduce.plan import make_plan
from reproduce.workers import Tasks, make_seeds

ROWS = ["fp", "w8a8-te-ptq"]


def plan_of(tiny, folder, **choices):
    """Two rows of two seeds of a tiny model."""
    return make_plan(
        "table2",
        Choices(
            scale="smoke",
            rows=ROWS,
            seeds=[0, 1],
            model=str(tiny / "model"),
            reference=str(tiny / "reference"),
            results=folder / "results",
            work=folder / "work",
            **choices,
        ),
    )


def drawn(plan) -> dict:
    """What each seed of each row came to."""
    results = [run_row(row, plan) for row in plan.rows]
    return {(r.row, s.seed): (s.metrics, s.artifacts) for r in results for s in r.seeds}


def made_by(plan) -> set[str]:
    """What is complete in the work folder."""
    return {str(p.parent.relative_to(plan.work)) for p in plan.work.glob("*/*/done.json")}


def test_a_process_stays_with_its_seed_and_then_helps():
    tasks = Tasks(["a", "b", "c"], (0, 1, 2))
    assert [tasks.take(None), tasks.take(None)] == [("a", 0), ("a", 1)]
    assert [tasks.take(0) for _ in range(2)] == [("b", 0), ("c", 0)]
    assert tasks.take(0) == ("a", 2)  # which nobody has begun
    assert tasks.take(1) == ("b", 1)
    assert tasks.take(0) == ("c", 2)  # its own is done: the last of the fullest
    taken = [tasks.take(1) for _ in range(len(tasks))]
    assert sorted(taken) == [("b", 2), ("c", 1)] and not tasks


def test_two_processes_make_the_numbers_of_one(tiny, tmp_path):
    with cpu_threads(2):
        several = plan_of(tiny, tmp_path / "several", jobs=2)
        make_seeds(several)
        made = made_by(several)
        found = drawn(several)
    assert made_by(several) == made  # nothing was left to make
    assert len(found) == 4 and list((several.work / "workers").glob("*.log"))
    with cpu_threads(1):
        assert drawn(plan_of(tiny, tmp_path / "one")) == found


def test_a_process_that_is_killed_leaves_its_work_to_the_others(tiny, tmp_path, capfd):
    plan = plan_of(tiny, tmp_path, jobs=2)
    thread = threading.Thread(target=make_seeds, args=(plan,))
    before = set(psutil.Process().children(recursive=True))
    thread.start()

    def kill_one() -> bool:
        for child in set(psutil.Process().children(recursive=True)) - before:
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
                return True
        return False

    deadline = time.monotonic() + 60
    while not kill_one() and time.monotonic() < deadline:
        time.sleep(0.05)
    thread.join(timeout=300)
    assert not thread.is_alive()
    assert "its process ended (see" in capfd.readouterr().err
    assert len(drawn(plan)) == 4


def test_processes_end_with_the_one_that_started_them(tiny, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from test_workers import plan_of; from reproduce.workers import make_seeds;"
        "make_seeds(plan_of(Path(sys.argv[2]), Path(sys.argv[3]), jobs=2))"
    )
    folder = str(__file__).rpartition("/")[0]
    parent = subprocess.Popen([sys.executable, "-c", code, folder, str(tiny), str(tmp_path)])
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process(parent.pid).children(recursive=True)
        workers = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
    assert len(workers) == 2
    while not list(tmp_path.glob("work/workers/*.log")) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


@pytest.mark.parametrize("jobs", [0, True, "2"])
def test_a_number_of_processes_that_is_none(jobs):
    with pytest.raises(ConfigError, match="jobs: expected a whole number from 1 on"):
        Choices(jobs=jobs)
