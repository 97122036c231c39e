"""A static site of the executed notebooks and of every table's committed results: HTML files alone, nothing from the network."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from questlib.errors import ConfigError, QuestError
from questlib.files import check_writable
from reproduce.plan import Plan
from reproduce.provenance import ROOT
from reproduce.reporting import report
from reproduce.reporting.markup import (
    data_table,
    highlight_style,
    markdown,
    notebook_html,
    page_file,
    plain,
    read_notebook,
)
from reproduce.tables.base import Table
from reproduce.tables.registry import all_tables

MARK = '<meta name="generator" content="python -m reproduce site">'  # a folder without it is not ours to replace
SCALES = {"smoke": "smoke scale: it shows that all runs, its numbers mean nothing"}
Results = list[dict[str, Any]]  # of a table's rows, as report.committed gives them


@dataclass(frozen=True)
class Page:
    file: str
    title: str
    body: str  # HTML
    about: str = ""  # HTML, one line: where what the page shows comes from


def reading_order(path: Path) -> tuple[int, str]:
    """The tour and the engine (00 to 29), tables, figures, what goes beyond the paper (30 and above)."""
    if number := re.match(r"\d+", path.name):
        return (0 if int(number[0]) < 30 else 3, path.name)
    return ({"table": 1, "figure": 2}.get(re.match(r"[a-z]*", path.name)[0], 3), path.name)


def shown_run(path: Path, results: Path) -> Path:
    """The same notebook's run at mini scale, where the results have one."""
    return min(
        (results / "mini").glob(f"*/{path.name}"),
        key=lambda p: (len(p.parent.name), p),
        default=path,
    )


def about_run(notebook: NotebookNode) -> str:
    code = [c for c in notebook.cells if c.cell_type == "code"]
    if not any(c.outputs for c in code):
        return "Not executed: this page shows the code alone."
    scales = [
        m[1] for c in code if (m := re.search(r'^SCALE = "(\w+)"', c.source, re.M))
    ]  # injected parameters come last
    return f"The run shown: {SCALES.get(scales[-1], f'{scales[-1]} scale') if scales else 'the defaults of the notebook'}."


def notebook_page(path: Path, results: Path, folder: Path) -> Page:
    """The page of a notebook; its images are written to `folder`."""
    notebook = read_notebook(shown_run(path, results))
    title, body, images = notebook_html(notebook, path.stem)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    links = [
        f'<a href="{table_file(t)}">{escape(plain(t.title))}</a>'
        for t in all_tables().values()
        if t.notebook == path.name
    ]
    words = [about_run(notebook), *(["Results at mini scale:", ", ".join(links)] if links else [])]
    return Page(page_file(path), title, body, " ".join(words))


def table_file(table: Table) -> str:
    return f"results-{table.name}.html"


def bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def committed(results: Path) -> list[tuple[Plan, Results]]:
    found = []
    for name in all_tables():
        try:
            found.append(report.committed(name, results))
        except json.JSONDecodeError as error:
            raise QuestError(
                f"results of {name} in {results}: expected JSON, found {error}"
            ) from error
    return found


def table_page(plan: Plan, found: Results, notebooks: list[Path]) -> Page:
    """Everything that the result files say of a table."""
    made = [
        f'How it is made: <a href="{page_file(n)}">{n.name}</a>.'
        for n in notebooks
        if n.name == plan.table.notebook
    ]
    title = plain(plan.table.title)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(report.conditions(plan, found))}</p>",
        "<h2>Paper and ours</h2>",
    ]
    body += [data_table(report.side_by_side(found)), bullets(map(escape, report.reasons(found)))]
    return Page(
        table_file(plan.table),
        title,
        "\n".join([*body, "<h2>Ours</h2>", data_table(report.frame(found))]),
        *made,
    )


def run_count(found: Results) -> str:
    return f"{sum(r['status'] == 'done' for r in found)} of {len(found)} rows run at mini scale"


def summary(plan: Plan, found: Results) -> str:
    """Paper and ours without the rest (ours alone where the paper has no numbers), and why rows have no numbers."""
    data = report.side_by_side(found) if report.reported(found) else report.frame(found)
    data = data[[c for c in data.columns if not re.search("verdict|others", c)]]
    why = Counter((r["status"], r["reason"]) for r in found if r["status"] != "done")
    return "\n".join(
        [
            f'<h3 id="{plan.table.name}">{escape(plain(plan.table.title))}</h3>',
            f'<p class="quiet">{run_count(found)}. <a href="{table_file(plan.table)}">All columns, verdicts, conditions</a></p>',
            data_table(data),
            bullets(escape(f"{n} rows {status}: {reason}") for (status, reason), n in why.items()),
        ]
    )


def index(readme: Path, notebooks: list[Page], tables: list[tuple[Plan, Results]]) -> Page:
    """What this is (the README's words above its first section), the notebooks, the tables."""
    intro = readme.read_text().split("\n## ")[0]
    title = re.match(r"# (.+)", intro)
    if title is None:
        raise QuestError(f"{readme}: expected a title (# ...) in its first line")
    pages = [
        f'<a href="{p.file}">{escape(p.title)}</a><br><span class="quiet">{p.about}</span>'
        for p in notebooks
    ]
    jump = [
        f'<a href="#{p.table.name}">{escape(plain(p.table.title))}</a> <span class="quiet">{run_count(r)}</span>'
        for p, r in tables
    ]
    body = [markdown(intro), '<h2 id="notebooks">Notebooks</h2>', bullets(pages)]
    body += [
        '<h2 id="tables">Tables: paper and ours</h2>',
        bullets(jump),
        *(summary(p, r) for p, r in tables),
    ]
    return Page("index.html", plain(title[1]), "\n".join(body))


def framed(page: Page, before: Page | None = None, after: Page | None = None) -> str:
    steps = [
        f'<a href="{p.file}">{way} {escape(p.title)}</a>'
        for way, p in (("Previous:", before), ("Next:", after))
        if p
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<title>{escape(page.title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="style.css">
</head>
<body>
<header>
<a href="index.html">questlib</a> <a href="index.html#notebooks">Notebooks</a> <a href="index.html#tables">Tables</a>
</header>
<main>
{f'<p class="about">{page.about}</p>' if page.about else ""}
{page.body}
</main>
<footer>{" ".join(steps)}</footer>
</body>
</html>
"""


def write_pages(folder: Path, results: Path, root: Path) -> None:
    paths = sorted((root / "notebooks").glob("*.ipynb"), key=reading_order)
    tables = committed(results)
    notebooks = [notebook_page(path, results, folder) for path in paths]
    for row in (notebooks, [table_page(plan, found, paths) for plan, found in tables]):
        for before, page, after in zip([None, *row], row, [*row[1:], None], strict=False):
            (folder / page.file).write_text(framed(page, before, after))
    (folder / "index.html").write_text(framed(index(root / "README.md", notebooks, tables)))
    (folder / "style.css").write_text(
        f"{highlight_style()}\n{Path(__file__).with_suffix('.css').read_text()}"
    )


def build(out: Path, results: Path, root: Path = ROOT) -> int:
    """Write the site of `results` and of the notebooks and README under `root` to folder `out`; how many pages it has.

    An older site in `out` is replaced in one step, when the new one is whole. ConfigError for a place that cannot be written
    or holds anything else; QuestError for results, notebooks or equations that cannot be read.
    """
    out = out.resolve()
    if not (results / "mini").is_dir():
        raise QuestError(f"results: expected a folder {results / 'mini'}, found none")
    if out.exists() and not (out.is_dir() and (_is_site(out) or not any(out.iterdir()))):
        raise ConfigError(
            f"output {out}: expected a new or empty folder or an older site, found something else"
        )
    check_writable(out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        write_pages(new, results, root)
        try:
            if out.exists():
                out.rename(old)
            new.rename(out)
        except OSError as error:
            raise ConfigError(f"output {out}: cannot be replaced ({error.strerror})") from error
        finally:
            if old.exists() and not out.exists():
                old.rename(out)
    return len(list(out.glob("*.html")))


def _is_site(folder: Path) -> bool:
    return (folder / "index.html").is_file() and MARK in (folder / "index.html").read_text()
