"""Claims refer to rows that exist, and are judged by the results alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_results import STAGES, made_result, made_table, seed_result

from reproduce.choices import Choices
from reproduce.plan import make_plan
from reproduce.reporting.claims import CLAIMS, Claim, Holds, by_chance, judge
from reproduce.table_results import TableResults
from reproduce.tables.registry import all_tables, get_table
from reproduce.verdicts import HIGHER_IS_BETTER, PAIRED, Order, p_in_words, paper_order


def results_of(claim: Claim, metrics: dict[str, dict[str, list[float]]]) -> dict[str, TableResults]:
    """Results of the claim's table, where its rows have metrics[row id] = {metric: [by seed]}."""
    plan = make_plan(claim.table, Choices(scale="mini"), dry=True)
    made = {row_id: made_result(found) for row_id, found in metrics.items()}
    return {claim.table: made_table(plan, made)}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: f"{c.table}: {c.text}")
def test_rows_exist(claim):
    table = get_table(claim.table)
    for pair in claim.pairs:
        for row_id in pair:
            assert table.row(row_id)
    assert claim.where.startswith(("Table", "Fig."))


@pytest.mark.parametrize(
    "claim", [c for c in CLAIMS if " beats " in c.text and " at " in c.text], ids=lambda c: c.text
)
def test_the_paper_does_claim_it(claim):
    """By its own numbers, in every metric and at every bit-width named."""
    table = get_table(claim.table)
    for mine, base in claim.pairs:
        for metric in set(claim.metrics) - {PAIRED}:
            papers = [table.row(row_id).paper[metric] for row_id in (mine, base)]
            assert paper_order(*papers, higher_is_better=metric in HIGHER_IS_BETTER) == "better"


def test_costs_are_compared_as_they_are():
    claim = next(c for c in CLAIMS if "memory_mb" in c.metrics)
    plan = make_plan(claim.table, Choices(scale="mini"), dry=True)
    made: dict[str, Any] = {}
    for row in plan.table.rows:
        seconds = dict.fromkeys(STAGES, 0.0) | {"calibrate": 1.0, "sample": 9.0}
        seconds["finetune"] = 2.0 if row.preset == "quest" else 3.0
        seed = seed_result(seconds=seconds, peak_bytes=5_000_000)
        made[row.id] = replace(made_result({"fid": [1.0]}), seeds=(seed,))
    found = judge(claim, {claim.table: made_table(plan, made)})
    assert found.holds == Holds.IN_PART and not found.one_seed
    hours, memory = (
        ("W4A8 seconds to quantize", (3.0, 4.0), True),
        ("W4A8 memory, MB", (5.0, 5.0), False),
    )
    assert [(c.head, c.values, c.holds) for c in found.comparisons[:2]] == [hours, memory]
    assert len(found.comparisons) == 4
    assert str(found.comparisons[0]) == "W4A8 seconds to quantize 3 against 4: less"
    assert str(found.comparisons[1]) == "W4A8 memory, MB 5 against 5: not less"


@pytest.mark.parametrize(
    ("fid", "distance", "holds", "order"),
    [
        ([1.0, 1.1], [1.0, 1.1], Holds.HOLDS, Order.BETTER),
        ([1.0, 1.1], [3.0, 3.1], Holds.IN_PART, Order.BETTER),
        ([3.0, 1.0], [3.0, 3.1], Holds.NOT, Order.UNCLEAR),
        ([3.0, 1.0], [3.0, 1.0], Holds.UNCLEAR, Order.UNCLEAR),
        ([3.0, 1.0], [1.0, 1.1], Holds.IN_PART, Order.UNCLEAR),
    ],
)
def test_metrics_are_compared_as_in_verdicts(fid, distance, holds, order):
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    results = results_of(
        claim,
        {
            mine: {"fid": fid, PAIRED: distance},
            base: {"fid": [2.0, 2.1], PAIRED: [2.0, 2.1]},
        },
    )
    found = judge(claim, results)
    assert (found.holds, found.one_seed) == (holds, False)
    first = found.comparisons[0]
    assert (first.head, first.order) == ("FID", order)
    assert first.values == pytest.approx((sum(fid) / 2, 2.05))
    assert first.p is not None and (first.p < 0.05) == (order != Order.UNCLEAR)
    assert str(first) == f"FID {sum(fid) / 2:.2f} against 2.05: {order}, {p_in_words(first.p)}"


def test_how_many_would_differ_by_chance():
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    fid, distance = [1.0, 1.1], [3.0, 1.0]
    results = results_of(
        claim,
        {mine: {"fid": fid, PAIRED: distance}, base: {"fid": [2.0, 2.1], PAIRED: [2.0, 2.1]}},
    )
    said = by_chance([judge(claim, results)] * 20)
    assert said == (
        "40 comparisons were tested (paired t-test over the seeds) and 20 differ with p < 0.05; "
        "were all rows equal, 2 would by chance."
    )


def test_seeds_that_one_row_lacks_are_left_out():
    """A row of one seed is compared with the same seed of ours, and the claim says so."""
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    results = results_of(
        claim,
        {mine: {"fid": [1.0, 9.0], PAIRED: [1.0, 9.0]}, base: {"fid": [2.0], PAIRED: [2.0]}},
    )
    found = judge(claim, results)
    assert found.holds == Holds.HOLDS and found.one_seed
    assert found.comparisons[0].values == (1.0, 2.0)
    assert str(found) == "holds, one seed"


def test_without_results_nothing_is_said():
    results = {}
    for name in all_tables():
        results[name] = made_table(make_plan(name, Choices(scale="mini"), dry=True), {})
    for claim in CLAIMS:
        found = judge(claim, results)
        assert found.holds == Holds.NOT_RUN and not found.comparisons and found.details == "-"


def test_a_metric_that_is_missing_is_named():
    claim = CLAIMS[0]
    ((mine, base),) = claim.pairs
    found = judge(claim, results_of(claim, {mine: {"fid": [1.0]}, base: {"fid": [2.0]}}))
    assert found.holds == Holds.NOT_RUN
    assert [(c.head, c.order) for c in found.comparisons] == [
        ("distance to FP", Order.NOT_MEASURED)
    ]
