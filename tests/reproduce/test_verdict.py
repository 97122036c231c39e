"""The verdict's rules, one case each."""

from __future__ import annotations

import dataclasses

import pytest
from made_results import made_result, made_table, not_made

from reproduce.choices import Choices
from reproduce.paired_test import Spread
from reproduce.plan import make_plan
from reproduce.results import Result, Status
from reproduce.tables.base import FAILED, UNKNOWN, Row
from reproduce.verdicts import PAIRED, Order, Remark, Verdict, compare, paper_order, verdict

# The first is lower by 4.25, relative to both by 0.5; over three seeds that is no chance.
FIRST, SECOND = [5.0, 7.0, 6.0], [8.5, 11.75, 10.5]
BY = pytest.approx(-4.25)


def fids(values: list[float]) -> Result:
    return made_result({"fid": values})


def rows(mine, base) -> tuple[Row, Row]:
    """Rows with these numbers in the paper."""
    return (
        Row(id="q", label="QuEST", preset="quest", paper={"fid": mine}),
        Row(id="b", label="Base", preset="minmax", paper={"fid": base}),
    )


@pytest.mark.parametrize(
    ("mine", "base", "papers", "order", "agrees", "remarks"),
    [
        (FIRST, SECOND, (3.0, 4.0), Order.BETTER, True, ()),
        (FIRST, SECOND, (4.0, 3.0), Order.BETTER, False, ()),
        (SECOND, FIRST, (3.0, 4.0), Order.WORSE, False, ()),
        ([5.0, 5.0, 5.0], [4.0, 5.5, 6.0], (3.0, 4.0), Order.UNCLEAR, False, ()),
        ([5.0, 5.0, 5.0], [4.0, 5.5, 6.0], (3.0, 3.0), Order.UNCLEAR, False, ()),
        ([5.0], [6.0], (3.0, 4.0), Order.BETTER, True, (Remark.ONE_SEED,)),
        ([5.0], [5.0], (3.0, 4.0), Order.UNCLEAR, False, (Remark.ONE_SEED,)),
        (FIRST, SECOND, (3.0, FAILED), Order.BETTER, True, ()),
        (SECOND, FIRST, (FAILED, 4.0), Order.WORSE, None, (Remark.PAPER_FAILED,)),
        (FIRST, SECOND, (None, 4.0), Order.BETTER, None, ()),
    ],
)
def test_orders(mine, base, papers, order, agrees, remarks):
    row, other = rows(*papers)
    found = compare("fid", row, other, fids(mine), fids(base))
    assert (found.order, found.base, found.agrees) == (order, "Base", agrees)
    assert found.remarks == remarks and found.measured


def test_differences_are_taken_seed_by_seed():
    found = compare("fid", *rows(3.0, 4.0), fids(FIRST), fids(SECOND))
    assert found.difference == BY and found.p is not None and found.p < 0.01
    found = compare("fid", *rows(3.0, 4.0), fids([5.0]), fids([6.0]))
    assert (found.difference, found.p) == (-1.0, None)


def test_the_spread_of_other_pairs_decides_with_the_own():
    pair = fids([5.0, 6.0]), fids([6.3, 6.9])
    alone = compare("fid", *rows(3.0, 4.0), *pair)
    assert alone.order == Order.UNCLEAR  # two seeds alone hardly tell anything apart
    even = compare("fid", *rows(3.0, 4.0), *pair, common=Spread(0.05, 8))
    assert even.order == Order.BETTER
    uneven = compare("fid", *rows(3.0, 4.0), *pair, common=Spread(0.5, 8))
    assert uneven.order == Order.UNCLEAR
    one = compare("fid", *rows(3.0, 4.0), fids([5.0]), fids([6.0]), common=Spread(0.5, 8))
    assert one.order == Order.UNCLEAR and Remark.ONE_SEED not in one.remarks


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            Verdict(Order.BETTER, "Base", -4.25, 0.0354, True),
            "better than Base (by 4.25, p 0.035); as in the paper",
        ),
        (
            Verdict(Order.UNCLEAR, "Base", 0.25, 0.6, False),
            "no clear difference from Base (by 0.25, p 0.6); differs from the paper",
        ),
        (
            Verdict(Order.WORSE, "Base", 1.0, None, None, (Remark.ONE_SEED, Remark.TWO_PROCESSORS)),
            "worse than Base (by 1, one seed, no spread, on two processors); "
            "the paper gives no order",
        ),
        (
            Verdict(Order.WORSE, "Base", 1.0, 0.0005, None, (Remark.PAPER_FAILED,)),
            "worse than Base (by 1, p < 0.001); the paper's run failed",
        ),
        (Verdict(Order.NO_BASE, "Base"), "Base has no result to compare with"),
        (Verdict(Order.NO_COMMON_SEED, "Base"), "no seed in common with Base"),
        (Verdict(Order.REFERENCE), "reference row"),
    ],
)
def test_a_verdict_is_also_a_sentence(found, sentence):
    assert str(found) == sentence


def test_an_order_that_only_the_text_of_the_paper_gives():
    row, base = rows(None, 4.0)
    row = dataclasses.replace(row, paper_order={"fid": "worse"})
    assert compare("fid", row, base, fids(FIRST), fids(SECOND)).agrees is False
    assert compare("fid", row, base, fids(SECOND), fids(FIRST)).agrees is True


def on(result: Result, *processors: str) -> Result:
    """The same result where each seed was made on these processors, one letter each."""
    pairs = zip(result.seeds, processors, strict=True)
    seeds = tuple(dataclasses.replace(s, processors=tuple(names)) for s, names in pairs)
    return dataclasses.replace(result, seeds=seeds)


@pytest.mark.parametrize(
    ("mine", "other", "two"),
    [
        (("A", "B", "B"), ("A", "B", "B"), False),  # each seed on one processor
        (("A", "B", "B"), ("B", "A", "B"), True),
        (("A", "B", "A"), ("A", "A", "A"), True),
        (("AB", "A", "A"), ("A", "A", "A"), True),
        (("A", "A", "A"), ("A", "A", "A"), False),
    ],
)
def test_seeds_of_two_processors_say_so(mine, other, two):
    found = compare("fid", *rows(3.0, 4.0), on(fids(FIRST), *mine), on(fids(SECOND), *other))
    assert (Remark.TWO_PROCESSORS in found.remarks) == two
    assert found.difference == BY


def test_rows_without_a_number():
    row, base = rows(3.0, 4.0)
    mine, other = fids([1.0]), fids([2.0])

    def order(*results: Result | None) -> Order:
        return compare("fid", row, base, *results).order

    assert order(not_made(), other) == Order.NOT_RUN
    assert order(not_made(Status.FAILED), other) == Order.FAILED
    assert order(made_result({"kid": [1.0]}), other) == Order.NOT_MEASURED
    assert order(mine, not_made(Status.FAILED)) == Order.NO_BASE
    assert order(mine, None) == Order.NO_BASE
    assert order(mine, made_result({"fid": [2.0]}, first_seed=1)) == Order.NO_COMMON_SEED
    assert compare("fid", row, None, mine, None) == Verdict(Order.REFERENCE)


def test_paper_order():
    assert paper_order(1.0, 2.0) == "better"
    assert paper_order(2.0, 1.0) == "worse"
    assert paper_order(1.0, 1.0) == "equal"
    assert paper_order(FAILED, 1.0) == "worse"
    assert paper_order(1.0, FAILED) == "better"
    for pair in ((UNKNOWN, 1.0), (FAILED, UNKNOWN), (FAILED, FAILED), (None, 1.0), (1.0, None)):
        assert paper_order(*pair) is None


def test_the_distance_to_full_precision_takes_the_order_of_the_papers_fid():
    row, base = rows(3.0, 4.0)
    mine, other = (made_result({PAIRED: [v, 1.1 * v, 1.2 * v]}) for v in (0.5, 0.75))
    assert compare(PAIRED, row, base, mine, other, claim="fid").agrees is True
    assert compare(PAIRED, row, base, other, mine, claim="fid").agrees is False
    assert compare(PAIRED, row, base, mine, other).agrees is None


@pytest.mark.parametrize("metric", ["clip_score", "inception_score"])
def test_higher_scores_are_better(metric):
    row = dataclasses.replace(rows(1.0, 1.0)[0], paper={metric: 31.5})
    base = dataclasses.replace(rows(1.0, 1.0)[1], paper={metric: 31.4})
    high, low = made_result({metric: [30.0]}), made_result({metric: [29.0]})
    found = compare(metric, row, base, high, low)
    assert (found.order, found.agrees) == (Order.BETTER, True)
    assert compare(metric, row, base, low, high).order == Order.WORSE


def test_rows_of_a_table_are_judged_against_the_row_of_the_claim():
    plan = make_plan("table3", Choices(), dry=True)
    distances = {PAIRED: [1.0, 1.2], "fid": [1.0, 1.2], "psnr_to_fp": [30.0, 31.0]}
    worse = {name: [value * 2 for value in values] for name, values in distances.items()}
    results = made_table(
        plan,
        {
            "bedrooms-w4a4-quest": made_result(distances),
            "bedrooms-w4a4-q-diffusion": made_result(worse),
        },
    )
    quest, base, full = (
        plan.table.row(f"bedrooms-{name}") for name in ("w4a4-quest", "w4a4-q-diffusion", "fp")
    )
    for metric in ("fid", PAIRED):
        found = verdict(results, quest, metric)
        assert found is not None
        assert (found.order, found.base, found.agrees) == (Order.BETTER, base.label, True)
    assert verdict(results, quest, "psnr_to_fp") is None  # it decides nothing
    assert verdict(results, base, PAIRED) is None  # its claim is against full precision
    found = verdict(results, base, "fid")
    assert found is not None and found.order == Order.NO_BASE
    found = verdict(results, full, "fid")
    assert found is not None and found.order == Order.NOT_RUN
