"""What the documentation site has beside docs/: a hook of mkdocs, see mkdocs.yml.

It adds the notebooks, CONTRIBUTING.md and the pictures that pages link to, and writes the
reference of the command line. Formulas become MathML, so that a page needs no network.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import griffe
import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from questlib.errors import QuestError
from reproduce.provenance import ROOT
from reproduce.reporting.readme import BLOCK
from reproduce.tables.registry import all_tables

# mkdocs-jupyter reads notebooks from files only; these are removed when Python ends.
COPIES = tempfile.TemporaryDirectory(prefix="questlib-site-")

CODE = r"(?P<code>```.*?```|`[^`\n]*`)"
FORMULA = re.compile(
    CODE + r"|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+)\$(?!\w)", re.S
)
LINK = re.compile(
    CODE + r"|(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<url>[^()\s]+)\)", re.S
)
# Commands of the reference, with the commands below them.
COMMANDS = (
    ("questlib", ("quantize", "sample")),
    ("reproduce", ("table3", "sample", "reference", "export-npz", "readme", "notebooks")),
    ("reproduce.models", ("convert",)),
    ("reproduce.models.minis", ("train", "data")),
)


# ---- markdown: formulas, and links out of docs/ ----


def mathml(latex: str, display: str) -> str:
    """MathML of a formula. QuestError for a LaTeX command that is not known."""
    found = convert(latex.strip(), display=display)
    if "\\" in found:
        raise QuestError(f"formula {latex.strip()!r}: expected LaTeX that latex2mathml knows")
    return found


def with_mathml(markdown: str) -> str:
    """Markdown whose formulas, `$...$` and `$$...$$`, are MathML."""

    def shown(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        if found["block"]:
            return f'\n\n<div class="formula">{mathml(found["block"], "block")}</div>\n\n'
        return f"<span>{mathml(found['inline'], 'inline')}</span>"

    return FORMULA.sub(shown, markdown)


def with_links(markdown: str, target: Callable[[str], str | None]) -> str:
    """Markdown whose relative links lead to `target` of them; where that is None, to no place."""

    def shown(found: re.Match[str]) -> str:
        parts = urlsplit(found["url"] or "")
        if found["code"] or parts.scheme or not parts.path:
            return found[0]
        new = target(parts.path)
        if new is None:
            return found["text"]
        return f"{found['image']}[{found['text']}]({parts._replace(path=new).geturl()})"

    return LINK.sub(shown, markdown)


def site_path(path: Path) -> str | None:
    """Where the site has a file of the repository; None: it does not."""
    if path.suffix == ".ipynb":
        return f"notebooks/{path.name}"
    if path == ROOT / "CONTRIBUTING.md":
        return "contributing.md"
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    if path.suffix == ".png" and path.is_relative_to(ROOT / "results"):
        return path.relative_to(ROOT).as_posix()
    return None


# ---- notebooks ----


def notebook_paths() -> list[Path]:
    """In reading order: the tour and its like (00 to 29), tables, figures, the rest."""

    def order(path: Path) -> tuple[int, str]:
        number = re.match(r"\d+", path.name)
        kinds = {"t": 1, "f": 2}
        place = (0 if int(number[0]) < 30 else 3) if number else kinds.get(path.name[0], 3)
        return place, path.name

    return sorted((ROOT / "notebooks").glob("*.ipynb"), key=order)


def read_notebook(path: Path) -> NotebookNode:
    """The notebook in a file. QuestError for anything else."""
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, KeyError, nbformat.ValidationError) as error:
        raise QuestError(
            f"notebook {path}: expected a Jupyter notebook, found {type(error).__name__}"
        ) from error


def site_notebook(path: Path) -> NotebookNode:
    """A notebook as the site shows it: with MathML, links inside the site, and without widgets."""
    notebook = read_notebook(path)
    notebook.metadata.pop("widgets", None)

    def target(url: str) -> str | None:
        found = site_path(Path(os.path.normpath(path.parent / url)))
        html = None if found is None else re.sub(r"\.(md|ipynb)$", ".html", found)
        return html and os.path.relpath(html, "notebooks")

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            # mkdocs-jupyter drops code from a heading's place in the table of contents.
            plain = re.sub(
                r"^#+ .*", lambda head: head[0].replace("`", ""), cell.source, flags=re.M
            )
            cell.source = with_links(with_mathml(plain), target)
    tables = [table for table in all_tables().values() if table.notebook == path.name]
    if tables:
        links = ", ".join(f"[{t.title}](../results/{t.name}.html)" for t in tables)
        # A fixed id: mkdocs-jupyter converts a notebook again only when its text has changed.
        about = new_markdown_cell(f"*All numbers of this table: {links}.*", id="all-numbers")
        notebook.cells.insert(1, about)
    return notebook


# ---- the command line ----


def commands_reference() -> str:
    """What `--help` says, of each command."""
    parts = []
    for module, commands in COMMANDS:
        parts += [f"## python -m {module}", _help(module)]
        for command in commands:
            parts += [f"### python -m {module} {command}", _help(module, command)]
    return "\n\n".join(parts)


def _help(module: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *command, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
    )
    if done.returncode:
        raise QuestError(f"python -m {module}: --help failed: {done.stderr.strip()}")
    return f"```text\n{done.stdout.strip()}\n```"


# ---- docstrings ----


class ShownExamples(griffe.Extension):
    """An extension of mkdocstrings: "Example:" is shown as code, as "Examples:" is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)


# ---- the hook ----


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation of tables and notebooks, which mkdocs.yml leaves open."""
    tables = [
        {table.title.replace("`", ""): f"results/{name}.md"} for name, table in all_tables().items()
    ]
    notebooks = [f"notebooks/{path.name}" for path in notebook_paths()]
    for section in config.nav or []:
        if "Results" in section:
            section["Results"] += [{"Tables and figures": tables}]
        elif "Notebooks" in section:
            section["Notebooks"] = notebooks
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add notebooks, CONTRIBUTING.md, and every picture of the results."""
    folder = Path(COPIES.name) / "notebooks"
    folder.mkdir(exist_ok=True)
    for path in notebook_paths():
        (folder / path.name).write_text(nbformat.writes(site_notebook(path)), encoding="utf-8")
        src = f"notebooks/{path.name}"
        files.append(File(src, COPIES.name, config.site_dir, config.use_directory_urls))
    files.append(
        File.generated(config, "contributing.md", abs_src_path=str(ROOT / "CONTRIBUTING.md"))
    )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the commands' reference, formulas and links."""
    source = page.file.abs_src_path
    place = Path(source).parent if source else ROOT
    if "<!-- generated: commands-reference -->" in markdown:
        markdown = BLOCK.sub(lambda _: commands_reference(), markdown)

    def target(url: str) -> str | None:
        path = Path(os.path.normpath(place / url))
        found = site_path(path)
        if found is not None and path.suffix == ".png" and files.get_file_from_path(found) is None:
            files.append(File.generated(config, found, abs_src_path=str(path)))
        return found and os.path.relpath(found, Path(page.file.src_uri).parent)

    return with_links(with_mathml(markdown), target)
