"""Tables, pictures and the executed notebook, from real results of the tiny model."""

from __future__ import annotations

import dataclasses
import json

import nbformat

from reproduce import plots, report, run
from reproduce.pipeline import run_cell

CELLS = ["bedrooms-fp", "bedrooms-w4a4-minmax", "bedrooms-w4a4-q-diffusion"]


def test_tables_and_pictures(tiny_plan, tmp_path):
    plan = tiny_plan(cells=CELLS, seeds=[0, 1])
    for cell in plan.cells:
        run_cell(cell, plan)
    results = report.finish(plan)
    stored = json.loads((plan.folder / "bedrooms-w4a4-q-diffusion.json").read_text())
    assert stored["metrics"]["fid"]["verdict"] == results[12]["metrics"]["fid"]["verdict"] != ""
    ours = report.frame(results)
    assert len(ours) == 16 and "±" in ours["FID"][0] and (ours["FID"][1] == "not run")
    sides = report.side_by_side(results)
    assert list(sides["FID paper"][[0, 12, 13, 11]]) == ["2.95", "N/A", "5.64", "not in the paper"]
    assert "survey 8.92" in sides["FID others"][15]
    for text in (report.terminal(plan, results), report.markdown(plan, results), report.html(plan, results)):
        assert "Q-Diffusion" in text and "compare orders" in text and "not run yet" in text
    assert json.loads(report.as_json(plan, results))["results"][0]["cell"] == "bedrooms-fp"
    for name, figure in (
        ("a", plots.metric_figure(results)),
        ("b", plots.cost_figure(results)),
        ("c", plots.picture(plan, results)),
    ):
        assert plots.save(figure, tmp_path / f"{name}.png").stat().st_size > 5000


def test_figures_without_results(tiny_plan):
    plan = tiny_plan()
    results = report.load_results(plan)
    assert all(r["status"] == "not run" for r in results)
    for figure in (plots.metric_figure(results), plots.cost_figure(results), plots.picture(plan, results)):
        assert figure.axes


def test_time_of_a_fresh_run_is_kept_and_others_are_summed_by_stage(tiny_plan):
    plan = tiny_plan(cells=CELLS)
    plan = dataclasses.replace(plan, table=dataclasses.replace(plan.table, cells=plan.cells))  # a table of three rows
    results = [run_cell(cell, plan) for cell in plan.cells]
    path = plan.folder / "run.json"
    run.record_time(plan, 3.0, fresh=False)  # all came from the cache: what its stages took when they were made
    stages = json.loads(path.read_text())
    at_least = sum(r["seconds"]["sample"] + r["seconds"]["evaluate"] for r in results)
    assert stages["seconds"] >= round(at_least, 1) > 0 and not stages["fresh"]
    assert stages["command"] == "make reproduce-table3 SCALE=smoke"
    run.record_time(plan, 100.0, fresh=True)
    run.record_time(plan, 3.0, fresh=False)
    stored = json.loads(path.read_text())
    assert (stored["seconds"], stored["fresh"]) == (100.0, True)


def test_kept_notebook_names_no_machine(tiny_plan):
    plan = tiny_plan()
    cell = nbformat.v4.new_code_cell(
        f"RESULTS = {str(plan.results)!r}",
        metadata={"papermill": {"duration": 1.0}, "tags": ["injected-parameters"]},
        outputs=[
            nbformat.v4.new_output("stream", name="stderr", text="50%"),
            nbformat.v4.new_output("stream", name="stdout", text=str(plan.work)),
        ],
    )
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"input_path": str(plan.work)}})
    text = nbformat.writes(run.without_machine(notebook, plan))
    assert str(plan.results.parent) not in text and "50%" not in text and "papermill" not in text
    assert "RESULTS = 'results'" in text and "injected-parameters" in text
