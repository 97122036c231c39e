"""Figures 2 and 3, and rows that are drawn otherwise than calibrated."""

from __future__ import annotations

import dataclasses
import json

import pytest

from reproduce import datasets
from reproduce.figures import plots
from reproduce.figures.activations import layer_inputs
from reproduce.figures.figure2 import SAMPLES, InputRanges
from reproduce.pipeline import run_row
from reproduce.results import Status
from reproduce.seed_run import SeedRun
from reproduce.table_results import TableResults
from reproduce.tables.base import Row


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


def test_bars_are_of_one_data_set(tiny_plan):
    """A table of several data sets is drawn one at a time."""
    results = TableResults.stored(tiny_plan("table9"))
    for dataset in ("bedrooms", "imagenet"):
        left = plots.metric_figure(results, dataset=dataset).axes[0]
        papers = [row.paper["fid"] for row in results.table.rows if row.dataset == dataset]
        shown = {round(bar.get_height(), 2) for bar in left.patches}
        shown |= {round(line.get_ydata()[0], 2) for line in left.get_lines()}
        assert {p for p in papers if isinstance(p, float)} <= shown


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
