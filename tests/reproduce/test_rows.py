"""Seeds of an earlier run stay in a row when asked for, and only where they belong there."""

from __future__ import annotations

import json

import pytest

from questlib.errors import ConfigError
from reproduce import notebooks
from reproduce.pipeline import run_cell
from reproduce.store import write_json

CELL = "bedrooms-w8a8-minmax"


def edit(plan, cell: str, **changes) -> dict:
    path = plan.folder / f"{cell}.json"
    result = json.loads(path.read_text()) | changes
    write_json(path, result)
    return result


@pytest.mark.parametrize("cell", [CELL, "bedrooms-fp"])
def test_a_seed_is_added_to_those_of_an_earlier_run(tiny_plan, tmp_path, cell):
    whole = tiny_plan(seeds=[0, 1])
    expected = run_cell(whole.table.cell(cell), whole)
    preview = (whole.folder / f"{cell}.png").read_bytes()
    for seeds, added in (([0], [1]), ([1], [0])):
        first, second = tiny_plan(seeds=seeds), tiny_plan(seeds=added, keep_seeds=True)
        run_cell(first.table.cell(cell), first)
        result = run_cell(second.table.cell(cell), second)
        assert (
            result == expected | {"provenance": result["provenance"]} and result["n_samples"] == 32
        )
        assert result["provenance"]["command"].endswith(f"--seeds {added[0]} --keep-seeds")
        # the picture is the first seed's, whichever came first
        assert (second.folder / f"{cell}.png").read_bytes() == preview


def test_the_order_in_which_seeds_are_asked_for_does_not_matter(tiny_plan):
    plan, turned = tiny_plan(seeds=[0, 1]), tiny_plan(seeds=[1, 0])
    result = run_cell(plan.table.cell(CELL), plan)
    preview = plan.folder / f"{CELL}.png"
    picture = preview.read_bytes()
    preview.unlink()
    again = run_cell(turned.table.cell(CELL), turned)
    assert preview.read_bytes() == picture
    assert again | {"provenance": None} == result | {"provenance": None}


def test_a_seed_that_is_asked_for_is_made_again_and_others_are_dropped_unless_kept(tiny_plan):
    both, one = tiny_plan(seeds=[0, 1]), tiny_plan(seeds=[1])
    cell = both.table.cell(CELL)
    run_cell(cell, both)
    stored = edit(both, CELL)
    for seed in stored["per_seed"]:
        seed["metrics"]["fid"] = 1000.0 + seed["seed"]
    edit(both, CELL, per_seed=stored["per_seed"])
    kept = run_cell(cell, tiny_plan(seeds=[1], keep_seeds=True))
    assert kept["seeds"] == [0, 1] and kept["per_seed"][0]["metrics"]["fid"] == 1000.0
    assert kept["per_seed"][1]["metrics"]["fid"] < 1000.0
    assert kept["metrics"]["fid"]["value"] == pytest.approx(
        sum(s["metrics"]["fid"] for s in kept["per_seed"]) / 2
    )
    assert run_cell(cell, one)["seeds"] == [1]


def test_the_row_says_who_made_which(tiny_plan):
    first, second = tiny_plan(seeds=[0]), tiny_plan(seeds=[1], keep_seeds=True)
    cell = first.table.cell(CELL)
    made = run_cell(cell, first)["provenance"]
    elsewhere = made | {"commit": "f" * 40, "machine": made["machine"] | {"cpu": "another"}}
    third = {name: made[name] for name in ("versions", "machine", "dirty")} | {"commit": "e" * 40}
    seeds = json.loads((first.folder / f"{CELL}.json").read_text())["per_seed"]
    assert seeds[0].pop("processors") == [
        made["machine"]["cpu"]
    ]  # an older result does not say it seed by seed
    edit(first, CELL, provenance=elsewhere | {"others": [third]}, per_seed=seeds)
    result = run_cell(cell, second)
    provenance = result["provenance"]
    both = sorted(["another", made["machine"]["cpu"]])
    assert [s["processors"] for s in result["per_seed"]] == [both, [made["machine"]["cpu"]]]
    assert provenance["commit"] == "f" * 40 and provenance["machine"]["cpu"] == "another"
    assert [p["commit"] for p in provenance["others"]] == ["e" * 40, made["commit"]]
    assert all("command" not in p and "others" not in p for p in provenance["others"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_inference_steps": 7}, "num_inference_steps: expected 2, found 7"),
        ({"features": "inception"}, "features: expected mini, found inception"),
        ({"reference": "other"}, "reference: expected reference, found other"),
        ({"captions": "other.json"}, "captions: expected None, found other.json"),
        ({"clip": "other"}, "clip: expected None, found other"),
        ({"n_samples": 8}, "n_samples: expected 16, found 8"),
        ({"model": {"id": "model", "sha256": "0"}}, "model: expected"),
        ("config_hash", "configuration of seed 0: expected"),
    ],
)
def test_what_does_not_belong_in_one_row_is_refused_before_the_work(tiny_plan, changes, says):
    first = tiny_plan(seeds=[0], cells=[CELL])
    result = run_cell(first.table.cell(CELL), first)
    if changes == "config_hash":
        changes = {"per_seed": [result["per_seed"][0] | {"config_hash": "0"}]}
    stored = edit(first, CELL, **changes)
    second = tiny_plan(seeds=[1], cells=[CELL], keep_seeds=True)
    with pytest.raises(ConfigError, match=f"{CELL}.json: {says}"):
        notebooks.preflight(second)
    assert run_cell(second.table.cell(CELL), second)["status"] == "failed"
    assert edit(first, CELL) == stored  # the earlier result is kept
