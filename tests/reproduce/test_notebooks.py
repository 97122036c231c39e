"""The notebooks as committed: parameters, no logic, outputs with their commit, one way through."""

from __future__ import annotations

import ast
import re
from html import escape
from pathlib import Path

import nbformat
import pytest

import reproduce
from reproduce.notebooks import NOTEBOOKS
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.tables.registry import all_tables

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LINES_OF_A_FUNCTION = 4
LINES_OF_A_CELL = 25
LINES_OF_A_TABLE = 14  # of code, without the parameters
NEXT = re.compile(r"^\*\*Next notebook:\*\* \[(.+?)\]\((.+?)\)")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def code_lines(cell: nbformat.NotebookNode) -> list[str]:
    """Lines that are neither empty nor a comment."""
    lines = [line.strip() for line in cell.source.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_opens_with_a_question_and_has_parameters(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert "?" in cells[0].source, "no question"
    assert re.search(r"second|minute", cells[0].source), "no runtime"
    tagged = [cell for cell in code(path) if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code(path)[:1], "parameters come first"
    body = ast.parse(tagged[0].source).body
    assert all(isinstance(node, ast.Assign) for node in body), "parameters are assignments alone"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_holds_no_logic(path):
    for cell in code(path):
        for node in ast.walk(ast.parse(cell.source)):
            forbidden = ast.ClassDef | ast.Try | ast.While | ast.AsyncFunctionDef
            assert not isinstance(node, forbidden), cell.source
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno
                assert length < LINES_OF_A_FUNCTION, f"{node.name} belongs in the library"
    for cell in code(path)[1:]:  # after the parameters
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
def test_a_table_is_one_object(table, tmp_path):
    """Its parameters are choices, and all it shows comes from what `reproduce.notebook` made."""
    parameters, *cells = code(NOTEBOOKS / table.notebook)
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(parameters.source).body}
    assert values.keys() <= {"SCALE", "ROWS"} and values["SCALE"] == "smoke"
    folders = {"RESULTS": str(tmp_path), "WORK": str(tmp_path)}
    run = reproduce.notebook(table.name, values | folders)
    assert run.plan.table is table and repr(run) == run.plan.words
    asked = values.get("ROWS", [row.id for row in table.rows])
    assert [row.id for row in run.plan.rows] == asked

    assert code_lines(cells[0]) == [
        "import reproduce",
        f'run = reproduce.notebook("{table.name}", globals())',
        "run",
    ]
    lines = [line for cell in cells for line in code_lines(cell)]
    assert len(lines) <= LINES_OF_A_TABLE
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "run":
                    assert hasattr(type(run), node.attr), node.attr
    assert {"run.execute()", "run.statuses()", "run.rows()", "run.picture()"} <= set(lines)
    assert lines[-2:] == ["run.conditions()", "run.verdicts()"]
    assert f"`make {table.target}`" in read(NOTEBOOKS / table.notebook).cells[0].source


@pytest.mark.parametrize("table", all_tables().values(), ids=lambda t: t.name)
def test_the_committed_run_is_of_this_notebook_and_shows_the_committed_rows(table):
    """`python -m reproduce TABLE --stored` brings it up to date."""
    made = read(ROOT / "results" / "mini" / table.name / table.notebook)
    cells = [c for c in made.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    committed = read(NOTEBOOKS / table.notebook).cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in committed]
    outputs = [output for c in cells if c.cell_type == "code" for output in c.outputs]
    shown = "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    results = report.committed(table.name, ROOT / "results")
    for data in (report.frame(results), report.side_by_side(results)):
        values = {str(value) for row in data.values.tolist() for value in row}
        assert not {v for v in values if f"<td>{escape(v, quote=False)}</td>" not in shown}
