"""What is checked before long work, and where the notebook runs."""

from __future__ import annotations

import shutil

import nbformat
import numpy as np
import pytest
from PIL import Image

from questlib.errors import ConfigError, MetricError
from reproduce import pipeline, report, run
from reproduce.store import write_json

CELLS = ["bedrooms-fp", "bedrooms-w4a4-quest"]


def test_a_good_reference_passes(tiny_plan, tiny):
    run.preflight(tiny_plan(cells=CELLS))
    run.preflight(tiny_plan(cells=CELLS, reference=str(tiny / "reference")))


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
    says = {"size": "images are 64x64, the reference is 32x32", "few": "3 images are too few", "damaged": "damaged|not an"}
    with pytest.raises(MetricError, match=says.get(kind, "not an embedded model, a file or a folder")):
        run.preflight(tiny_plan(cells=CELLS, reference=str(reference)))
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").iterdir())


def test_mini_features_are_of_small_images(tiny_plan, monkeypatch):
    monkeypatch.setattr("questlib.sampling.image_size", lambda pipe: (256, 256))
    with pytest.raises(ConfigError, match="features mini: images of 64x64 only, .* draws 256x256"):
        run.preflight(tiny_plan(cells=CELLS))


def test_paths_mean_the_same_in_the_notebook(tiny_plan, tiny, tmp_path, monkeypatch):
    """The notebook runs where the command was given: a relative path was looked at there before the work."""
    shutil.copytree(tiny / "reference", tmp_path / "here" / "images")
    monkeypatch.chdir(tmp_path / "here")
    plan = tiny_plan(cells=CELLS, reference="images")
    run.preflight(plan)
    parameters = nbformat.v4.new_code_cell("REFERENCE = None", metadata={"tags": ["parameters"]})
    asks = nbformat.v4.new_code_cell("from pathlib import Path\nprint(REFERENCE, len(list(Path(REFERENCE).iterdir())))")
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, asks], metadata=kernel), tmp_path / plan.table.notebook)
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    run.execute(plan)
    made = nbformat.read(plan.folder / plan.table.notebook, as_version=4)
    assert made.cells[-1].outputs[0].text == "images 20\n"


def test_stored_rows_are_shown_and_nothing_is_run(tiny_plan, monkeypatch):
    """The real notebook, with a number that no run has; a row without a result says so, and no file of a row is new."""
    ran, shown = tiny_plan(cells=CELLS[:1]), tiny_plan(cells=CELLS, stored=True)
    path = ran.folder / f"{CELLS[0]}.json"
    result = pipeline.run_cell(ran.cells[0], ran)
    result["metrics"]["fid"] |= {"value": 123.25, "std": None}
    write_json(path, result)
    monkeypatch.setattr(pipeline, "SeedRun", lambda *args: pytest.fail("a row was run"))
    run.preflight(shown)
    results = run.run(shown)
    assert [r["status"] for r in results if r["cell"] in CELLS] == ["done", "not run"]
    assert report.frame(results)["FID"][0] == "123.25"
    notebook = (shown.folder / shown.table.notebook).read_text()
    assert "25 rows, 2 shown from their results" in notebook and "123.25" in notebook
    assert [p.name for p in shown.folder.glob("*.json")] == [path.name]


def test_a_notebook_that_opens_checkpoints_is_not_shown_from_rows_alone(tiny_plan):
    with pytest.raises(ConfigError, match="opens the rows' checkpoints, run them: make reproduce-figure2"):
        run.preflight(tiny_plan("figure2", stored=True))
