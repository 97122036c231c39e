"""The notebooks as committed: parameters, no logic, outputs with their commit, one way through."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import nbformat
import pytest
from smoke_notebooks import smoke_parameters

import reproduce
from reproduce.notebooks import NOTEBOOKS
from reproduce.opening import repository, write_opening
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.tables.registry import all_tables

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LINES_OF_A_FUNCTION = 4
LINES_OF_A_CELL = 25
LINES_OF_A_TABLE = 16  # of code, without the parameters
NEXT = re.compile(r"^\*\*Next notebook:\*\* \[(.+?)\]\((.+?)\)")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def parameters(path: Path) -> dict[str, object]:
    """The names that a notebook's cell of parameters sets, with their values."""
    (cell,) = (cell for cell in code(path) if "parameters" in tags(cell))
    body = ast.parse(cell.source).body
    assert all(isinstance(node, ast.Assign) for node in body), "parameters are assignments alone"
    return {node.targets[0].id: ast.literal_eval(node.value) for node in body}


def code_lines(cell: nbformat.NotebookNode) -> list[str]:
    """Lines that are neither empty nor a comment."""
    lines = [line.strip() for line in cell.source.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_opens_with_a_question_what_one_learns_and_needs_and_has_parameters(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert "?" in cells[0].source, "no question"
    assert re.search(r"^\*\*What you will learn\*\*\n\n- ", cells[0].source, re.M)
    needs = re.search(r"^\*\*What you need\.\*\* (.+)", cells[0].source, re.M)
    assert re.search(r"minute", needs[1]) and "CPU" in needs[1]
    assert [tags(cell) for cell in code(path)[:2]] == [["opening"], ["parameters"]]
    assert parameters(path)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_ends_with_what_we_see_from_the_numbers(path):
    heading, cell, _ = read(path).cells[-3:]
    assert heading.source.startswith("## What we see\n")
    assert re.search(r"run\.findings\(\)|what_we_see\.of_\w+\(", cell.source)
    assert any("text/markdown" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_the_opening_is_that_of_pyproject(path):
    """`python -m reproduce notebooks` writes it."""
    notebook, written = read(path), read(path)
    write_opening(written, path.name, repository())
    assert written == notebook


@pytest.mark.parametrize(
    ("url", "badge"),
    [
        (None, None),
        ("https://example.org/a/b", None),
        ("https://github.com/a/b", "research.google.com/github/a/b/blob/main/notebooks/x.ipynb"),
    ],
)
def test_the_opening_follows_from_the_address(url, badge):
    cell = nbformat.v4.new_code_cell(metadata={"tags": ["opening"]})
    head = nbformat.v4.new_markdown_cell("# Title\n\nText.")
    notebook = nbformat.v4.new_notebook(cells=[head, cell])
    for _ in range(2):  # twice gives the same
        write_opening(notebook, "x.ipynb", url)
        assert (badge is None) == (head.source == "# Title\n\nText.")
        assert badge is None or badge in head.source
        assert "pip install" in cell.source and (url is None or url in cell.source)
    write_opening(notebook, "x.ipynb", None)
    assert head.source == "# Title\n\nText."


def test_the_opening_says_how_to_install_where_the_package_is_not(tmp_path):
    (cell,) = (cell for cell in code(PATHS[0]) if "opening" in tags(cell))
    for flags, failed, says in ((["-S", "-I"], 1, "pip install"), ([], 0, "")):
        done = subprocess.run(
            [sys.executable, *flags, "-c", cell.source],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == failed and says in done.stderr
        assert done.stderr.count("\n") == failed


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_every_notebook_is_run_at_smoke_scale_by_its_own_parameters(path, tmp_path):
    given = smoke_parameters(path.name, tmp_path)
    folders = {"ROWS", "RESULTS", "WORK"} if "STORED" in given else set()
    assert given.keys() <= parameters(path).keys() | folders
    assert given.get("SCALE", "smoke") == "smoke"
    for cell in code(path):
        assert "NBVAL" not in cell.source
        assert set(tags(cell)) <= {"opening", "parameters", "nbval-ignore-output"}
        assert "progress=False" not in cell.source
        if any(call in cell.source for call in ("progress=True", " sample(", ".execute()")):
            assert "nbval-ignore-output" in tags(cell), "nbval would compare progress bars"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_holds_no_logic(path):
    for cell in code(path)[1:]:
        for node in ast.walk(ast.parse(cell.source)):
            forbidden = ast.ClassDef | ast.Try | ast.While | ast.AsyncFunctionDef | ast.If
            assert not isinstance(node, forbidden), cell.source
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno
                assert length < LINES_OF_A_FUNCTION, f"{node.name} belongs in the library"
    for cell in code(path)[2:]:  # after the opening and the parameters
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
    _, _, *cells = code(NOTEBOOKS / table.notebook)
    values = parameters(NOTEBOOKS / table.notebook)
    assert values == {"SCALE": "mini", "STORED": True}
    run = reproduce.notebook(table.name, values)
    assert run.plan.table is table and run.plan.is_published
    assert repr(run).startswith(run.plan.words) and "A new run at mini scale" in repr(run)
    made = reproduce.notebook(table.name, smoke_parameters(table.notebook, tmp_path))
    assert {row.id for row in made.plan.rows} <= {row.id for row in table.rows}
    assert made.plan.folder.is_relative_to(tmp_path) and made.plan.work.is_relative_to(tmp_path)

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
    assert {"run.execute()", "run.rows()", "run.picture()"} <= set(lines)
    assert lines[-4:] == ["run.conditions()", "run.verdicts()", "run.agreement()", "run.findings()"]
    assert f"`make {table.target}`" in read(NOTEBOOKS / table.notebook).cells[0].source


@pytest.mark.parametrize("table", all_tables().values(), ids=lambda t: t.name)
def test_the_committed_notebook_shows_the_committed_rows(table):
    """`python -m reproduce notebooks notebooks/NOTEBOOK` brings it up to date."""
    cells = read(NOTEBOOKS / table.notebook).cells
    outputs = [output for c in cells if c.cell_type == "code" for output in c.outputs]
    shown = "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    results = report.committed(table.name, ROOT / "results")
    for data in (report.frame(results), report.side_by_side(results)):
        values = {str(value) for row in data.values.tolist() for value in row}
        assert not {v for v in values if f"<td>{escape(v, quote=False)}</td>" not in shown}
