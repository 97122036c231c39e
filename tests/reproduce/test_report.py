"""Tables and pictures of results."""

from __future__ import annotations

import json

import nbformat
import pandas as pd
import pytest
from made_results import made_result, made_table

from reproduce import notebooks
from reproduce.choices import Choices
from reproduce.figures import plots, strips, style
from reproduce.pipeline import run_row
from reproduce.plan import make_plan
from reproduce.reporting import printed, report
from reproduce.table_results import TableResults
from reproduce.tables.base import OURS
from reproduce.tables.registry import all_tables
from reproduce.verdicts import PAIRED

ROWS = ["bedrooms-fp", "bedrooms-w4a4-minmax", "bedrooms-w4a4-q-diffusion"]


def test_tables_and_pictures(tiny_plan, tmp_path):
    """Of real results of the tiny model."""
    plan = tiny_plan(rows=ROWS, seeds=[0, 1])
    for row in plan.rows:
        run_row(row, plan)
    results = report.finish(plan)
    ours = report.frame(results)
    assert len(ours) == 25 and "IS" not in ours
    assert "±" in ours["FID"][0] and ours["FID"][1] == "not run"
    assert (plan.folder / "picture.png").stat().st_size > 5000
    for text in (printed.terminal(results), report.markdown(results), report.html(results)):
        assert "Q-Diffusion" in text and "not run yet" in " ".join(text.split())
    assert (plan.folder / "table.md").read_text() == report.markdown(results)
    assert (plan.folder / "table.html").read_text() == report.html(results)
    for name, figure in (
        ("a", plots.metric_figure(results)),
        ("b", plots.cost_figure(results)),
        ("c", strips.picture(results)),
    ):
        assert style.save(figure, tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_report_only_reads_the_results(tmp_path):
    plan = make_plan("table3", Choices(results=tmp_path), dry=True)
    path = plan.row_file("bedrooms-fp")
    made_result({"fid": [1.0]}, row="bedrooms-fp").write(path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    report.finish(plan)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    made = {"table.md", "table.html", "picture.png", "agreement.md", "agreement.json"}
    assert {p.name for p in plan.folder.iterdir()} == {path.name, *made}


def table3(**rows) -> TableResults:
    """Table 3 at mini scale with these rows, by the ends of their ids."""
    plan = make_plan("table3", Choices(), dry=True)
    made = {f"bedrooms-{end.replace('_', '-')}": result for end, result in rows.items()}
    return made_table(plan, made)


def test_the_papers_numbers_stand_beside_ours():
    sides = report.side_by_side(table3(w4a4_minmax=made_result({"fid": [1.0, 2.0]})))
    rows = sides.set_index(["bits", "method"])
    papers = rows["FID paper"]
    assert papers["32/32", "full precision"] == "2.95"
    assert papers["W4A4", "Q-Diffusion"] == "N/A"
    assert papers["W4A4", "EfficientDM"] == "10.60"
    assert papers["W4A4", "min-max PTQ"] == "-"
    assert "survey 8.92" in rows["FID others"]["W4A4", OURS]
    assert rows["FID here"]["W4A4", "min-max PTQ"] == "1.50 ± 0.71"


def test_verdicts_are_signs_and_numbers():
    """A sign for our order and one for the paper's; the difference and its p-value as numbers."""
    mine, base = made_result({"fid": [1.0, 1.2]}), made_result({"fid": [2.0, 2.6]})
    results = table3(w4a4_quest=mine, w4a4_q_diffusion=base, w4a4_quest_paper=base)
    sides = report.side_by_side(results).set_index(["bits", "method"])
    columns = ["against", "FID verdict", "FID difference", "FID p"]
    assert list(sides.loc[("W4A4", OURS), columns]) == ["Q-Diffusion", "▲ ✓", "-1.20", "0.0025"]
    same = sides.loc[("W4A4", "QuEST (paper's text)"), columns]
    assert list(same) == ["Q-Diffusion", "= ✗", "+0.00", "1"]
    assert list(sides.loc[("W8A8", OURS), columns]) == ["Q-Diffusion", "", "-", "-"]


def test_ours_comes_first_at_each_width():
    rows = [row for row, _ in table3().ordered()]
    for bits in ("W8A8", "W4A8", "W4A4"):
        labels = [row.label for row in rows if row.bits == bits]
        assert labels[:3] == [OURS, "QuEST (paper's text)", "QuEST (release)"]
    plan = make_plan("table6", Choices(), dry=True)  # each row adds a part to the one before
    assert [row for row, _ in made_table(plan, {}).ordered()] == list(plan.table.rows)


# ---- the terminal ----


@pytest.mark.parametrize("table", all_tables())
def test_a_report_fits_a_terminal(table):
    plan = make_plan(table, Choices(), dry=True)
    metrics = {"fid": [123.456, 98.1], "psnr_to_fp": [30.0, 31.0], PAIRED: [10.1, 12.2]}
    made = {row.id: made_result(metrics) for row in plan.table.rows}
    text = printed.terminal(made_table(plan, made))
    assert max(map(len, text.splitlines())) <= printed.WIDTH
    for row in plan.table.rows:
        assert set(row.label.split()) <= set(text.split())


def test_heads_stand_over_their_values():
    data = pd.DataFrame(
        {
            "bits": ["W8A8", "W4A4", "W4A4"],
            "method": ["a", "b", "a very long name of a method, on more than one line"],
            "FID here": ["1.50 ± 0.10", "100.25 ± 3.00", "not run"],
            "verdict": ["▲ ✓", "=", ""],
        }
    )
    head, _, first, _, second, third, rest = printed.aligned(data).splitlines()
    end = head.index("FID here") + len("FID here")
    assert first[:end].endswith("1.50 ± 0.10") and second[:end].endswith("100.25 ± 3.00")
    assert third[:end].endswith("not run")
    start = head.index("verdict")
    assert first[start:] == "▲ ✓" and second[start:] == "="
    assert third.split()[0] == "a" and second.split()[0] == "W4A4"  # bits stand once
    assert "a very long name of a method, on" in third and rest.strip() == "more than one line"


def test_columns_without_room_stand_below_with_the_names_again():
    data = pd.DataFrame({"method": ["a", "b"]} | {f"column {i:02}": ["1", "2"] for i in range(15)})
    first, second = printed.aligned(data).split("\n\n\n")[0].split("\n\nmethod")
    assert "column 00" in first and "column 14" in second and "b" in second.split()
    assert all(f"column {i:02}" in first + second for i in range(15))


def test_the_last_three_lines(tiny_plan):
    plan = tiny_plan(rows=ROWS[:1])
    for row in plan.rows:
        run_row(row, plan)
    report.finish(plan)
    ran, shows, look = printed.closing(TableResults.stored(plan), 100.0).splitlines()
    assert ran == "1 of 1 rows made at smoke scale in 1.7 min."
    assert "numbers mean nothing" in shows
    assert look == f"Look at: {plan.folder / 'picture.png'}"


def test_what_a_table_shows_is_chosen_by_the_numbers():
    low, high = made_result({PAIRED: [1.0, 1.1]}), made_result({PAIRED: [2.0, 2.3]})
    words = printed.closing(table3(w4a4_quest=low, w4a4_q_diffusion=high), 1.0)
    assert "QuEST (ours) W4A4 is better than Q-Diffusion" in words and "as in the paper" in words
    words = printed.closing(table3(w4a4_quest=high, w4a4_q_diffusion=low), 1.0)
    assert "is worse than Q-Diffusion" in words and "differs from the paper" in words
    assert "nothing, since no row has numbers" in printed.closing(table3(), 1.0)


def test_json_has_specification_result_and_verdicts():
    mine, base = made_result({"fid": [1.0, 1.2]}), made_result({"fid": [2.0, 2.5]})
    results = table3(w4a4_quest=mine, w4a4_q_diffusion=base)
    found = json.loads(printed.as_json(results))
    assert (found["table"], found["scale"]) == ("table3", "mini")
    rows = {row["specified"]["id"]: row for row in found["rows"]}
    quest = rows["bedrooms-w4a4-quest"]
    assert quest["specified"]["paper"] == {"fid": 5.64}
    assert quest["result"]["seeds"][1]["metrics"] == {"fid": 1.2}
    assert quest["metrics"]["fid"]["value"] == pytest.approx(1.1)
    assert quest["verdicts"]["fid"]["order"] == "better"
    assert quest["verdicts"]["fid"]["agrees"] is True
    assert rows["bedrooms-fp"]["result"]["status"] == "not run"


def test_figures_without_results():
    results = table3()
    assert not results.done
    for figure in (
        plots.metric_figure(results),
        plots.cost_figure(results),
        strips.picture(results),
    ):
        assert figure.axes
    assert "not measured" in [t.get_text() for t in plots.metric_figure(results).axes[1].texts]


@pytest.mark.parametrize(("worst", "scale"), [(15.0, "linear"), (40.0, "log")])
def test_axis_is_logarithmic_only_where_values_lie_far_apart(worst, scale):
    plan = make_plan("table3", Choices(), dry=True)
    made = {row.id: made_result({"fid": [worst]}) for row in plan.table.rows}
    made["bedrooms-fp"] = made_result({"fid": [2.0]})
    figure = plots.metric_figure(made_table(plan, made))
    assert figure.axes[1].get_xscale() == scale


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
    plan = tiny_plan("table6", rows=["bedrooms-fp", "w4a8-baseline"])
    full, baseline = (run_row(row, plan) for row in plan.rows)
    results = report.finish(plan)
    sides = report.side_by_side(results).set_index("method")
    assert list(sides["time paper"]) == ["-", "23.08 h", "11.52 h", "13.13 h", "15.25 h"]
    assert list(sides["memory MB paper"]) == ["-", "10334", "9822", "11862", "12178"]
    spent = sum(v for k, v in baseline.seconds.items() if k not in ("sample", "evaluate"))
    method = "baseline: direct quantization + AdaRound"
    assert sides["time here"][method] == f"{spent / 60:.1f} min"
    assert list(sides["time here"]).count("-") == 4  # full precision and what was not run
    assert "iterations paper" not in sides
    ours = baseline.size_bytes
    assert list(sides.loc[method, ["size paper", "size here"]]) == [
        "148.4 MB (14.2%)",
        f"{ours / 1e6:.1f} MB ({ours / full.size_bytes:.1%})",
    ]
    assert "trained" not in report.frame(results)  # of no row that was run


def test_iterations_and_weights_that_are_trained(tiny_plan):
    """Table 8: the share of the weights is what finetuning logged."""
    plan = tiny_plan("table8", rows=["w4a4-quest"])
    made = run_row(plan.rows[0], plan)
    results = report.finish(plan)
    sides = report.side_by_side(results)
    is_quest = (sides["method"] == OURS) & (sides["bits"] == "W4A4")
    row = sides[is_quest].iloc[0]
    # At smoke scale two iterations of each stage.
    assert (row["iterations paper"], row["iterations here"]) == ("2200", "4")
    assert "size here" not in sides  # the paper's Table 8 has no sizes
    trained = report.frame(results).loc[row.name, "trained"]
    assert trained == f"{made.seeds[0].trained_fraction:.0%}" and trained != "0%"


def test_a_table_of_our_own_tells_the_clip_score_of_prompts():
    """A table of the paper tells what its own table has."""
    names = ("after-paper", "table3", "table4", "table5")
    tables = {name: made_table(make_plan(name, Choices(), dry=True), {}) for name in names}
    told = {name: results.told for name, results in tables.items()}
    assert told == {
        "after-paper": ("clip_score",),
        "table3": (),
        "table4": ("inception_score",),
        "table5": ("clip_score",),
    }
    assert "CLIP score x100" in report.frame(tables["after-paper"])


def test_numbers_that_are_not_available():
    results = made_table(make_plan("table7", Choices(), dry=True), {})
    papers = report.side_by_side(results).set_index("method")["FID paper"]
    assert papers["CMA with L_G"] == "not available"
    assert papers["TLA without L_G"] == "8.99"
    assert papers["full precision"] == papers["TLA, L_G alone"] == "-"
    assert plots.metric_figure(results).axes


@pytest.mark.parametrize(
    ("table", "data"), [("table9", {"bedrooms", "imagenet"}), ("table4", None)]
)
def test_data_sets_are_named_where_a_table_has_several(table, data):
    results = made_table(make_plan(table, Choices(scale="paper"), dry=True), {})
    frame = report.frame(results)
    assert (set(frame["data"]) if "data" in frame else None) == data


def test_made_by_names_commit_and_changes():
    row = made_result({"fid": [1.0]})
    changed = {**row.provenance[0], "commit": "d" * 40, "dirty": True}
    other = made_result({"fid": [1.0]}, provenance=(changed,))
    results = table3(fp=row, w4a4_quest=row, w4a4_minmax=other)
    assert report.made_by(results).splitlines() == [
        f"made at commit {'c' * 40}, torch 2.0, A, 2 cores",
        f"made at commit {'d' * 40} with changes, torch 2.0, A, 2 cores",
    ]
    assert report.made_by(table3()) == "nothing was made"
