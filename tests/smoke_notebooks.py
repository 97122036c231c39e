"""Copies of the notebooks that run at smoke scale, for nbval.

    python tests/smoke_notebooks.py FOLDER

papermill's injected cell sets what is below. Rows that share artifacts make them once, in FOLDER.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from reproduce.notebooks import NOTEBOOKS
from reproduce.tables.registry import all_tables

# Of the tables with many rows a few, by notebook; of the others all.
ROWS = {
    "table03_bedrooms.ipynb": [
        "bedrooms-fp",
        "bedrooms-w4a4-minmax",
        "bedrooms-w4a4-q-diffusion",
        "bedrooms-w4a4-efficientdm",
        "bedrooms-w4a4-quest",
    ],
    "table03_churches.ipynb": [
        "churches-fp",
        "churches-w4a4-q-diffusion",
        "churches-w4a4-efficientdm",
        "churches-w4a4-quest",
    ],
    "table04_imagenet.ipynb": [
        "imagenet-fp",
        "imagenet-w4a4-q-diffusion",
        "imagenet-w4a4-ptq-d",
        "imagenet-w4a4-quest",
    ],
    "table05_stable_diffusion.ipynb": ["sd-fp", "sd-w4a4-q-diffusion", "sd-w4a4-quest"],
    "table09_tfmq_dm.ipynb": ["bedrooms-w4a8-tfmq-dm", "bedrooms-w4a8-quest"],
    "table10_more_metrics.ipynb": [
        "bedrooms-w4a4-q-diffusion",
        "bedrooms-w4a4-ptq-d",
        "bedrooms-w4a4-quest",
    ],
    "30_ablation.ipynb": [
        "fp",
        "w4a4-quest",
        "w4a4-one-group",
        "w4a4-not-finetuned",
        "w4a4-q-diffusion-groups",
        "fp-plms",
        "w4a4-plms",
    ],
    "31_budget.ipynb": [
        "bedrooms-fp",
        "bedrooms-w4a4-q-diffusion",
        "bedrooms-w4a4-quest-tenth",
        "bedrooms-w4a4-quest",
        "bedrooms-w4a4-quest-tenfold",
    ],
    "40_dit.ipynb": ["dit-fp", "dit-w4a4-q-diffusion", "dit-w4a4-efficientdm", "dit-w4a4-quest"],
    "41_after_the_paper.ipynb": [
        "bedrooms-fp",
        "bedrooms-w4a4-quest",
        "bedrooms-w4a4-svdquant",
        "bedrooms-w4a4-rotation-quest",
        "bedrooms-w4a4-mixdq",
    ],
}
OTHERS: dict[str, dict[str, Any]] = {
    "00_tour.ipynb": {"SCALE": "smoke", "IMAGES": 16},
    "10_integer_engine.ipynb": {},
    "20_quantize_your_own_pipeline.ipynb": {"SCALE": "smoke", "TRAJECTORIES": 8},
}
# nbval compares outputs, and would not see a row that failed.
CHECK = 'assert run.statuses() == {"done": len(run.plan.rows)}, run.statuses()'


def smoke_parameters(name: str, folder: Path) -> dict[str, Any]:
    """The parameters that a notebook gets; a table's results and artifacts go to `folder`."""
    if name in OTHERS:
        return OTHERS[name]
    rows = {"ROWS": ROWS[name]} if name in ROWS else {}
    folders = {"RESULTS": str(folder / "results"), "WORK": str(folder / "work")}
    return {"SCALE": "smoke", "STORED": False} | rows | folders


def write_copies(folder: Path) -> None:
    """Write the copies to a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tables = {table.notebook for table in all_tables().values()}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        parameters = smoke_parameters(path.name, folder.resolve())
        notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
        if path.name in tables:
            place = next(i for i, c in enumerate(notebook.cells) if c.source == "run.execute()")
            notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(CHECK))
        nbformat.write(notebook, folder / path.name)


if __name__ == "__main__":
    write_copies(Path(sys.argv[1]))
