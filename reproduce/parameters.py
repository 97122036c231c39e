"""Which parameters a notebook takes, and which it was given."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from questlib.errors import unknown

INJECTED = "# Parameters"  # the first line of the cell that papermill adds
PLAIN = (str, int, float, bool, list, tuple, dict, type(None))


def check_parameters(names: Mapping[str, Any], known: Collection[str] | None = None) -> None:
    """Check the names of a notebook's parameters; papermill itself injects any name in silence.

    Args:
        names: the notebook's `globals()`.
        known: the names that it takes; None: those that its cells set before papermill's.

    Raises:
        ConfigError: papermill set another name, or one is written in lower case.

    Example:
        >>> scale = "smoke"
        >>> check_parameters(globals(), ["SCALE"])
        ConfigError: parameters: expected one of SCALE, found 'scale'; did you mean 'SCALE'?
    """
    cells = list(names.get("In", ()))  # IPython: the source of each cell that was run
    injected = [i for i, source in enumerate(cells) if source.splitlines()[:1] == [INJECTED]]
    if known is None:
        before = cells[: injected[-1]] if injected else cells
        known = sorted({name for source in before for name in _assigned(source) if name.isupper()})
    given = {name for i in injected for name in _assigned(cells[i])}
    lower = {
        name
        for name, value in names.items()
        if name not in known and name.upper() in known and isinstance(value, PLAIN)
    }
    for name in sorted((given - set(known)) | lower):
        raise unknown("parameters", name, known)


def _assigned(source: str) -> Iterator[str]:
    """Names that a cell of plain Python assigns at its top level."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a cell with a magic of IPython sets no parameter
        return
    for node in body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
