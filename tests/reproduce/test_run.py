"""What is checked before long work, and where the notebook runs."""

from __future__ import annotations

import dataclasses
import shutil

import nbformat
import numpy as np
import pytest
from PIL import Image

from questlib.errors import ConfigError, MetricError
from questlib.versions import STAGE_VERSIONS
from reproduce import notebooks, pipeline
from reproduce.reporting import report
from reproduce.results import Status

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


def test_stored_rows_are_shown_and_nothing_is_run(tiny_plan, monkeypatch):
    """The real notebook, with a number that no run has; no file of a row is new."""
    ran = tiny_plan(rows=ROWS[:1])
    shown = tiny_plan(rows=ROWS, stored=True)
    result = pipeline.run_row(ran.rows[0], ran)
    (seed,) = result.seeds
    made_up = dataclasses.replace(seed, metrics=seed.metrics | {"fid": 123.25})
    path = ran.row_file(ROWS[0])
    dataclasses.replace(result, seeds=(made_up,)).write(path)
    monkeypatch.setattr(pipeline, "SeedRun", lambda *args: pytest.fail("a row was run"))
    notebooks.preflight(shown)
    results = notebooks.run(shown)
    assert [results[row].status for row in ROWS] == [Status.DONE, Status.NOT_RUN]
    assert report.frame(results)["FID"][0] == "123.25"
    notebook = (shown.folder / shown.table.notebook).read_text()
    assert "25 rows, 2 shown from their results" in notebook and "123.25" in notebook
    assert [p.name for p in shown.folder.glob("*.json")] == [path.name]


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
        notebooks.unfinished(tiny_plan(rows=ROWS, **choices))


def test_a_notebook_that_opens_checkpoints_is_not_shown_from_rows_alone(tiny_plan):
    with pytest.raises(
        ConfigError, match="opens the rows' checkpoints, run them: make reproduce-figure2"
    ):
        notebooks.preflight(tiny_plan("figure2", stored=True))
