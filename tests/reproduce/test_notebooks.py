"""The notebooks as they are committed: parameters, no logic, outputs with the commit that made them, one way through all."""

from __future__ import annotations

import ast
import inspect
import re
from html import escape
from pathlib import Path

import nbformat
import pytest

from reproduce.notebooks import NOTEBOOKS
from reproduce.plan import make_plan
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.tables.registry import all_tables

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LINES_OF_A_FUNCTION = 4
LINES_OF_A_CELL = 25
NEXT = re.compile(r"^\*\*Next notebook:\*\* \[(.+?)\]\((.+?)\)")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in read(path).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_opens_with_a_question_and_has_parameters(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert "?" in cells[0].source and re.search(r"second|minute", cells[0].source), (
        "no question, or no runtime"
    )
    (parameters,) = (c for c in cells if "parameters" in c.metadata.get("tags", []))
    assert parameters is code(path)[0] or parameters.source == code(path)[0].source, (
        "parameters come first"
    )
    tree = ast.parse(parameters.source)
    assert all(isinstance(node, ast.Assign) for node in tree.body), (
        "a parameters cell holds assignments alone"
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_holds_no_logic(path):
    for cell in code(path):
        tree = ast.parse(cell.source)
        for node in ast.walk(tree):
            assert not isinstance(
                node, ast.ClassDef | ast.Try | ast.While | ast.AsyncFunctionDef
            ), cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LINES_OF_A_FUNCTION, (
                    f"{node.name} belongs in the library"
                )
        assert len(cell.source.splitlines()) <= LINES_OF_A_CELL


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_outputs_come_from_a_clean_commit_named_in_it(path):
    cells = code(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), (
        "not executed once, from top to bottom"
    )
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    text = "".join("".join(o.get("text", "")) for o in outputs)
    assert "with changes" not in text
    if "nothing was made" not in text:
        assert re.search(r"commit [0-9a-f]{40}", text), "no commit named"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_pictures_and_tables_are_in_it(path):
    kinds = {kind for c in code(path) for o in c.outputs for kind in o.get("data", {})}
    assert {"image/png", "text/html"} <= kinds


def test_next_links_lead_through_all_notebooks_once():
    way, path = [], NOTEBOOKS / "00_tour.ipynb"
    while path is not None:
        assert path.is_file() and path not in way, path
        way.append(path)
        last = NEXT.match(read(path).cells[-1].source)
        assert last is None or last[1] == last[2]
        path = None if last is None else NOTEBOOKS / last[2]
    assert sorted(way) == PATHS


def test_links_between_notebooks_and_to_files_lead_somewhere():
    for path in PATHS:
        for cell in read(path).cells:
            for target in re.findall(
                r"\]\(([^)#\s]+)\)", cell.source if cell.cell_type == "markdown" else ""
            ):
                assert target.startswith("https://") or (NOTEBOOKS / target).exists(), (
                    f"{path.name}: {target}"
                )


@pytest.mark.parametrize("table", all_tables().values(), ids=lambda t: t.name)
def test_a_table_s_notebook_takes_every_choice_of_a_plan(table):
    """The parameters that papermill sets are all there, the plan is made of the right table, and its default cells exist."""
    cells = code(NOTEBOOKS / table.notebook)
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(cells[0].source).body}
    choices = set(inspect.signature(make_plan).parameters) - {"table", "dry"}
    assert {name.lower() for name in values} == choices
    assert values["SCALE"] == "smoke" and all(table.cell(c) for c in values["CELLS"] or [])
    assert f'make_plan("{table.name}", **choices)' in cells[1].source
    assert f"`make {table.target}`" in read(NOTEBOOKS / table.notebook).cells[0].source


@pytest.mark.parametrize("table", all_tables().values(), ids=lambda t: t.name)
def test_the_committed_run_is_of_this_notebook_and_shows_the_committed_rows(table):
    """`python -m reproduce TABLE --stored` brings it up to date."""
    made = read(ROOT / "results" / "mini" / table.name / table.notebook)
    cells = [c for c in made.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    assert [(c.cell_type, c.source) for c in cells] == [
        (c.cell_type, c.source) for c in read(NOTEBOOKS / table.notebook).cells
    ]
    shown = "".join(
        "".join(o.get("data", {}).get("text/html", ""))
        for c in cells
        if c.cell_type == "code"
        for o in c.outputs
    )
    _, results = report.committed(table.name, ROOT / "results")
    for data in (report.frame(results), report.side_by_side(results)):
        missing = {
            str(value)
            for row in data.values.tolist()
            for value in row
            if f"<td>{escape(str(value), quote=False)}</td>" not in shown
        }
        assert not missing
