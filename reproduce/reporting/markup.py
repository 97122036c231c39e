"""Markdown and notebooks as HTML that needs no network and no script.

Equations are MathML, code is highlighted, images are files.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pandas as pd
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from questlib.errors import QuestError

LONG = 20  # characters; a longer table cell may break its line
# What a page can show by itself: no widgets, no scripts, no LaTeX (its plain text instead).
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


class Renderer(IPythonRenderer):
    """nbconvert's renderer, with MathML, tables that scroll, and links inside the site."""

    def block_math(self, body: str) -> str:
        return f'<span class="equation">{mathml(body, "block")}</span>'

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def table(self, text: str) -> str:
        return f'<div class="scroll"><table>{text}</table></div>'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A notebook's link leads to its page; a link to a file that the site lacks is text."""
        parts = urlsplit(url)
        if parts.scheme or not parts.path:
            return super().link(text, url, title)
        if not parts.path.endswith(".ipynb"):
            return text
        return super().link(text, parts._replace(path=page_file(Path(parts.path))).geturl(), title)


def page_file(notebook: Path) -> str:
    """Name of a notebook's page."""
    return f"{notebook.stem}.html"


def markdown(source: str) -> str:
    """Markdown as HTML."""
    return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


def mathml(latex: str, display: str) -> str:
    """MathML of an equation. QuestError for a LaTeX command that is not known."""
    found = convert(latex.strip(), display=display)
    if "\\" in found:
        raise QuestError(f"equation {latex.strip()!r}: expected LaTeX that latex2mathml knows")
    return found


def plain(heading: str) -> str:
    """A heading without its marks, for places that show text alone."""
    return re.sub(r"[`*$]", "", heading).strip()


def highlight_style() -> str:
    """CSS of highlighted code."""
    return HtmlFormatter(style="friendly").get_style_defs(".highlight")


def data_table(data: pd.DataFrame) -> str:
    """A table that scrolls in its box; only long texts break their lines."""

    def cell(value: object) -> str:
        text = str(value)
        width = f'<span class="long" style="min-width:{min(len(text) // 2, 30)}ch">'
        return f"{width}{escape(text)}</span>" if len(text) > LONG else escape(text)

    with pd.option_context("display.max_colwidth", None):  # not cut to 50 characters
        html = data.map(cell).to_html(index=False, border=0, escape=False)
    return f'<div class="scroll">{html}</div>'


def read_notebook(path: Path) -> NotebookNode:
    """The notebook in a file. QuestError for anything else."""
    try:
        return nbformat.read(path, as_version=4)
    except (
        nbformat.reader.NotJSONError,
        nbformat.ValidationError,
        UnicodeDecodeError,
        AttributeError,
        KeyError,
    ) as error:
        raise QuestError(
            f"notebook {path}: expected a Jupyter notebook, found {type(error).__name__}"
        ) from error


def notebook_html(notebook: NotebookNode, name: str) -> tuple[str, str, dict[str, bytes]]:
    """A notebook as an HTML fragment.

    Returns:
        The first heading (or `name`), the fragment, and its images by file name, which starts with
        `name`.
    """
    headings: list[str] = []
    notebook.metadata.pop("widgets", None)  # their state would come as a script; their text shows
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings += map(plain, re.findall(r"^#+ +(.+)$", cell.source, re.M))
        else:
            cell.source = re.sub(r"^# NBVAL_\w+\n", "", cell.source)
            cell.metadata.setdefault("alt", f"Figure: {headings[-1] if headings else name}")
    files = {
        "enabled": True,
        "output_filename_template": "{unique_key}_{cell_index}_{index}{extension}",
    }
    config = Config(
        {"NbConvertBase": {"display_data_priority": SHOWN}, "ExtractOutputPreprocessor": files}
    )
    exporter = HTMLExporter(
        template_name="basic", config=config, filters={"markdown2html": markdown}
    )
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, resources = exporter.from_notebook_node(notebook, {"unique_key": name})
    return headings[0] if headings else name, body, resources["outputs"]
