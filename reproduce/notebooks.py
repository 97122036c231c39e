"""Runs a table: its notebook by papermill, with checks before and a report after."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
from filelock import FileLock
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from questlib.diffusion.sampling import image_size
from questlib.distributed import chosen_device
from questlib.errors import ConfigError, QuestError, StorageError
from questlib.files import STORAGE, atomic_path
from questlib.integer.engines import ENGINES as INTEGER_ENGINES
from questlib.integer.engines import choose_engine
from reproduce import timing
from reproduce.choices import Choices
from reproduce.evaluation.clip_score import coco_prompts, load_clip
from reproduce.evaluation.features import InceptionFeatures, MiniFeatures
from reproduce.evaluation.reference import open_reference
from reproduce.kept_seeds import kept_result
from reproduce.models.loading import load_pipeline
from reproduce.opening import repository, write_opening
from reproduce.pipeline import is_current
from reproduce.plan import Plan
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.seed_run import load
from reproduce.table_results import TableResults

NOTEBOOKS = ROOT / "notebooks"
QUIET = ["--log-level=ERROR"]  # kernels warn of TCP, which does not leave this machine


def preflight(plan: Plan) -> None:
    """Check what can be known before long work.

    The device is there, the model loads, the features have weights, reference and captions can be
    read, the engine runs here, and kept seeds fit the plan.

    Raises:
        QuestError: one of these is not so.
    """
    source_of(plan)
    if plan.choices.stored:
        return
    chosen_device(plan.choices.device)
    rows = [row for row in plan.rows if plan.missing(row) is None]
    settings = [plan.setting(row) for row in rows]
    models = {s.model for s in settings if s.model is not None}
    sizes = {model: image_size(load_pipeline(model)) for model in models}
    for model, reference, features in {
        (s.model, s.reference, s.features or plan.scale.features)
        for s in settings
        if s.model is not None and s.reference is not None
    }:
        if features == "mini" and sizes[model] != (MiniFeatures.SIZE, MiniFeatures.SIZE):
            found = "x".join(map(str, sizes[model]))
            raise ConfigError(
                f"features mini: images of {MiniFeatures.SIZE}x{MiniFeatures.SIZE} only, "
                f"{model} draws {found}"
            )
        open_reference(reference, features, size=sizes[model])  # checked, not taken
    for captions, count, clip in {
        (s.captions, s.samples_per_seed, s.clip) for s in settings if s.captions is not None
    }:
        coco_prompts(captions, count)
        load_clip(clip)
    if settings and plan.engine in INTEGER_ENGINES:
        choose_engine(plan.engine)
    if plan.choices.keep_seeds:
        for row, setting in zip(rows, settings, strict=True):
            if setting.model is not None:
                kept_result(row, plan, load(setting.model, plan.engine)[1])
    if any(s.features == "inception" for s in settings):
        InceptionFeatures("preflight", ["2048"])


def unfinished(plan: Plan) -> Plan:
    """The plan with only the rows whose results are not what a run would make now.

    When there is no such row, all are shown as they are.

    Raises:
        ConfigError: more than scale, rows and engine was chosen.
    """
    if plan.choices.stored or not plan.as_it_is:
        raise ConfigError(
            f"--unfinished: expected no choices but of scale, rows and engine, found {plan.command}"
        )
    left = [
        row.id for row in plan.rows if plan.table.opens_checkpoints or not is_current(row, plan)
    ]
    if not left:
        return plan.choose(stored=True)
    return plan if len(left) == len(plan.rows) else plan.choose(rows=left)


def run(plan: Plan) -> TableResults:
    """Execute the plan's notebook and write the table's files. Progress goes to stderr."""
    fresh = not any(plan.work.glob("*/*/key.json"))  # no artifacts of an earlier run
    start = time.time()
    execute(plan)
    results = report.finish(plan)
    timing.record_time(results, time.time() - start, fresh)
    return results


def execute(plan: Plan) -> None:
    """Execute the plan's notebook by papermill; keep it beside the results as .ipynb and .html.

    The kept notebook shows, where it lies, the rows beside it.
    """
    source = source_of(plan)
    target = plan.folder / plan.table.notebook
    there = plan.choose(results=plan.results.resolve(), work=plan.work.resolve())

    # papermill writes as it goes. The results get the notebook when it is whole.
    partial = plan.work / f"{plan.table.name}-{plan.scale.name}.ipynb"
    # A second run of the same table waits: it would make the same rows in the same folder.
    with FileLock(partial.with_suffix(".lock")):
        parameters = there.choices.parameters(papermill.inspect_notebook(str(source)))
        chosen = parameterize_notebook(load_notebook_node(str(source)), parameters)
        _write(partial, nbformat.writes(chosen))
        try:
            papermill.execute_notebook(
                str(partial),
                str(partial),
                kernel_name="python3",  # in the folder of the command: paths may be relative
                extra_arguments=QUIET,
                progress_bar=False,
                log_output=False,
                stdout_file=sys.stderr,
                stderr_file=sys.stderr,
            )
        except PapermillExecutionError as error:
            raise_own(error)
            raise
        except DeadKernelError as error:
            raise QuestError(
                f"{plan.table.notebook}: its kernel has ended, which most often the system does "
                "for lack of memory; finished work is kept, the same command goes on from it"
            ) from error
        made = load_notebook_node(str(partial))
        partial.unlink()
    shown = Choices(
        scale=plan.scale.name,
        rows=plan.choices.rows,
        engine=plan.choices.engine,
        stored=True,
        results=Path("../.."),
    )
    made = parameterize_notebook(
        made,
        shown.parameters(["SCALE"]),
        comment="Opened again, this notebook shows the rows beside it.",
    )
    notebook = without_machine(made, plan)
    _write(target, nbformat.writes(notebook) + "\n")
    _write(target.with_suffix(".html"), HTMLExporter().from_notebook_node(notebook)[0])


def source_of(plan: Plan) -> Path:
    """The plan's notebook. ConfigError where the package was installed without notebooks."""
    source = NOTEBOOKS / plan.table.notebook
    if not source.is_file():
        raise ConfigError(
            f"expected the notebook {source}; tables run in a checkout of the repository: "
            "install it by pip install -e there"
        )
    return source


def raise_own(error: PapermillExecutionError) -> None:
    """Raise what a notebook has raised where a user can do something about it: in one line.

    The kernel tells an error's name and text alone.
    """
    if error.ename in {kind.__name__ for kind in kinds_of(QuestError)}:
        raise QuestError(error.evalue) from error
    if error.ename == "OSError" and any(os.strerror(n) in error.evalue for n in STORAGE):
        raise StorageError(f"cannot write: {error.evalue}; finished work is kept") from error


def kinds_of(kind: type[Exception]) -> Iterator[type[Exception]]:
    """A class of errors and all that are made of it."""
    yield kind
    for other in kind.__subclasses__():
        yield from kinds_of(other)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def without_machine(notebook: NotebookNode, plan: Plan) -> NotebookNode:
    """The notebook without what differs from run to run or from machine to machine.

    These are progress bars, warnings, papermill's times and cell ids, and paths.
    """
    places = {
        str(plan.results.resolve()): "results",
        str(plan.work.resolve()): "runs",
        str(ROOT): ".",
    }
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected"  # papermill's own is a random one
        _drop_stderr(cell)
    text = nbformat.writes(notebook)
    for path, name in places.items():
        text = text.replace(json.dumps(path)[1:-1], name)
    return nbformat.reads(text, as_version=4)


def _drop_stderr(cell: NotebookNode) -> None:
    """Remove progress bars and warnings."""
    if cell.cell_type == "code":
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def execute_in_place(paths: list[Path]) -> None:
    """Run notebooks with their own parameters and keep the outputs in them.

    Raises:
        ConfigError: a path that is no file.
    """
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"notebooks: expected a notebook, found no file {path}")
    for path in paths:
        print(f"executing {path.name}", file=sys.stderr)
        notebook = nbformat.read(path, as_version=4)
        write_opening(notebook, path.name, repository())
        NotebookClient(
            notebook,
            timeout=1200,
            kernel_name="python3",
            extra_arguments=QUIET,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
            _drop_stderr(cell)
        text = nbformat.writes(notebook).replace(json.dumps(str(ROOT))[1:-1], ".")
        _write(path, text + "\n")
