"""Seeds of an earlier run stay in a row when asked for, and only where they belong there."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from made_results import made_on

from questlib.errors import ConfigError
from reproduce import notebooks
from reproduce.pipeline import run_row
from reproduce.results import Model, Result, Status

ROW = "bedrooms-w8a8-minmax"


def edit(plan, row: str, **changes) -> Result:
    """The stored result with other values, which replaces it."""
    path = plan.row_file(row)
    result = replace(Result.read(path), **changes)
    result.write(path)
    return result


@pytest.mark.parametrize("row_id", [ROW, "bedrooms-fp"])
def test_a_seed_is_added_to_those_of_an_earlier_run(tiny_plan, row_id):
    whole = tiny_plan(seeds=[0, 1])
    expected = run_row(whole.table.row(row_id), whole)
    preview = (whole.folder / f"{row_id}.jpg").read_bytes()
    for seeds, added in (([0], [1]), ([1], [0])):
        first, second = tiny_plan(seeds=seeds), tiny_plan(seeds=added, keep_seeds=True)
        run_row(first.table.row(row_id), first)
        result = run_row(second.table.row(row_id), second)
        assert result == replace(expected, command=result.command)
        assert result.n_samples == 32
        assert result.command.endswith(f"--seeds {added[0]} --keep-seeds")
        # The picture is the first seed's, whichever came first.
        assert (second.folder / f"{row_id}.jpg").read_bytes() == preview


def test_the_order_in_which_seeds_are_asked_for_does_not_matter(tiny_plan):
    plan, turned = tiny_plan(seeds=[0, 1]), tiny_plan(seeds=[1, 0])
    result = run_row(plan.table.row(ROW), plan)
    preview = plan.folder / f"{ROW}.jpg"
    picture = preview.read_bytes()
    preview.unlink()
    again = run_row(turned.table.row(ROW), turned)
    assert preview.read_bytes() == picture
    assert replace(again, command=None) == replace(result, command=None)


def test_a_seed_that_is_asked_for_is_made_again_and_others_are_dropped_unless_kept(tiny_plan):
    both, one = tiny_plan(seeds=[0, 1]), tiny_plan(seeds=[1])
    row = both.table.row(ROW)
    stored = run_row(row, both)
    changed = tuple(replace(s, metrics=s.metrics | {"fid": 1000.0 + s.seed}) for s in stored.seeds)
    edit(both, ROW, seeds=changed)
    kept = run_row(row, tiny_plan(seeds=[1], keep_seeds=True))
    assert [s.seed for s in kept.seeds] == [0, 1]
    assert kept.seeds[0].metrics["fid"] == 1000.0 > kept.seeds[1].metrics["fid"]
    mean = sum(s.metrics["fid"] for s in kept.seeds) / 2
    assert kept.metric("fid").value == pytest.approx(mean)
    assert [s.seed for s in run_row(row, one).seeds] == [1]


def test_the_row_says_who_made_which(tiny_plan):
    first, second = tiny_plan(seeds=[0]), tiny_plan(seeds=[1], keep_seeds=True)
    row = first.table.row(ROW)
    result = run_row(row, first)
    (here,) = result.provenance
    elsewhere, third = made_on("another"), made_on("a third")
    seeds = (replace(result.seeds[0], processors=("a third", "another")),)
    edit(first, ROW, provenance=(elsewhere, third), seeds=seeds)
    result = run_row(row, second)
    assert result.provenance == (elsewhere, third, here)
    cpu = here["machine"]["cpu"]
    assert [s.processors for s in result.seeds] == [("a third", "another"), (cpu,)]


def conditions_with(**changes):
    """What changes a result's conditions."""

    def change(result: Result) -> Result:
        sampling = {f.name for f in dataclasses.fields(result.conditions.sampling)}
        new = {name: value for name, value in changes.items() if name not in sampling}
        if drawn := {name: value for name, value in changes.items() if name in sampling}:
            new["sampling"] = replace(result.conditions.sampling, **drawn)
        return replace(result, conditions=replace(result.conditions, **new))

    return change


def config_hash(result: Result) -> Result:
    return replace(result, seeds=(replace(result.seeds[0], config_hash="0"),))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (conditions_with(num_inference_steps=7), "num_inference_steps: expected 2, found 7"),
        (conditions_with(features="inception"), "features: expected mini, found inception"),
        (conditions_with(reference="other"), "reference: expected reference, found other"),
        (conditions_with(captions="other.json"), "captions: expected None, found other.json"),
        (conditions_with(clip="other"), "clip: expected None, found other"),
        (conditions_with(samples_per_seed=8), "samples_per_seed: expected 16, found 8"),
        (conditions_with(model=Model(id="model", sha256="0")), "model: expected"),
        (config_hash, "configuration of seed 0: expected"),
    ],
)
def test_what_does_not_belong_in_one_row_is_refused_before_the_work(tiny_plan, change, says):
    first = tiny_plan(seeds=[0], rows=[ROW])
    stored = change(run_row(first.table.row(ROW), first))
    stored.write(first.row_file(ROW))
    second = tiny_plan(seeds=[1], rows=[ROW], keep_seeds=True)
    with pytest.raises(ConfigError, match=f"{ROW}.json: {says}"):
        notebooks.preflight(second)
    assert run_row(second.table.row(ROW), second).status == Status.FAILED
    assert Result.read(first.row_file(ROW)) == stored  # the earlier result is kept
