"""A static site of the executed notebooks and of every table's committed results.

It consists of HTML files alone and loads nothing from the network.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nbformat import NotebookNode

from questlib.errors import ConfigError, QuestError
from questlib.files import check_writable
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
from reproduce.table_results import TableResults
from reproduce.tables.base import Table
from reproduce.tables.registry import all_tables

# Only a folder whose index has this mark is replaced.
MARK = '<meta name="generator" content="python -m reproduce site">'
SCALES = {"smoke": "smoke scale: it shows that everything runs, its numbers mean nothing"}


@dataclass(frozen=True)
class Page:
    """One page of the site."""

    file: str
    title: str
    body: str
    """HTML."""

    about: str = ""
    """One line of HTML: where what the page shows comes from."""


def reading_order(path: Path) -> tuple[int, str]:
    """The tour and the engine (00 to 29), tables, figures, what goes beyond the paper (30 on)."""
    if number := re.match(r"\d+", path.name):
        return (0 if int(number[0]) < 30 else 3, path.name)
    for place, kind in ((1, "table"), (2, "figure")):
        if path.name.startswith(kind):
            return (place, path.name)
    return (3, path.name)


def shown_run(path: Path, results: Path) -> Path:
    """The same notebook's run at mini scale, where the results have one."""
    return min(
        (results / "mini").glob(f"*/{path.name}"),
        key=lambda p: (len(p.parent.name), p),
        default=path,
    )


def about_run(notebook: NotebookNode) -> str:
    """Which run a notebook shows, in one line."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        return "Not executed: this page shows the code alone."
    # Injected parameters come last.
    found = [re.search(r'^SCALE = "(\w+)"', cell.source, re.M) for cell in code]
    scales = [match[1] for match in found if match]
    shown = "the defaults of the notebook"
    if scales:
        shown = SCALES.get(scales[-1], f"{scales[-1]} scale")
    return f"The run shown: {shown}."


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
    words = [about_run(notebook)]
    words += ["Results at mini scale:", ", ".join(links)] if links else []
    return Page(page_file(path), title, body, " ".join(words))


def table_file(table: Table) -> str:
    """Name of a table's page."""
    return f"results-{table.name}.html"


def bullets(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table_page(results: TableResults, notebooks: list[Path]) -> Page:
    """Everything that the result files say of a table."""
    table = results.table
    made = [
        f'How it is made: <a href="{page_file(path)}">{path.name}</a>.'
        for path in notebooks
        if path.name == table.notebook
    ]
    title = plain(table.title)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(report.conditions(results))}</p>",
        "<h2>Paper and ours</h2>",
        data_table(report.side_by_side(results)),
        bullets(map(escape, report.reasons(results))),
        "<h2>Ours</h2>",
        data_table(report.frame(results)),
    ]
    return Page(table_file(table), title, "\n".join(body), *made)


def run_count(results: TableResults) -> str:
    """How many rows of a table have numbers."""
    return f"{len(results.done)} of {len(results)} rows run at mini scale"


def summary(results: TableResults) -> str:
    """Paper and ours without the rest, and why rows have no numbers.

    Where the paper has no numbers, ours alone.
    """
    data = report.side_by_side(results) if report.reported(results) else report.frame(results)
    data = data[[column for column in data.columns if not re.search("verdict|others", column)]]
    why = Counter((r.status, r.reason or "") for _, r in results if not r.done)
    table = results.table
    link = f'<a href="{table_file(table)}">All columns, verdicts, conditions</a>'
    return "\n".join(
        [
            f'<h3 id="{table.name}">{escape(plain(table.title))}</h3>',
            f'<p class="quiet">{run_count(results)}. {link}</p>',
            data_table(data),
            bullets(escape(f"{n} rows {status}: {reason}") for (status, reason), n in why.items()),
        ]
    )


def index(readme: Path, notebooks: list[Page], tables: list[TableResults]) -> Page:
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
        f'<a href="#{r.table.name}">{escape(plain(r.table.title))}</a> '
        f'<span class="quiet">{run_count(r)}</span>'
        for r in tables
    ]
    body = [markdown(intro), '<h2 id="notebooks">Notebooks</h2>', bullets(pages)]
    body += [
        '<h2 id="tables">Tables: paper and ours</h2>',
        bullets(jump),
        *map(summary, tables),
    ]
    return Page("index.html", plain(title[1]), "\n".join(body))


def framed(page: Page, before: Page | None = None, after: Page | None = None) -> str:
    """The whole HTML of a page, with links to its neighbours."""
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
<a href="index.html">questlib</a>
<a href="index.html#notebooks">Notebooks</a>
<a href="index.html#tables">Tables</a>
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
    """Write every page, image and style to `folder`."""
    paths = sorted((root / "notebooks").glob("*.ipynb"), key=reading_order)
    tables = [report.committed(name, results) for name in all_tables()]
    notebooks = [notebook_page(path, results, folder) for path in paths]
    for row in (notebooks, [table_page(found, paths) for found in tables]):
        for before, page, after in zip([None, *row], row, [*row[1:], None], strict=False):
            (folder / page.file).write_text(framed(page, before, after))
    (folder / "index.html").write_text(framed(index(root / "README.md", notebooks, tables)))
    (folder / "style.css").write_text(
        f"{highlight_style()}\n{Path(__file__).with_suffix('.css').read_text()}"
    )


def build(out: Path, results: Path, root: Path = ROOT) -> int:
    """Write the site of `results`, and of the notebooks and README under `root`, to `out`.

    An older site in `out` is replaced in one step, when the new one is whole.

    Returns:
        The number of pages.

    Raises:
        ConfigError: a place that cannot be written or holds anything else.
        QuestError: results, notebooks or equations that cannot be read.
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
