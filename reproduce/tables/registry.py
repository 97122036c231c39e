"""All tables by name."""

from __future__ import annotations

from questlib.errors import unknown
from reproduce.tables.ablation import ABLATION
from reproduce.tables.after_paper import AFTER_PAPER
from reproduce.tables.base import Table
from reproduce.tables.budget import BUDGET
from reproduce.tables.dit import DIT
from reproduce.tables.figures import FIGURE2, FIGURE3
from reproduce.tables.table2 import TABLE2
from reproduce.tables.table3 import TABLE3, TABLE3_CHURCHES
from reproduce.tables.table4 import TABLE4
from reproduce.tables.table5 import TABLE5
from reproduce.tables.table6 import TABLE6
from reproduce.tables.table7 import TABLE7
from reproduce.tables.table8 import TABLE8
from reproduce.tables.table9 import TABLE9
from reproduce.tables.table10 import TABLE10
from reproduce.tables.table11 import TABLE11

TABLES = (
    TABLE2,
    TABLE3,
    TABLE3_CHURCHES,
    TABLE4,
    TABLE5,
    TABLE6,
    TABLE7,
    TABLE8,
    TABLE9,
    TABLE10,
    TABLE11,
    FIGURE2,
    FIGURE3,
    ABLATION,
    BUDGET,
    DIT,
    AFTER_PAPER,
)


def all_tables() -> dict[str, Table]:
    """Every table by name, in the order of the paper."""
    return {table.name: table for table in TABLES}


def get_table(name: str) -> Table:
    """The table of this name. ConfigError names those there are."""
    tables = all_tables()
    if name not in tables:
        raise unknown("table", name, tables)
    return tables[name]
