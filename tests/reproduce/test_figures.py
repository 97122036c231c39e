"""Figures 2 and 3: what is measured beside the rows' metrics; and rows drawn otherwise than calibrated."""

from __future__ import annotations

import dataclasses
import json

import pytest

from reproduce import datasets
from reproduce.figures import figure2, plots
from reproduce.figures.pictures import layer_inputs
from reproduce.pipeline import SeedRun, run_cell
from reproduce.reporting import report
from reproduce.tables.base import Cell


def test_input_ranges(tiny_plan):
    plan = tiny_plan("figure2")
    for cell in plan.cells:
        assert run_cell(cell, plan)["status"] == "done"
    table = figure2.input_ranges(plan)
    stored = json.loads((plan.folder / "ranges.json").read_text())
    assert list(stored) == list(table.index) and set(table["finetuned"]) == {True, False}
    unets, calib, config = figure2.models(plan)
    assert config.finetuning.cma_iters > 0 and set(unets) == {"full precision", "before", "after"}
    name = table.index[0]
    for model, unet in unets.items():
        x = layer_inputs(unet, calib, [name], figure2.SAMPLES)[name]
        expected = [x.min().item(), x.max().item(), x.std().item()]
        assert [stored[name][f"{key}, {model}"] for key in ("min", "max", "std")] == pytest.approx(
            expected
        )
    before = table["max, before"] - table["min, before"]
    assert before.is_monotonic_decreasing
    summary = figure2.summary(table)
    assert summary["layers"].sum() == len(table)
    others = table[~table["finetuned"]]
    ratio = (others["max, after"] - others["min, after"]) / (
        others["max, before"] - others["min, before"]
    )
    assert summary.loc["other layers", "range, after / before"] == pytest.approx(ratio.mean())


def test_sensitivity(tiny_plan, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "imagenet", datasets.DATASETS["bedrooms"])
    plan = tiny_plan("figure3", cells=["imagenet-fp", "a8-conv", "a4-conv", "a4-linear"])
    results = {r["cell"]: r for r in (run_cell(cell, plan) for cell in plan.cells)}
    distance = {c: r["metrics"]["feature_distance_to_fp"]["value"] for c, r in results.items()}
    assert distance["a4-conv"] > distance["a8-conv"] > 0 and distance["a4-linear"] > 0
    assert (
        results["a4-conv"]["size_bytes"] > 0.9 * results["imagenet-fp"]["size_bytes"]
    )  # the weights are as they were
    lines = plots.sensitivity_figure(report.load_results(plan)).axes[1].get_lines()
    assert any(
        list(line.get_ydata()) == [distance["a8-conv"], distance["a4-conv"]] for line in lines
    )


def test_figures_of_rows(tiny_plan):
    plan = tiny_plan("figure3")
    results = report.load_results(plan)
    assert plots.sensitivity_figure(results).axes and plots.rows_figure(results, "a4-conv").axes
    assert report.made_by(results) == "nothing was made"
    result = run_cell(plan.table.cell("imagenet-fp"), plan)
    assert (
        result["status"] == "not run"
        and "does not exist" in result["reason"]
        or result["status"] == "done"
    )


def test_drawn_otherwise_than_calibrated(tiny_plan):
    """The calibration is shared, images and what they are compared with are drawn as the row says."""
    plan = tiny_plan("ablation")
    own = Cell(id="own", label="own", preset="minmax", weight_bits=4, act_bits=4)
    other = dataclasses.replace(
        own, id="other", sampling=dict(num_inference_steps=3, sampler="plms")
    )
    runs = {cell.id: SeedRun(cell, plan, 0) for cell in (own, other)}
    assert runs["own"].calibration.hash == runs["other"].calibration.hash
    assert runs["own"].checkpoint.hash == runs["other"].checkpoint.hash
    assert (
        runs["own"].samples.hash != runs["other"].samples.hash
        and runs["own"].fp_samples.hash != runs["other"].fp_samples.hash
    )
    result = run_cell(other, plan)
    assert (result["sampler"], result["num_inference_steps"]) == ("plms", 3)
    drawn = json.loads((runs["other"].samples.folder / "shards" / "run.json").read_text())
    assert drawn["steps"] == 3 and drawn["sampler"] == "PNDMScheduler"


def test_made_by_names_commit_and_changes(tiny_plan):
    plan = tiny_plan(cells=["bedrooms-fp"])
    result = run_cell(plan.cells[0], plan)
    result["provenance"] |= {"commit": "c" * 40, "dirty": True}
    assert report.made_by([result]).startswith(f"made at commit {'c' * 40} with changes, torch ")
    result["provenance"]["dirty"] = False
    assert (
        "with changes" not in report.made_by([result, result])
        and report.made_by([result, result]).count("made at") == 1
    )
