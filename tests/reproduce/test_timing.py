"""What a command takes, measured whole or summed over stages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from made_results import made_result, made_table

from reproduce import timing
from reproduce.pipeline import run_row
from reproduce.plan import Plan
from reproduce.results import Result, Status
from reproduce.table_results import TableResults

ROWS = ["bedrooms-fp", "bedrooms-w4a4-minmax", "bedrooms-w4a4-q-diffusion"]


def run_rows(plan: Plan, rows: Sequence[str] | None = None) -> TableResults:
    """These rows as run; the others of the table were not."""
    wanted = [row.id for row in plan.rows] if rows is None else rows
    return made_table(plan, {row: run_row(plan.table.row(row), plan) for row in wanted})


def stages_of(*tables: TableResults) -> Counter:
    """How often each stage is counted."""
    return Counter(key[0] for key in timing.stage_seconds(tables))


@pytest.fixture
def table_of_three(tiny_plan) -> TableResults:
    """Three rows of Table 3 as a table of their own, as run."""
    plan = tiny_plan(rows=ROWS)
    return run_rows(replace(plan, table=replace(plan.table, rows=plan.rows)))


def test_time_of_a_fresh_run_is_kept(table_of_three, monkeypatch):
    plan = table_of_three.plan
    path = plan.folder / "run.json"
    timing.record_time(table_of_three, 3.0, fresh=False)  # all was there: no time of a run
    failed = replace(table_of_three["bedrooms-fp"], status=Status.FAILED)
    part = TableResults(plan, {**table_of_three.results, "bedrooms-fp": failed})
    timing.record_time(part, 3.0, fresh=True)
    monkeypatch.setenv("QUEST_JOBS", "2")  # other tables beside this one
    timing.record_time(table_of_three, 3.0, fresh=True)
    assert not path.exists()
    monkeypatch.setenv("QUEST_JOBS", "1")
    timing.record_time(table_of_three, 100.0, fresh=True)
    timing.record_time(table_of_three, 3.0, fresh=False)
    stored = json.loads(path.read_text())
    assert (stored["seconds"], stored["command"]) == (100.0, "make reproduce-bedrooms SCALE=smoke")


def test_stages_of_rows_that_share_artifacts_are_summed_once(table_of_three):
    stages = timing.stage_seconds([table_of_three, table_of_three])
    assert stages_of(table_of_three, table_of_three) == {
        "sample": 3,
        "evaluate": 3,
        "calibrate": 1,
        "ranges": 2,
        "checkpoint": 2,
        "act scales": 1,
    }
    seeds = [seed for _, result in table_of_three.done for seed in result.seeds]
    calibrations = {
        seed.artifacts["calibrate"]: seed.seconds["calibrate"]
        for seed in seeds
        if seed.config_hash is not None
    }
    own = sum(sum(seed.seconds.values()) - seed.seconds["calibrate"] for seed in seeds)
    assert sum(stages.values()) == pytest.approx(own + sum(calibrations.values()))


@pytest.mark.parametrize(
    ("choices", "timed"), [({"seeds": [1]}, False), ({"features": "mini"}, False), ({}, True)]
)
def test_the_time_of_some_seeds_is_not_that_of_the_command(tiny_plan, monkeypatch, choices, timed):
    monkeypatch.delenv("QUEST_JOBS", raising=False)
    plan = tiny_plan(**choices)
    done = made_result({"fid": [1.0]})
    timing.record_time(made_table(plan, {r.id: done for r in plan.table.rows}), 5.0, fresh=True)
    assert (plan.folder / "run.json").exists() == timed


def test_adaround_that_rows_share_counts_once(tiny_plan):
    first, second, both = (
        "bedrooms-w4a8-quest-paper",
        "bedrooms-w4a4-quest-paper",
        "bedrooms-w4a4-q-diffusion",
    )
    results = run_rows(tiny_plan(), [first, second, both])
    seconds = {row: results[row].seeds[0].seconds["reconstruct"] for row in (first, second, both)}
    assert not results[first].seeds[0].reconstruct_cached
    assert results[second].seeds[0].reconstruct_cached
    assert results[both].seeds[0].reconstruct_cached
    assert seconds[both] > seconds[first] == seconds[second] > 0
    found = {key[0]: value for key, value in timing.stage_seconds([results]).items()}
    # AdaRound, and the scales after it.
    assert found["adaround"] + found["act scales"] == pytest.approx(seconds[both])
    assert found["adaround"] == seconds[first]


def slower(result: Result) -> Result:
    """The same row as another version of the code made it."""
    seed = result.seeds[0]
    seconds = {stage: value + 7.0 for stage, value in seed.seconds.items()}
    artifacts = {stage: f"other-{name}" for stage, name in seed.artifacts.items()}
    return replace(result, seeds=(replace(seed, seconds=seconds, artifacts=artifacts),))


def test_what_two_versions_of_the_code_measured_counts_once_the_longer(tiny_plan):
    plan = tiny_plan(rows=["bedrooms-w8a8-minmax"])
    mine = run_rows(plan)
    other = made_table(plan, {row.id: slower(result) for row, result in mine.done})
    assert timing.stage_seconds([mine, other]) == timing.stage_seconds([other])
    assert timing.stage_seconds([mine, other]) != timing.stage_seconds([mine])
    stages = ("sample", "evaluate", "calibrate", "ranges", "checkpoint", "adaround")
    assert stages_of(mine, other) == dict.fromkeys(stages, 1)


def test_ranges_that_rows_share_are_searched_and_counted_once(tiny_plan):
    """They differ in weight bits."""
    plan = tiny_plan(rows=["bedrooms-w4a8-q-diffusion", "bedrooms-w8a8-q-diffusion"])
    found = stages_of(run_rows(plan))
    assert (found["ranges"], found["checkpoint"]) == (1, 2)
    kept = [f for f in plan.work.glob("quantize/*/*.safetensors") if f.name.startswith("ranges-")]
    assert len(kept) == 1


def test_tables_of_cost_make_every_stage_themselves_and_come_to_the_same_images(tiny_plan):
    shared = run_rows(tiny_plan("table3"), ["bedrooms-w4a8-quest"])
    costs = run_rows(tiny_plan("table6"), ["w4a8-baseline", "w4a8-tla-cma"])
    again = run_rows(tiny_plan("table8"), ["w4a8-quest"])
    for _, result in costs.done:
        seed = result.seeds[0]
        assert not seed.ranges_cached and not seed.reconstruct_cached
        assert seed.seconds["reconstruct"] > 0
    whole = costs["w4a8-tla-cma"]
    assert whole.metric("fid") == shared["bedrooms-w4a8-quest"].metric("fid")
    # One method, bits and budget: one artifact of both tables.
    assert again["w4a8-quest"].seeds == whole.seeds
    stages = stages_of(shared, costs, again)
    assert (stages["checkpoint"], stages["adaround"], stages["calibrate"]) == (3, 3, 1)
