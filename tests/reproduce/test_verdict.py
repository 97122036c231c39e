"""The verdict's rules, one case each."""

from __future__ import annotations

import dataclasses

import pytest

from reproduce.tables.base import FAILED, UNKNOWN, Cell
from reproduce.verdicts import paper_order, verdict


def result(values: list[float] | None, status: str = "done", reason: str | None = None) -> dict:
    seeds = [{"seed": i, "metrics": {"fid": v}} for i, v in enumerate(values or [])]
    mean = sum(values) / len(values) if values else None
    return {
        "status": status,
        "reason": reason,
        "metrics": {"fid": {"value": mean}},
        "per_seed": seeds,
    }


def cells(mine, base) -> tuple[Cell, Cell]:
    return Cell(id="q", label="QuEST", preset="quest", paper={"fid": mine}), Cell(
        id="b", label="Base", preset="x", paper={"fid": base}
    )


@pytest.mark.parametrize(
    ("mine", "base", "papers", "expected"),
    [
        (
            [5.0, 7.0],
            [9.0, 11.5],
            (3.0, 4.0),
            "better than Base (by 4.25, spread 0.35); as in the paper",
        ),
        (
            [5.0, 7.0],
            [9.0, 11.5],
            (4.0, 3.0),
            "better than Base (by 4.25, spread 0.35); differs from the paper",
        ),
        (
            [9.0, 11.5],
            [5.0, 7.0],
            (3.0, 4.0),
            "worse than Base (by 4.25, spread 0.35); differs from the paper",
        ),
        (
            [5.0, 5.0],
            [4.0, 5.5],
            (3.0, 4.0),
            "no clear difference from Base (by 0.25, spread 1.1); differs from the paper",
        ),
        ([5.0], [6.0], (3.0, 4.0), "better than Base (by 1, one seed, no spread); as in the paper"),
        (
            [5.0, 7.0],
            [9.0, 11.5],
            (3.0, FAILED),
            "better than Base (by 4.25, spread 0.35); as in the paper",
        ),
        (
            [9.0, 11.5],
            [5.0, 7.0],
            (FAILED, 4.0),
            "worse than Base (by 4.25, spread 0.35); the paper's run failed",
        ),
        (
            [5.0, 7.0],
            [9.0, 11.5],
            (None, 4.0),
            "better than Base (by 4.25, spread 0.35); the paper gives no order",
        ),
    ],
)
def test_orders(mine, base, papers, expected):
    cell, other = cells(*papers)
    assert verdict("fid", cell, other, result(mine), result(base)) == expected


def test_an_order_that_only_the_text_of_the_paper_gives():
    cell, base = cells(None, 4.0)
    cell = dataclasses.replace(cell, paper_order={"fid": "worse"})
    assert verdict("fid", cell, base, result([5.0, 7.0]), result([9.0, 11.5])).endswith(
        "; differs from the paper"
    )
    assert verdict("fid", cell, base, result([9.0, 11.5]), result([5.0, 7.0])).endswith(
        "; as in the paper"
    )


def test_rows_of_two_processors_say_so():
    cell, base = cells(3.0, 4.0)
    mine, same, other = (
        result([v]) | {"provenance": {"machine": {"cpu": cpu}}}
        for v, cpu in ((5.0, "A"), (6.0, "A"), (6.0, "B"))
    )
    assert (
        verdict("fid", cell, base, mine, same)
        == "better than Base (by 1, one seed, no spread); as in the paper"
    )
    assert (
        verdict("fid", cell, base, mine, other)
        == "better than Base (by 1, one seed, no spread, on two processors); as in the paper"
    )


def test_seeds_that_were_made_on_one_processor_each_are_not_of_two():
    cell, base = cells(3.0, 4.0)

    def row(values: list[float], processors: str) -> dict:
        made = result(values) | {
            "provenance": {"machine": {"cpu": "A"}, "others": [{"machine": {"cpu": "B"}}]}
        }
        seeds = [
            s | {"processors": list(cpu)}
            for s, cpu in zip(made["per_seed"], processors, strict=True)
        ]
        return made | {"per_seed": seeds}

    mine = row([5.0, 7.0], "AB")
    for other, says in (("AB", ""), ("BA", ", on two processors"), ("AA", ", on two processors")):
        words = f"better than Base (by 4.25, spread 0.35{says}); as in the paper"
        assert verdict("fid", cell, base, mine, row([9.0, 11.5], other)) == words
    without = row([9.0, 11.5], "AB")
    without["per_seed"][1].pop("processors")  # an older result: any of its row's
    assert ", on two processors" in verdict("fid", cell, base, mine, without)


def test_rows_without_a_number():
    cell, base = cells(3.0, 4.0)
    assert (
        verdict("fid", cell, base, result(None, "not run", "needs weights"), result([1.0]))
        == "not run"
    )
    assert (
        verdict("fid", cell, base, result([1.0]), result(None, "failed", "x"))
        == "Base has no result to compare with"
    )
    assert verdict("fid", cell, base, result([1.0]), None) == "Base has no result to compare with"
    assert verdict("fid", cell, None, result([1.0]), None) == "reference row"
    others = result([1.0, 2.0])
    others["per_seed"] = [s | {"seed": s["seed"] + 2} for s in others["per_seed"]]
    assert verdict("fid", cell, base, result([1.0, 2.0]), others) == "no seed in common with Base"


def test_paper_order():
    assert (
        paper_order(1.0, 2.0) == "better"
        and paper_order(2.0, 1.0) == "worse"
        and paper_order(1.0, 1.0) == "equal"
    )
    assert paper_order(FAILED, 1.0) == "worse" and paper_order(1.0, FAILED) == "better"
    assert paper_order(UNKNOWN, 1.0) is None and paper_order(FAILED, UNKNOWN) is None
    assert (
        paper_order(FAILED, FAILED) is None
        and paper_order(None, 1.0) is None
        and paper_order(1.0, None) is None
    )


def test_the_paired_distance_takes_the_order_of_the_papers_fid():
    cell, base = cells(3.0, 4.0)
    mine, other = (
        {
            "status": "done",
            "reason": None,
            "metrics": {"d": {"value": v}},
            "per_seed": [{"seed": 0, "metrics": {"d": v}}, {"seed": 1, "metrics": {"d": v + 0.1}}],
        }
        for v in (0.5, 0.75)
    )
    assert verdict("d", cell, base, mine, other, claim="fid").endswith("as in the paper")
    assert verdict("d", cell, base, other, mine, claim="fid").endswith("differs from the paper")
    assert verdict("d", cell, base, mine, other).endswith("the paper gives no order")


def test_higher_scores_are_better():
    cell = Cell(
        id="q", label="QuEST", preset="quest", paper={"clip_score": 31.5, "inception_score": 202.45}
    )
    base = Cell(
        id="b", label="Base", preset="x", paper={"clip_score": 31.4, "inception_score": FAILED}
    )
    for metric in ("clip_score", "inception_score"):
        mine, other = (
            {
                "status": "done",
                "metrics": {metric: {"value": v}},
                "per_seed": [{"seed": 0, "metrics": {metric: v}}],
            }
            for v in (30.0, 29.0)
        )
        assert (
            verdict(metric, cell, base, mine, other)
            == "better than Base (by 1, one seed, no spread); as in the paper"
        )
        assert verdict(metric, cell, base, other, mine).startswith("worse than Base")
    assert paper_order(2.0, 1.0, True) == "better" and paper_order(FAILED, 1.0, True) == "worse"
