"""Figures 2 and 3, and rows that are drawn otherwise than calibrated."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from made_results import made_result, made_table, seed_result

from questlib.errors import ConfigError
from reproduce import datasets
from reproduce.choices import Choices
from reproduce.evaluation.clip_score import coco_prompts
from reproduce.figures import plots, strips, style
from reproduce.figures.activations import layer_inputs
from reproduce.figures.figure2 import SAMPLES, InputRanges
from reproduce.models.embedded import class_names
from reproduce.models.loading import load_pipeline
from reproduce.pipeline import run_row
from reproduce.plan import make_plan
from reproduce.results import Status
from reproduce.seed_run import SeedRun
from reproduce.table_results import TableResults
from reproduce.tables.base import FAILED, OURS, Row
from reproduce.tables.registry import all_tables
from reproduce.verdicts import PAIRED


def test_input_ranges(tiny_plan):
    plan = tiny_plan("figure2")
    for row in plan.rows:
        assert run_row(row, plan).done
    ranges = InputRanges(plan)
    table = ranges.table
    stored = json.loads((plan.folder / "ranges.json").read_text())
    assert list(stored) == list(table.index) and set(table["finetuned"]) == {True, False}
    assert ranges.config.finetuning.cma_iters > 0
    assert set(ranges.unets) == {"full precision", "before", "after"}
    name = table.index[0]
    for model, unet in ranges.unets.items():
        x = layer_inputs(unet, ranges.calib, [name], SAMPLES)[name]
        expected = [x.min().item(), x.max().item(), x.std().item()]
        found = [stored[name][f"{key}, {model}"] for key in ("min", "max", "std")]
        assert found == pytest.approx(expected)
    assert (table["max, before"] - table["min, before"]).is_monotonic_decreasing
    assert list(ranges.widest(3).index) == list(table.index[:3])

    summary = ranges.summary()
    assert summary["layers"].sum() == len(table)
    others = table[~table["finetuned"]]
    before = others["max, before"] - others["min, before"]
    after = others["max, after"] - others["min, after"]
    ratio = summary.loc["other layers", "range, after / before"]
    assert ratio == pytest.approx((after / before).mean())

    second = table.index[table["finetuned"]][1]
    figure = ranges.histogram(1)
    assert figure.get_suptitle() == second and len(figure.axes) == 3

    # Shown again they come from the files beside the rows, without a checkpoint.
    shutil.rmtree(plan.work)
    shown = InputRanges(tiny_plan("figure2", stored=True))
    assert shown.summary().equals(summary) and len(shown.histogram(1).axes[0].images) == 1
    assert "make reproduce-figure2" in shown.histogram(0).axes[0].texts[0].get_text()  # not drawn
    (plan.folder / "ranges.json").unlink()
    with pytest.raises(ConfigError, match="expected ranges.json beside the rows"):
        InputRanges(tiny_plan("figure2", stored=True))


def test_sensitivity(tiny_plan, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "imagenet", datasets.DATASETS["bedrooms"])
    plan = tiny_plan("figure3", rows=["imagenet-fp", "a8-conv", "a4-conv", "a4-linear"])
    results = {row.id: run_row(row, plan) for row in plan.rows}
    distance = {k: r.metric("feature_distance_to_fp").value for k, r in results.items()}
    assert distance["a4-conv"] > distance["a8-conv"] > 0 and distance["a4-linear"] > 0
    full = results["imagenet-fp"].size_bytes
    assert results["a4-conv"].size_bytes > 0.9 * full  # the weights are as they were
    lines = plots.sensitivity_figure(TableResults.stored(plan)).axes[1].get_lines()
    expected = [distance["a8-conv"], distance["a4-conv"]]
    assert any(list(line.get_ydata()) == expected for line in lines)


def test_figures_of_rows(tiny_plan):
    plan = tiny_plan("figure3")
    results = TableResults.stored(plan)
    assert plots.sensitivity_figure(results).axes and plots.rows_figure(results, "a4-conv").axes
    result = run_row(plan.table.row("imagenet-fp"), plan)
    assert result.done or result.status == Status.NOT_RUN


def dots(axes) -> list[float]:
    """The values that stand as dots."""
    return [x for line in axes.get_lines() if line.get_marker() == "o" for x in line.get_xdata()]


def written(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_dots_are_of_one_data_set(tiny_plan):
    """A table of several data sets is drawn one at a time."""
    results = TableResults.stored(tiny_plan("table9"))
    for dataset in ("bedrooms", "imagenet"):
        left = plots.metric_figure(results, dataset=dataset).axes[0]
        rows = [row for row in results.table.rows if row.dataset == dataset]
        assert set(dots(left)) == {row.paper["fid"] for row in rows if row.paper}


def test_the_papers_row_of_quest_stands_once():
    """Not once for each of our presets; where generation failed stands N/A."""
    plan = make_plan("table3", Choices(), dry=True)
    left, right = plots.metric_figure(made_table(plan, {})).axes
    papers = [row.paper["fid"] for row in plan.table.rows if row.preset == "quest"]
    assert sorted(x for x in dots(left) if x in papers) == sorted(papers)
    failed = [row for row in plan.table.rows if row.paper.get("fid") == FAILED]
    assert written(left) == [FAILED] * len(failed)
    assert written(right) == ["not measured"]


def test_a_method_has_one_color_in_all_figures():
    plan = make_plan("table3", Choices(), dry=True)
    rows = [row for row in plan.table.rows if row.weight_bits == 4 and row.act_bits == 4]
    results = made_table(plan, {r.id: made_result({"fid": [i + 2.0]}) for i, r in enumerate(rows)})
    figures = (plots.metric_figure(results).axes[1], plots.rows_figure(results, rows[0].id).axes[0])
    for axes in figures:
        found = {
            float(line.get_xdata()[0]): line.get_color()
            for line in axes.get_lines()
            if line.get_marker() == "o"
        }
        assert found == {i + 2.0: style.COLORS[row.label] for i, row in enumerate(rows)}
    assert len({style.COLORS[row.label] for row in rows}) == len(rows)


@pytest.mark.parametrize("data, metric", [("bedrooms", "fid"), ("sd", "clip_score")])
def test_rows_of_one_data_set_by_their_own_metric(data, metric):
    """Images from prompts have a CLIP score and no FID."""
    plan = make_plan("after-paper", Choices(), dry=True)
    presets = ("quest", "svdquant")
    made = {
        f"{name}-w4a4-{preset}": made_result({metric: [3.0 + i], PAIRED: [1.0 + i]})
        for name in ("bedrooms", "sd")
        for i, preset in enumerate(presets)
    }
    left, right = plots.rows_figure(made_table(plan, made), f"{data}-w4a4-quest").axes
    assert sorted(dots(left)) == [3.0, 4.0] and sorted(dots(right)) == [1.0, 2.0]
    assert left.get_title("left").startswith({"fid": "FID", "clip_score": "CLIP"}[metric])


def test_the_ablation_is_sorted_differences():
    plan = make_plan("ablation", Choices(), dry=True)
    values = {"w4a4-quest": 2.0, "w4a4-token": 1.5, "w4a4-nearest": 2.25, "w4a4-minmax": 9.0}
    made = {k: made_result({"fid": [v], PAIRED: [v]}) for k, v in values.items()}
    left, right = plots.difference_figure(made_table(plan, made), "w4a4-quest").axes
    assert dots(right) == pytest.approx([-0.5, 0.25, 7.0])
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == [plan.table.row(f"w4a4-{k}").label for k in ("token", "nearest", "minmax")]


def test_a_methods_budgets_are_one_line():
    plan = make_plan("budget", Choices(), dry=True)
    values = {"quest-tenfold": 2.0, "quest": 2.5, "quest-tenth": 3.5, "q-diffusion": 4.0}
    seeds = (seed_result(metrics={PAIRED: 1.0}, seconds=dict(calibrate=60.0, finetune=120.0)),)
    made = {f"bedrooms-w4a4-{k}": made_result({PAIRED: [v]}) for k, v in values.items()}
    made["bedrooms-w4a4-quest-paper"] = made_result({}, seeds=seeds)
    left, right = plots.budget_figure(made_table(plan, made)).axes
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in left.get_lines()}
    assert lines[(0.1, 1.0, 10.0)] == [3.5, 2.5, 2.0]
    assert [4.0] in lines.values()
    minutes = [list(line.get_xdata()) for line in right.get_lines()]
    assert [3.0] in minutes
    names = {"Q-Diffusion", "QuEST (paper's text)", OURS}
    assert set(right.get_legend_handles_labels()[1]) == names


def test_cost_is_in_minutes():
    plan = make_plan("table8", Choices(), dry=True)
    row = plan.table.row("w4a4-quest")
    seconds = dict(calibrate=30.0, ranges=60.0, reconstruct=0.0, finetune=90.0)
    seeds = (seed_result(seconds=seconds | dict(sample=500.0, evaluate=500.0)),)
    results = made_table(plan, {row.id: made_result({}, seeds=seeds)})
    axes = plots.cost_figure(results).axes[0]
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(3.0)
    assert axes.get_legend_handles_labels()[1] == ["calibrate", "ranges", "finetune"]


def test_prompts_stand_above_pictures():
    plan = make_plan("table5", Choices(), dry=True)
    prompts = coco_prompts(plan.setting(plan.rows[0]).captions, 8, plan.seeds[0])
    top = strips.picture(made_table(plan, {})).axes[0]
    assert [" ".join(text.split()) for text in written(top)] == prompts


def test_class_names_stand_above_pictures():
    plan = make_plan("table4", Choices(), dry=True)
    names = class_names("mini-cin")
    pipe = load_pipeline("mini-cin")
    assert len(names) == pipe.class_embedder.config.num_classes
    top = strips.picture(made_table(plan, {})).axes[0]
    assert [" ".join(text.split()) for text in written(top)] == names[:8]


@pytest.mark.parametrize("table", all_tables())
def test_full_precision_is_in_every_picture(table):
    rows = [all_tables()[table].row(row) for row in all_tables()[table].picture]
    assert rows[0].full_precision


def test_drawn_otherwise_than_calibrated(tiny_plan):
    """The calibration is shared; images, also those to compare with, are drawn as the row says."""
    plan = tiny_plan("ablation")
    own = Row(id="own", label="own", preset="minmax", weight_bits=4, act_bits=4)
    drawn = dict(num_inference_steps=3, sampler="plms")
    other = dataclasses.replace(own, id="other", sampling=drawn)
    runs = {row.id: SeedRun(row, plan, 0) for row in (own, other)}
    assert runs["own"].calibration.hash == runs["other"].calibration.hash
    assert runs["own"].checkpoint.hash == runs["other"].checkpoint.hash
    assert runs["own"].samples.hash != runs["other"].samples.hash
    assert runs["own"].fp_samples.hash != runs["other"].fp_samples.hash
    sampling = run_row(other, plan).conditions.sampling
    assert (sampling.sampler, sampling.num_inference_steps) == ("plms", 3)
    drawn = json.loads((runs["other"].samples.folder / "shards" / "run.json").read_text())
    assert drawn["steps"] == 3 and drawn["sampler"] == "PNDMScheduler"
