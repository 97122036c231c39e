"""A run against the published one."""

from __future__ import annotations

import dataclasses
import json

import pytest
from made_results import made_result, made_table

from reproduce import agreement, plan
from reproduce.agreement import compare_with_published
from reproduce.choices import Choices
from reproduce.plan import make_plan
from reproduce.reporting import printed, report
from reproduce.results import Result
from reproduce.table_results import TableResults

QUEST, BASE = "bedrooms-w4a4-quest", "bedrooms-w4a4-q-diffusion"
# Relative spreads 0.1 and 0.2 (sample standard deviation over mean): together 0.158.
PUBLISHED = {
    QUEST: [2.0 * (1 - 0.1 / 2**0.5), 2.0 * (1 + 0.1 / 2**0.5)],
    BASE: [8.0 * (1 - 0.2 / 2**0.5), 8.0 * (1 + 0.2 / 2**0.5)],
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**rows) -> results of a mini run of Table 3; two rows are published."""
    monkeypatch.setattr(plan, "PUBLISHED", tmp_path / "published")
    own = make_plan("table3", Choices(results=tmp_path / "own"), dry=True)
    for row, fids in PUBLISHED.items():
        made_table(own, {row: made_result({"fid": fids})})[row].write(
            tmp_path / "published" / "mini" / "table3" / f"{row}.json"
        )

    def make(rows: dict[str, Result], scale: str = "mini") -> TableResults:
        chosen = Choices(scale=scale, results=tmp_path / "own")
        return made_table(make_plan("table3", chosen, dry=True), rows)

    return make


@pytest.mark.parametrize(
    ("fid", "agrees"),
    [(2.0, True), (2.6, True), (2.65, False), (1.4, True), (1.35, False)],
)
def test_a_number_agrees_within_two_spreads(run, fid, agrees):
    """The row's spread is 0.2, that of the rows with its bits 0.158 of 2."""
    found = compare_with_published(run({QUEST: made_result({"fid": [fid, fid]})}))
    (difference,) = found.differences
    assert difference.spread == pytest.approx(2.0 * ((0.1**2 + 0.2**2) / 2) ** 0.5)
    assert difference.agrees == agrees
    assert str(found).startswith(f"{int(agrees)} of 1 numbers agree with the published run")
    assert ("These do not:" in str(found)) == (not agrees)
    assert (f"{QUEST}, fid: {fid:g}, published 2" in str(found)) == (not agrees)


def test_a_row_with_a_larger_spread_has_it(run):
    found = compare_with_published(run({BASE: made_result({"fid": [8.0, 8.0]})}))
    assert found.differences[0].spread == pytest.approx(0.2 * 8.0)


def test_seeds_that_both_have_are_compared(run):
    one = compare_with_published(run({QUEST: made_result({"fid": [1.9]})}))
    assert one.differences[0].published == pytest.approx(PUBLISHED[QUEST][0])
    none = compare_with_published(run({QUEST: made_result({"fid": [1.9]}, first_seed=7)}))
    assert none.differences[0].published == pytest.approx(2.0)


def test_rows_of_another_experiment_are_left_out_with_the_reason(run):
    made = made_result({"fid": [2.0, 2.0]})
    features = dataclasses.replace(made.conditions, features="inception")
    seeds = tuple(dataclasses.replace(seed, config_hash="1") for seed in made.seeds)
    rows = {
        QUEST: dataclasses.replace(made, conditions=features),
        BASE: dataclasses.replace(made, seeds=seeds),
        "bedrooms-fp": made,
    }
    found = compare_with_published(run(rows))
    assert not found.differences
    assert dict(found.left_out) == {
        QUEST: "other features than the published run's",
        BASE: "other settings of the method than the published run's",
        "bedrooms-fp": "not in the published run",
    }
    assert "- 1 row: other features than the published run's" in found.markdown()


def test_scales_without_a_published_run_are_not_compared(run):
    found = compare_with_published(run({QUEST: made_result({"fid": [2.0]})}, scale="smoke"))
    assert str(found) == "Not compared with a published run: none is published at smoke scale."
    assert "no row of this run has numbers" in str(compare_with_published(run({})))


def test_the_published_results_are_not_compared_with_themselves(run, tmp_path):
    published = report.committed("table3", tmp_path / "published")
    assert published[QUEST].done
    assert compare_with_published(published) is None
    report.finish(published.plan)
    assert not list((tmp_path / "published").rglob("agreement.*"))


def test_it_stands_on_the_terminal_in_json_and_beside_the_table(run):
    results = run({QUEST: made_result({"fid": [2.0, 2.0]}), BASE: made_result({"fid": [1.0, 1.0]})})
    found = compare_with_published(results)
    assert printed.terminal(results).split()[-len(str(found).split()) :] == str(found).split()
    assert json.loads(printed.as_json(results))["agreement"] == found.as_json()
    agreement.write_agreement(results.plan, found)
    folder = results.plan.folder
    assert (folder / "agreement.md").read_text() == found.markdown()
    kept = json.loads((folder / "agreement.json").read_text())
    assert [d["agrees"] for d in kept["differences"]] == [False, True]
    assert kept["text"].startswith("1 of 2 numbers agree")
