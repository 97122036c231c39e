"""The driver: it runs the paper's tables at one of four scales and reports the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reproduce.table_run import TableRun


def notebook(table: str, names: Mapping[str, Any]) -> TableRun:
    """What a table's notebook shows, as its upper-case variables choose it.

    Args:
        table: name of a table, e.g. "table3".
        names: the notebook's `globals()`. SCALE, STORED, ROWS, SEEDS and the other fields of
            `reproduce.choices.Choices` are read from it. Rows that are run go to the checkout's
            runs/results where RESULTS says nothing else.

    Raises:
        ConfigError: an unknown table, choice or value; nothing has been run then.

    Example:
        >>> SCALE = "smoke"
        >>> run = reproduce.notebook("table3", globals())
        >>> run.execute()
        >>> run.verdicts()
    """
    from reproduce.environment import set_defaults

    set_defaults()  # before torch is loaded
    from reproduce.table_run import TableRun

    return TableRun.from_notebook(table, names)
