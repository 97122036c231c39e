"""Sentences that the numbers choose."""

from __future__ import annotations

import json

import pytest
from made_results import made_result, made_table

from reproduce.choices import Choices
from reproduce.figures.figure2 import RANGES
from reproduce.plan import make_plan
from reproduce.reporting import what_we_see
from reproduce.table_results import TableResults
from reproduce.verdicts import PAIRED


def made(table: str = "table3", scale: str = "mini", **rows: dict) -> str:
    """What is seen in a table with these rows, by their ids."""
    plan = make_plan(table, Choices(scale=scale), dry=True)
    found = {row.replace("_", "-"): made_result(metrics) for row, metrics in rows.items()}
    return what_we_see.of_table(made_table(plan, found))


def row(distance: float, fid: float, spread: float = 0.1) -> dict[str, list[float]]:
    return {PAIRED: [distance, distance + spread], "fid": [fid, fid + spread]}


def test_a_claim_that_holds_and_one_that_does_not():
    better = made(bedrooms_w4a4_quest=row(1, 2), bedrooms_w4a4_q_diffusion=row(3, 4))
    assert "- ✅ QuEST beats Q-Diffusion at W4A4, Bedrooms: *holds*." in better
    assert "1 holds" in better
    worse = made(bedrooms_w4a4_quest=row(3, 4), bedrooms_w4a4_q_diffusion=row(1, 2))
    assert "- ❌ QuEST beats Q-Diffusion at W4A4, Bedrooms: *does not hold*." in worse
    for text in (better, worse):
        assert "2 of 25 rows have numbers, of 2 seeds with 1,000 images each." in text


def test_the_closest_row_is_named_and_whether_that_is_clear():
    three = {
        "bedrooms_w4a4_minmax": row(5, 9),
        "bedrooms_w4a4_quest": row(1, 2),
        "bedrooms_w4a4_q_diffusion": row(3, 4),
    }
    clear = made(**three)
    assert "- W4A4: *QuEST" in clear and "(distance 1.05), then *Q-Diffusion*" in clear
    assert "farthest: *min-max PTQ* (distance 5.05)." in clear
    three["bedrooms_w4a4_q_diffusion"] = {PAIRED: [0.5, 1.7], "fid": [4, 4]}
    assert "(distance 1.05), with no clear difference to *Q-Diffusion*" in made(**three)


def test_without_features_the_psnr_ranks_and_more_is_closer():
    text = made(
        "table11",
        cifar10_w4a4_quest={"psnr_to_fp": [20.0, 20.2]},
        cifar10_w4a4_q_diffusion={"psnr_to_fp": [15.0, 15.2]},
    )
    assert "(PSNR 20.1 dB), then *Q-Diffusion* (PSNR 15.1 dB)." in text


def test_papers_orders_are_counted():
    text = made(bedrooms_w4a4_quest=row(1, 2), bedrooms_w4a4_q_diffusion=row(3, 4))
    assert "rows that the paper orders: 1. The same way round here: 1;" in text
    text = made(bedrooms_w4a4_quest=row(1, 9), bedrooms_w4a4_q_diffusion=row(3, 4))
    assert "The same way round here: 0; no clear difference: 0; the other way round: 1." in text


def test_the_ablation_lists_each_change_with_its_sign():
    text = made(
        "ablation",
        w4a4_quest=row(1, 2),
        w4a4_one_group=row(1.5, 2),
        w4a4_token=row(0.8, 2),
        w4a4_tensor={PAIRED: [0.95, 1.13], "fid": [2, 2]},
    )
    assert "- Clearly farther from full precision: *quest, one step group* (+0.50)." in text
    assert "- No clear difference: *quest, scales per tensor* (-0.01)." in text
    assert "- Clearly closer: *quest, a grid a token* (-0.20)." in text


def test_changes_at_several_bits_name_their_bits():
    rows = {
        f"dit_{bits}_{method}": row(distance, 1)
        for bits, gain in (("w8a8", 0.01), ("w4a4", 2))
        for method, distance in (("q_diffusion", 3), ("quest", 3 - gain))
    }
    text = made("dit", **rows)
    assert "- Clearly closer: *QuEST (ours) W8A8* (-0.01), *QuEST (ours) W4A4* (-2.00)." in text


def test_smoke_and_nothing_are_said_so():
    smoke = made(scale="smoke", bedrooms_w4a4_quest=row(1, 2), bedrooms_w4a4_minmax=row(3, 4))
    assert smoke.startswith("2 rows ran.") and "nothing about the methods" in smoke
    assert "No row of this table has numbers" in made()


@pytest.mark.parametrize(("after", "says"), [(5.0, "narrows those"), (12.0, "does not narrow")])
def test_figure_2_tells_the_ranges(tmp_path, after, says):
    plan = make_plan("figure2", Choices(results=tmp_path), dry=True)
    line = {"min, before": 0.0, "max, before": 10.0, "min, after": 0.0, "std, before": 1.0}
    line |= {"max, after": after, "std, after": 1.0}
    plan.folder.mkdir(parents=True)
    ranges = {"a": line | {"finetuned": True}, "b": line | {"finetuned": False}}
    (plan.folder / RANGES).write_text(json.dumps(ranges))
    results = made_table(plan, {"w4a4-after": made_result(row(1, 2))})
    text = what_we_see.of_table(TableResults(plan, results.results))
    assert says in text and f"{after / 10:.2f} times as wide" in text


@pytest.mark.parametrize(
    ("snr", "says"),
    [
        ((0.0, 3.0, 10.0), ["100%", "10%", "gained 7.0 dB", "had gained 3.0 dB"]),
        (
            (3.0, 2.0, 1.0),
            ["gained nothing here: it lost 1.0 dB", "rounding alone had gained nothing"],
        ),
    ],
)
def test_the_tour_says_what_finetuning_gained(snr, says):
    text = what_we_see.of_tour(dict(zip(("naive", "before", "after"), snr, strict=True)), "W4A4")
    assert all(words in text for words in says)


@pytest.mark.parametrize(
    ("psnr", "says"), [(35.0, "hard to tell"), (25.0, "one sees"), (9.0, "other pictures")]
)
def test_your_own_pipeline(psnr, says):
    text = what_we_see.of_pipeline(psnr, 1_000_000, 8_000_000, "W4A4")
    assert says in text and "8.0 times less" in text


@pytest.mark.parametrize(
    ("half", "says"),
    [
        (3.0, "1.5 times as fast as compiled bfloat16 and 2.0 times slower than OpenVINO"),
        (1.0, "2.0 times slower than compiled bfloat16"),
    ],
)
def test_the_engine(half, says):
    def run(identical: bool, cpu: float) -> dict:
        metrics = {"fake": {"fid": 1.0}, "cpu": {"fid": cpu}}
        return {"cpu_against_reference": {"bit_identical": identical}, "metrics": metrics}

    steps = {"w4a4-fused": 2.0, "fp32": 7.0, "bf16-compiled": half, "openvino-int8-bf16": 1.0}
    variants = {name: {"step_s": step, "peak_bytes": 2e9} for name, step in steps.items()}
    equality = {"results": [run(True, 1.25), run(False, 0.9)]}
    text = what_we_see.of_engine(equality, {"models": {"sd14": {"variants": variants}}})
    assert says in text and "In 1 of 2" in text and "by 0.25 at most" in text
