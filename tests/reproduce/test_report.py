"""Tables, pictures and the executed notebook, from real results of the tiny model."""

from __future__ import annotations

import json

import nbformat
import pytest

from reproduce import notebooks
from reproduce.figures import plots
from reproduce.pipeline import run_cell
from reproduce.plan import make_plan
from reproduce.reporting import report
from reproduce.results import empty_result

CELLS = ["bedrooms-fp", "bedrooms-w4a4-minmax", "bedrooms-w4a4-q-diffusion"]


def test_tables_and_pictures(tiny_plan, tmp_path):
    plan = tiny_plan(cells=CELLS, seeds=[0, 1])
    for cell in plan.cells:
        run_cell(cell, plan)
    results = report.finish(plan)
    stored = json.loads((plan.folder / "bedrooms-w4a4-q-diffusion.json").read_text())
    at = {r["cell"]: i for i, r in enumerate(results)}
    assert (
        stored["metrics"]["fid"]["verdict"]
        == results[at["bedrooms-w4a4-q-diffusion"]]["metrics"]["fid"]["verdict"]
        != ""
    )
    ours = report.frame(results)
    assert (
        len(ours) == 25
        and "±" in ours["FID"][0]
        and (ours["FID"][1] == "not run")
        and "IS" not in ours
    )
    sides = report.side_by_side(results)
    rows = [
        at[f"bedrooms-{c}"]
        for c in ("fp", "w4a4-q-diffusion", "w4a4-quest", "w4a4-minmax", "w4a4-efficientdm")
    ]
    assert list(sides["FID paper"][rows]) == ["2.95", "N/A", "5.64", "not in the paper", "10.60"]
    assert "survey 8.92" in sides["FID others"][at["bedrooms-w4a4-quest"]]
    for text in (
        report.terminal(plan, results),
        report.markdown(plan, results),
        report.html(plan, results),
    ):
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
    for figure in (
        plots.metric_figure(results),
        plots.cost_figure(results),
        plots.picture(plan, results),
    ):
        assert figure.axes
    assert "not measured" in [t.get_text() for t in plots.metric_figure(results).axes[1].texts]


@pytest.mark.parametrize(("worst", "scale"), [(15.0, "linear"), (40.0, "log")])
def test_axis_is_logarithmic_only_where_values_lie_far_apart(tiny_plan, worst, scale):
    results = report.load_results(tiny_plan())
    values = [2.0, *[worst] * (len(results) - 1)]
    for result, value in zip(results, values, strict=True):
        result["metrics"]["fid"]["value"] = value
    assert plots.metric_figure(results).axes[1].get_yscale() == scale


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
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"papermill": {"input_path": str(plan.work)}}
    )
    text = nbformat.writes(notebooks.without_machine(notebook, plan))
    assert str(plan.results.parent) not in text and "50%" not in text and "papermill" not in text
    assert "RESULTS = 'results'" in text and "injected-parameters" in text


def test_costs_beside_the_papers(tiny_plan):
    """Table 6: hours and memory of quantizing, the paper's and ours."""
    plan = tiny_plan("table6", cells=["bedrooms-fp", "w4a8-baseline"])
    for cell in plan.cells:
        run_cell(cell, plan)
    results = report.finish(plan)
    sides = report.side_by_side(results).set_index("method")
    assert list(sides["hours paper"]) == ["not reported", "23.08", "11.52", "13.13", "15.25"]
    assert list(sides["memory MB paper"]) == ["not reported", "10334", "9822", "11862", "12178"]
    baseline = next(r for r in results if r["cell"] == "w4a8-baseline")
    spent = sum(v for k, v in baseline["seconds"].items() if k not in ("sample", "evaluate"))
    assert sides["hours ours"]["baseline: direct quantization + AdaRound"] == f"{spent / 3600:.3f}"
    assert list(sides["hours ours"]).count("-") == 4  # full precision and what was not run
    assert "iterations paper" not in sides
    full = next(r for r in results if r["cell"] == "bedrooms-fp")
    sizes = sides.loc["baseline: direct quantization + AdaRound", ["size paper", "size ours"]]
    ours = baseline["size_bytes"]
    assert list(sizes) == [
        "148.4 MB (14.2%)",
        f"{ours / 1e6:.1f} MB ({ours / full['size_bytes']:.1%})",
    ]
    assert "weights trained" not in report.frame(results)  # of no row that was run


def test_iterations_and_weights_that_are_trained(tiny_plan):
    """Table 8: the paper's iterations and ours; the share of the weights is what finetuning logged."""
    plan = tiny_plan("table8", cells=["w4a4-quest"])
    made = run_cell(plan.cells[0], plan)
    results = report.finish(plan)
    sides = report.side_by_side(results)
    row = sides[
        (sides["method"] == "QuEST, runs in integers (ours)") & (sides["bits"] == "W4A4")
    ].iloc[0]
    assert (row["iterations paper"], row["iterations ours"]) == (
        "2200",
        "4",
    )  # smoke: two of each stage
    assert "size ours" not in sides  # the paper's Table 8 has no sizes
    trained = report.frame(results).loc[row.name, "weights trained"]
    assert (
        trained == f"{made['per_seed'][0]['finetune']['trained_fraction']:.0%}" and trained != "0%"
    )


def test_numbers_that_are_not_available(tiny_plan):
    plan = tiny_plan("table7")
    sides = report.side_by_side(report.load_results(plan)).set_index("method")
    assert (
        sides["FID paper"]["CMA with L_G"] == "not available"
        and sides["FID paper"]["TLA without L_G"] == "8.99"
    )
    assert (
        sides["FID paper"]["full precision"]
        == sides["FID paper"]["TLA, L_G alone"]
        == "not in the paper"
    )
    assert plots.metric_figure(report.load_results(plan)).axes


def test_data_sets_are_named_where_a_table_has_several():
    plan = make_plan("table9", scale="paper", dry=True)
    assert set(report.frame(report.load_results(plan))["data"]) == {"bedrooms", "imagenet"}
    plan = make_plan("table4", scale="paper", dry=True)
    assert "data" not in report.frame(report.load_results(plan))


def test_an_older_result_without_a_metric_of_today(tiny_plan):
    plan = tiny_plan()
    empty = empty_result(plan.cells[0], plan, "done", None)
    older = empty | {
        "metrics": {k: v for k, v in empty["metrics"].items() if k != "inception_score"}
    }
    del older["dataset"]
    report.write_json(plan.folder / f"{plan.cells[0].id}.json", older)
    result = report.load_results(plan)[0]
    assert (result["status"], result["dataset"]) == ("done", "bedrooms")
    assert result["metrics"]["inception_score"]["value"] is None
