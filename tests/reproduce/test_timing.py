"""What a command takes, measured whole or summed over stages."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from reproduce import timing
from reproduce.pipeline import run_cell

CELLS = ["bedrooms-fp", "bedrooms-w4a4-minmax", "bedrooms-w4a4-q-diffusion"]


def test_time_of_a_fresh_run_is_kept_and_stages_of_others_are_summed_once(tiny_plan, monkeypatch):
    plan = tiny_plan(cells=CELLS)
    plan = dataclasses.replace(
        plan, table=dataclasses.replace(plan.table, cells=plan.cells)
    )  # a table of three rows
    results = [run_cell(cell, plan) for cell in plan.cells]
    path = plan.folder / "run.json"
    timing.record_time(plan, results, 3.0, fresh=False)  # all came from the cache: no time of a run
    timing.record_time(plan, [*results[1:], results[0] | {"status": "failed"}], 3.0, fresh=True)
    monkeypatch.setenv("QUEST_JOBS", "2")  # other tables beside this one
    timing.record_time(plan, results, 3.0, fresh=True)
    assert not path.exists()
    monkeypatch.setenv("QUEST_JOBS", "1")
    timing.record_time(plan, results, 100.0, fresh=True)
    timing.record_time(plan, results, 3.0, fresh=False)
    stored = json.loads(path.read_text())
    assert (stored["seconds"], stored["command"]) == (100.0, "make reproduce-bedrooms SCALE=smoke")
    stages = timing.stage_seconds(results + results)  # rows that share all their products
    counts = {
        "sample": 3,
        "evaluate": 3,
        "calibrate": 1,
        "ranges": 2,
        "checkpoint": 2,
        "act scales": 1,
    }
    assert Counter(key[0] for key in stages) == counts
    calibrations = {
        s["products"]["calibrate"]: s["seconds"]["calibrate"]
        for r in results[1:]
        for s in r["per_seed"]
    }
    own = sum(
        sum(s["seconds"].values()) - s["seconds"]["calibrate"]
        for r in results
        for s in r["per_seed"]
    )
    assert sum(stages.values()) == pytest.approx(own + sum(calibrations.values()))


def test_the_time_of_some_seeds_is_not_that_of_the_command(tiny_plan, monkeypatch):
    monkeypatch.delenv("QUEST_JOBS", raising=False)
    for choices, timed in (({"seeds": [1]}, False), ({"features": "mini"}, False), ({}, True)):
        plan = tiny_plan(**choices)
        timing.record_time(plan, [{"status": "done"}], 5.0, fresh=True)
        assert (plan.folder / "run.json").exists() == timed


def test_adaround_that_rows_share_counts_once(tiny_plan):
    plan = tiny_plan(
        cells=[
            "bedrooms-w4a8-quest-paper",
            "bedrooms-w4a4-quest-paper",
            "bedrooms-w4a4-q-diffusion",
        ]
    )
    results = [run_cell(cell, plan) for cell in plan.cells]
    first, second, both = (
        r["per_seed"][0] for r in sorted(results, key=lambda r: r["preset"], reverse=True)
    )
    assert (
        second["reconstruct_cached"]
        and first["seconds"]["reconstruct"] == second["seconds"]["reconstruct"] > 0
    )
    assert (
        both["reconstruct_cached"]
        and both["seconds"]["reconstruct"] > first["seconds"]["reconstruct"]
    )
    stages = timing.stage_seconds(results)
    found = {
        key[0]: seconds for key, seconds in stages.items() if key[0] in ("adaround", "act scales")
    }
    assert sum(found.values()) == pytest.approx(
        both["seconds"]["reconstruct"]
    )  # AdaRound, and the scales after it
    assert found["adaround"] == first["seconds"]["reconstruct"]


def test_what_two_versions_of_the_code_measured_counts_once_the_longer(tiny_plan):
    plan = tiny_plan(cells=["bedrooms-w8a8-minmax"])
    result = run_cell(plan.cells[0], plan)
    seed = result["per_seed"][0]
    slower = {stage: seconds + 7.0 for stage, seconds in seed["seconds"].items()}
    other = seed | {
        "seconds": slower,
        "products": {stage: f"other-{name}" for stage, name in seed["products"].items()},
    }
    stages = timing.stage_seconds([result, result | {"per_seed": [other]}])
    assert stages == timing.stage_seconds([result | {"per_seed": [other]}])
    stages_of_a_run = ("sample", "evaluate", "calibrate", "ranges", "checkpoint", "adaround")
    assert Counter(key[0] for key in stages) == dict.fromkeys(stages_of_a_run, 1)


def test_ranges_that_rows_share_are_searched_and_counted_once(tiny_plan):
    plan = tiny_plan(
        cells=["bedrooms-w4a8-q-diffusion", "bedrooms-w8a8-q-diffusion"]
    )  # they differ in weight bits
    first, second = (run_cell(cell, plan) for cell in plan.cells)
    assert (
        Counter(key[0] for key in timing.stage_seconds([first, second])).items()
        >= {"ranges": 1, "checkpoint": 2}.items()
    )
    kept = [f for f in plan.work.glob("quantize/*/*.safetensors") if f.name.startswith("ranges-")]
    assert len(kept) == 1


def test_tables_of_cost_make_every_stage_themselves_and_come_to_the_same_images(tiny_plan):
    plan, costs, cost = (tiny_plan(table) for table in ("table3", "table6", "table8"))
    shared = run_cell(plan.table.cell("bedrooms-w4a8-quest"), plan)
    rows = [run_cell(costs.table.cell(cell), costs) for cell in ("w4a8-baseline", "w4a8-tla-cma")]
    again = run_cell(cost.table.cell("w4a8-quest"), cost)
    for row in rows:
        seed = row["per_seed"][0]
        assert (
            not seed["ranges_cached"]
            and not seed["reconstruct_cached"]
            and seed["seconds"]["reconstruct"] > 0
        )
    assert rows[1]["metrics"]["fid"]["value"] == shared["metrics"]["fid"]["value"]
    assert (
        again["per_seed"] == rows[1]["per_seed"]
    )  # one method, bits and budget: one product of both tables
    stages = Counter(key[0] for key in timing.stage_seconds([shared, *rows, again]))
    assert (stages["checkpoint"], stages["adaround"], stages["calibrate"]) == (3, 3, 1)
