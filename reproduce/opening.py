"""What every notebook opens with: a first cell for environments without the package, and a badge.

Both follow from `Repository` in pyproject.toml's [project.urls]. Without it there is no badge, and
the cell says how to install from a folder.
"""

from __future__ import annotations

import re
import tomllib

from nbformat import NotebookNode

from reproduce.provenance import ROOT

TAG = "opening"  # of the cell
BADGE = re.compile(r"\n\n\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
COLAB = "https://colab.research.google.com"
NOT_INSTALLED = """\
import importlib.util

if importlib.util.find_spec("questlib") is None:
    raise SystemExit("questlib is not installed; in its folder: pip install -e '.[reproduce]'")"""
INSTALL = """\
import importlib.util
import sys

if importlib.util.find_spec("questlib") is None:
    how = "git clone --depth 1 {url} questlib"
    how += " && pip install -q -e 'questlib[reproduce]'"
    if "google.colab" not in sys.modules:
        raise SystemExit(f"questlib is not installed: {{how}}")
    get_ipython().system(how)
    sys.path.insert(0, "questlib")"""


def repository() -> str | None:
    """The project's public address, where pyproject.toml has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"].get("Repository")


def write_opening(notebook: NotebookNode, name: str, url: str | None) -> None:
    """Write a notebook's badge, below its title, and its first code cell.

    Args:
        notebook: its first cell is the title; one cell has the tag "opening".
        name: file name in notebooks/.
        url: of the repository; Colab opens those of GitHub.
    """
    (cell,) = (c for c in notebook.cells if TAG in c.metadata.get("tags", []))
    cell.source = NOT_INSTALLED if url is None else INSTALL.format(url=url)
    head = notebook.cells[0]
    title, _, rest = BADGE.sub("", head.source, count=1).partition("\n")
    badge = ""
    if url is not None and url.startswith("https://github.com/"):
        place = url.removeprefix("https://").removesuffix(".git").replace(".com", "", 1)
        target = f"{COLAB}/{place}/blob/main/notebooks/{name}"
        badge = f"\n\n[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({target})"
    head.source = f"{title}{badge}\n{rest}"
