"""Claims refer to rows that exist, and are judged by the results alone."""

from __future__ import annotations

import copy

import pytest

from reproduce.plan import make_plan
from reproduce.reporting.claims import CLAIMS, judge
from reproduce.reporting.report import PAIRED, load_results
from reproduce.tables.registry import all_tables, get_table
from reproduce.verdicts import HIGHER_IS_BETTER, paper_order


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.table}: {c.text}")
def test_rows_exist(claim):
    table = get_table(claim.table)
    for pair in claim.pairs:
        for cell in pair:
            assert table.cell(cell)
    assert claim.where.startswith(("Table", "Fig."))


@pytest.mark.parametrize(
    "claim", [c for c in CLAIMS if " beats " in c.text and " at " in c.text], ids=lambda c: c.text
)
def test_the_paper_does_claim_it(claim):
    """By its own numbers, in every metric and at every bit-width named."""
    table = get_table(claim.table)
    for mine, base in claim.pairs:
        for metric in set(claim.metrics) - {PAIRED}:
            papers = [table.cell(c).paper[metric] for c in (mine, base)]
            assert paper_order(*papers, higher_is_better=metric in HIGHER_IS_BETTER) == "better"


def test_costs_are_compared_as_they_are(tmp_path):
    claim = next(c for c in CLAIMS if "memory_mb" in c.metrics)
    results = load_results(make_plan(claim.table, scale="mini", results=tmp_path, work=tmp_path))
    for r in results:
        quest = r["preset"] == "quest"
        r |= {
            "status": "done",
            "peak_bytes": 5e6,
            "seconds": {"calibrate": 1.0, "finetune": 2.0 if quest else 3.0, "sample": 9.0},
        }
    word, words = judge(claim, {claim.table: results})
    assert word == "holds in part"
    assert words.startswith(
        "W4A8 seconds to quantize 3 against 4: less; W4A8 memory, MB 5 against 5: not less; W4A4"
    )


def results_of(claim, tmp_path, values):
    """Results of the claim's table where its rows have values[cell] = {metric: [by seed]}."""
    results = load_results(make_plan(claim.table, scale="mini", results=tmp_path, work=tmp_path))
    for r in results:
        for seed, _ in enumerate(next(iter(values.get(r["cell"], {"": []}).values()))):
            r["per_seed"].append(
                {"seed": seed, "metrics": {m: v[seed] for m, v in values[r["cell"]].items()}}
            )
        for metric, v in values.get(r["cell"], {}).items():
            r["status"] = "done"
            r["metrics"][metric]["value"] = sum(v) / len(v)
    return {claim.table: results}


@pytest.mark.parametrize(
    ("fid", "distance", "word"),
    [
        ([1.0, 1.1], [1.0, 1.1], "holds"),
        ([1.0, 1.1], [3.0, 3.1], "holds in part"),
        ([3.0, 1.0], [3.0, 3.1], "does not hold"),
    ],
)
def test_verdicts(tmp_path, fid, distance, word):
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    values = {mine: {"fid": fid, PAIRED: distance}, base: {"fid": [2.0, 2.1], PAIRED: [2.0, 2.1]}}
    results = results_of(claim, tmp_path, values)
    before = copy.deepcopy(results)
    found, words = judge(claim, results)
    assert found == word and results == before
    assert f"FID {sum(fid) / 2:.2f} against 2.05" in words


def test_seeds_that_one_row_lacks_are_left_out(tmp_path):
    """EfficientDM's rows have one seed often: it is compared with the same seed of ours, and the claim says so."""
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    values = {mine: {"fid": [1.0, 9.0], PAIRED: [1.0, 9.0]}, base: {"fid": [2.0], PAIRED: [2.0]}}
    found, words = judge(claim, results_of(claim, tmp_path, values))
    assert found == "holds, one seed" and "FID 1.00 against 2.00: better" in words


def test_without_results_nothing_is_said(tmp_path):
    results = {
        t: load_results(make_plan(t, scale="mini", results=tmp_path, work=tmp_path))
        for t in all_tables()
    }
    assert {judge(claim, results)[0] for claim in CLAIMS} == {"not run"}
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    half = results_of(
        claim, tmp_path, {mine: {"fid": [1.0]}, base: {"fid": [2.0]}}
    )  # a metric is missing
    assert judge(claim, half) == ("not run", "distance to FP not measured")
