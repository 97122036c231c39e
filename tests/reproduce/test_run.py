"""What is checked before long work, and where the notebook runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from PIL import Image

from questlib.errors import ConfigError, MetricError
from questlib.versions import STAGE_VERSIONS
from reproduce import notebooks, pipeline
from reproduce.__main__ import main
from reproduce.choices import Choices
from reproduce.plan import make_plan
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.results import Status
from reproduce.table_results import TableResults

ROWS = ["bedrooms-fp", "bedrooms-w4a4-quest"]


def test_a_good_reference_passes(tiny_plan, tiny):
    notebooks.preflight(tiny_plan(rows=ROWS))
    notebooks.preflight(tiny_plan(rows=ROWS, reference=str(tiny / "reference")))


@pytest.mark.parametrize("kind", ["size", "few", "damaged", "absent"])
def test_a_wrong_reference_is_found_before_the_work(tiny_plan, tiny, tmp_path, kind):
    reference = tmp_path / "images"
    if kind == "size":
        reference.mkdir()
        for i, file in enumerate(sorted((tiny / "reference").iterdir())):
            Image.open(file).resize((32, 32)).save(reference / f"{i}.png")
    elif kind == "few":
        reference = tmp_path / "few.npz"
        np.savez(reference, np.zeros((3, 64, 64, 3), np.uint8))
    elif kind == "damaged":
        reference = tmp_path / "reference.npz"
        reference.write_text("not an npz")
    says = {
        "size": "images are 64x64, the reference is 32x32",
        "few": "3 images are too few",
        "damaged": "damaged|not an",
    }
    with pytest.raises(
        MetricError, match=says.get(kind, "not an embedded model, a file or a folder")
    ):
        notebooks.preflight(tiny_plan(rows=ROWS, reference=str(reference)))
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").iterdir())


def test_mini_features_are_of_small_images(tiny_plan, monkeypatch):
    monkeypatch.setattr(notebooks, "image_size", lambda pipe: (256, 256))
    with pytest.raises(ConfigError, match="features mini: images of 64x64 only, .* draws 256x256"):
        notebooks.preflight(tiny_plan(rows=ROWS))


def test_paths_mean_the_same_in_the_notebook(tiny_plan, tiny, tmp_path, monkeypatch):
    """The notebook runs in the folder of the command, where relative paths were checked."""
    shutil.copytree(tiny / "reference", tmp_path / "here" / "images")
    monkeypatch.chdir(tmp_path / "here")
    plan = tiny_plan(rows=ROWS, reference="images")
    notebooks.preflight(plan)
    parameters = nbformat.v4.new_code_cell("REFERENCE = None", metadata={"tags": ["parameters"]})
    asks = nbformat.v4.new_code_cell(
        "from pathlib import Path\nprint(REFERENCE, len(list(Path(REFERENCE).iterdir())))"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[parameters, asks], metadata=kernel),
        tmp_path / plan.table.notebook,
    )
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    notebooks.execute(plan)
    made = nbformat.read(plan.folder / plan.table.notebook, as_version=4)
    assert made.cells[-1].outputs[0].text == "images 20\n"


def test_stored_rows_are_shown_and_nothing_is_run(tiny_plan, tmp_path, monkeypatch):
    """The real notebook, with a number that no run has; no file of a row is new."""
    ran = tiny_plan(rows=ROWS[:1])
    result = pipeline.run_row(ran.rows[0], ran)
    (seed,) = result.seeds
    made_up = dataclasses.replace(seed, metrics=seed.metrics | {"fid": 123.25})
    path = ran.row_file(ROWS[0])
    dataclasses.replace(result, seeds=(made_up,)).write(path)
    shown = tiny_plan(rows=ROWS, stored=True)
    monkeypatch.setattr(pipeline, "SeedRun", lambda *args: pytest.fail("a row was run"))
    notebooks.preflight(shown)
    results = notebooks.run(shown)
    assert [results[row].status for row in ROWS] == [Status.DONE, Status.NOT_RUN]
    assert report.frame(results)["FID"][0] == "123.25"
    kept = shown.folder / shown.table.notebook
    notebook = kept.read_text()
    assert "25 rows, 2 shown, your own" in notebook and "123.25" in notebook
    assert {p.name for p in shown.folder.glob("*.json")} == {path.name, "agreement.json"}

    # Where it lies the notebook shows the rows beside it, and writes nothing.
    before = files(shown.results)
    again = papermill.execute_notebook(
        kept, tmp_path / "again.ipynb", cwd=shown.folder, progress_bar=False
    )
    assert "123.25" in nbformat.writes(again) and files(shown.results) == before


def files(folder: Path) -> dict[Path, int]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_published_rows_are_shown_where_there_are_no_own_ones(tmp_path, monkeypatch, capsys):
    """What is written then lies in runs/ of the command's folder, and the checkout stays as it is.

    With rows of one's own these are shown, and no published one beside them.
    """
    monkeypatch.chdir(tmp_path)
    published = files(ROOT / "results")
    assert main(["table7", "--stored"]) == 0
    assert "Not compared" not in capsys.readouterr().out
    assert files(ROOT / "results") == published
    folder = tmp_path / "runs" / "results" / "mini" / "table7"
    assert "the published ones" in (folder / "table07_global_loss.ipynb").read_text()
    assert (folder / "table.md").read_text() == report.markdown(
        report.committed("table7", ROOT / "results")
    )
    assert not list(folder.glob("*.json"))

    choices = Choices(results=tmp_path / "runs" / "results", stored=True)
    assert make_plan("table7", choices).is_published
    shutil.copy(ROOT / "results" / "mini" / "table7" / "w4a4-tla.json", folder)
    own = make_plan("table7", choices)
    assert not own.is_published and own.source == folder
    assert [row.id for row, _ in TableResults.stored(own).done] == ["w4a4-tla"]
    assert make_plan("table7", Choices(stored=True)).is_published  # a notebook's default


def test_a_run_reads_no_published_row(tmp_path):
    """Otherwise a table would mix rows of two runs."""
    plan = make_plan("table7", Choices(results=tmp_path, work=tmp_path / "work"))
    assert not TableResults.stored(plan).done
    assert plan.published is not None and plan.published.results == ROOT / "results"


def test_nothing_to_show_is_said_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        ConfigError,
        match="expected rows of table7 at paper scale, found none, .* run them: "
        "python -m reproduce table7 --scale paper",
    ):
        make_plan("table7", Choices(scale="paper", stored=True, results=tmp_path))


def test_only_rows_that_are_not_what_a_run_would_make_now_are_run(tiny_plan, monkeypatch):
    """Whether their artifacts are still there or not: a clone has results alone."""
    plan = tiny_plan(rows=ROWS)
    assert notebooks.unfinished(plan) == plan
    pipeline.run_row(plan.rows[0], plan)
    result = pipeline.run_row(plan.rows[1], plan)
    shutil.rmtree(plan.work)
    assert notebooks.unfinished(plan) == plan.choose(stored=True)

    path = plan.row_file(ROWS[1])
    (seed,) = result.seeds
    conditions = result.conditions
    other_model = dataclasses.replace(conditions.model, id="other")
    for change in (
        {"status": Status.FAILED, "seeds": ()},
        {"conditions": dataclasses.replace(conditions, features="inception")},
        {"conditions": dataclasses.replace(conditions, model=other_model)},
        {"conditions": dataclasses.replace(conditions, reference="other")},
        {"seeds": (with_artifact(seed, "checkpoint"),)},
        {"seeds": ()},
    ):
        dataclasses.replace(result, **change).write(path)
        assert [row.id for row in notebooks.unfinished(plan).rows] == ROWS[1:], change

    # Another seed, and a score of another clone's files, make no difference.
    seeds = (with_artifact(seed, "evaluate"), dataclasses.replace(seed, seed=7))
    dataclasses.replace(result, seeds=seeds).write(path)
    assert notebooks.unfinished(plan).choices.stored
    monkeypatch.setitem(STAGE_VERSIONS, "sample", 2)
    assert notebooks.unfinished(plan) == plan


def with_artifact(seed, stage: str):
    """The seed's result with another artifact of one stage."""
    return dataclasses.replace(seed, artifacts=seed.artifacts | {stage: "0"})


def test_rows_whose_checkpoints_a_notebook_opens_are_always_run(tiny_plan):
    plan = tiny_plan("figure2")
    for row in plan.rows:
        pipeline.run_row(row, plan)
    assert notebooks.unfinished(plan) == plan


@pytest.mark.parametrize(
    "choices", [{"stored": True}, {"seeds": [3]}, {"keep_seeds": True}, {"features": "mini"}]
)
def test_what_is_unfinished_is_asked_of_the_rows_that_the_scale_has(tiny_plan, choices):
    with pytest.raises(
        ConfigError,
        match="--unfinished: expected no choices but of scale, rows and engine, found python",
    ):
        notebooks.unfinished(tiny_plan(rows=ROWS).choose(**choices))
