"""Runs a table: its notebook by papermill, with the cells' products cached, then the report."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from questlib.errors import ConfigError
from reproduce import timing
from reproduce.plan import Plan
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.results import kept_result
from reproduce.store import write_atomically

NOTEBOOKS = ROOT / "notebooks"


def preflight(plan: Plan) -> None:
    """What can be known before long work: the given model loads, the given features have weights, the reference exists."""
    if plan.stored:
        if plan.table.opens_checkpoints:
            raise ConfigError(
                f"--stored: {plan.table.notebook} opens the rows' checkpoints, run them: make {plan.table.target}"
            )
        return
    settings = [plan.setting(cell) for cell in plan.cells if plan.missing(cell) is None]
    if not settings:
        return
    from questlib.diffusion.sampling import image_size
    from questlib.integer.engines import choose_engine
    from reproduce.evaluation.clip_score import coco_prompts, load_clip
    from reproduce.evaluation.features import InceptionFeatures, MiniFeatures
    from reproduce.evaluation.reference import open_reference
    from reproduce.models.loading import load_pipeline
    from reproduce.pipeline import load

    sizes = {model: image_size(load_pipeline(model)) for model in {s.model for s in settings}}
    for model, reference, features in {
        (s.model, s.reference, s.features) for s in settings if s.reference is not None
    }:
        if features == "mini" and sizes[model] != (MiniFeatures.SIZE, MiniFeatures.SIZE):
            found = "x".join(map(str, sizes[model]))
            raise ConfigError(
                f"features mini: images of {MiniFeatures.SIZE}x{MiniFeatures.SIZE} only, {model} draws {found}"
            )
        open_reference(reference, features, size=sizes[model])  # checked, not taken
    for captions, count, clip in {
        (s.captions, s.samples_per_seed, s.clip) for s in settings if s.captions is not None
    }:
        coco_prompts(captions, count)
        load_clip(clip)
    if plan.engine != "fake":
        choose_engine(plan.engine)
    for cell in plan.cells if plan.keep_seeds else ():
        if plan.missing(cell) is None:
            kept_result(cell, plan, load(plan.setting(cell).model, plan.engine)[1])
    if any(s.features == "inception" for s in settings):
        InceptionFeatures("preflight", ["2048"])


def unfinished(plan: Plan) -> Plan:
    """Only the rows whose results are not what a run would make now; shown as they are, when there is none such.

    ConfigError if more than scale, rows and engine was chosen.
    """
    if plan.stored or not plan.as_it_is:
        raise ConfigError(
            f"--unfinished: expected no choices but of scale, cells and engine, found {plan.command}"
        )
    from reproduce.pipeline import is_current

    left = tuple(
        cell for cell in plan.cells if plan.table.opens_checkpoints or not is_current(cell, plan)
    )
    return replace(plan, cells=left) if left else replace(plan, stored=True)


def run(plan: Plan) -> list[dict[str, Any]]:
    """Execute the plan's notebook; keep all beside the results. Progress goes to stderr."""
    fresh = not any(plan.work.glob("*/*/key.json"))  # nothing of an earlier run to go on from
    start = time.time()
    execute(plan)
    results = report.finish(plan)
    timing.record_time(plan, results, time.time() - start, fresh)
    return results


def execute(plan: Plan) -> None:
    """The plan's notebook by papermill, kept beside the results as .ipynb and .html."""
    source = NOTEBOOKS / plan.table.notebook
    target = plan.folder / plan.table.notebook
    parameters = {
        "SCALE": plan.scale.name,
        "RESULTS": str(plan.results.resolve()),
        "WORK": str(plan.work.resolve()),
        "CELLS": [c.id for c in plan.cells] if len(plan.cells) < len(plan.table.cells) else None,
        "SEEDS": list(plan.seeds) if plan.seeds != plan.scale.seeds else None,
        "FEATURES": plan.features,
        "MODEL": plan.model,
        "REFERENCE": plan.reference,
        "CAPTIONS": plan.captions,
        "ENGINE": plan.engine if plan.engine != "fake" else None,
        "KEEP_SEEDS": plan.keep_seeds,
        "STORED": plan.stored,
    }
    partial = (
        plan.work / f"{plan.table.name}-{plan.scale.name}.ipynb"
    )  # papermill writes as it goes; results get the whole
    papermill.execute_notebook(
        str(source),
        str(partial),
        parameters=parameters,
        kernel_name="python3",  # in this folder: paths may be relative
        progress_bar=False,
        log_output=False,
        stdout_file=sys.stderr,
        stderr_file=sys.stderr,
    )
    notebook = without_machine(nbformat.read(partial, as_version=4), plan)
    write_atomically(target, nbformat.writes(notebook) + "\n")
    write_atomically(target.with_suffix(".html"), HTMLExporter().from_notebook_node(notebook)[0])
    partial.unlink()


def without_machine(notebook: NotebookNode, plan: Plan) -> NotebookNode:
    """The notebook without progress bars and warnings (stderr), papermill's times, and this machine's paths."""
    places = {
        str(plan.results.resolve()): "results",
        str(plan.work.resolve()): "runs",
        str(ROOT): ".",
    }
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    text = nbformat.writes(notebook)
    for path, name in places.items():
        text = text.replace(json.dumps(path)[1:-1], name)
    return nbformat.reads(text, as_version=4)


def execute_in_place(paths: list[Path]) -> None:
    """Run notebooks with their own defaults (smoke) and keep the outputs in them, for `make notebooks`."""
    from nbclient import NotebookClient

    for path in paths:
        print(f"executing {path.name}", file=sys.stderr)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        text = nbformat.writes(notebook).replace(json.dumps(str(ROOT))[1:-1], ".")
        write_atomically(path, text + "\n")
