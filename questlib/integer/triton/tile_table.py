"""The tiles that the Triton product can take on a GPU: tiles.json, a table for each architecture.

tiles.json
  format          1
  architectures   by name, such as "sm_90"; "sm_80" serves GPUs that have no table of their own
    accumulators  int32 sums that a thread can hold before it spills: "whole", with outputs that are
                  a multiple of 16; "ragged", with others; "split", with a split reduction
    tiles         [bm, bn, bk, warps, stages] each, as in `Config`

The numbers were found by compiling (tests/gpu_emulation), which also refuses tiles that spill or
need more shared memory than there is. Which tile a product takes is chosen in `tiles`.
"""

from __future__ import annotations

import functools
import json
import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

from questlib.errors import EngineError

TABLES = Path(__file__).with_name("tiles.json")
FORMAT = 1
OTHERS = "sm_80"  # its products are those of every newer GPU but sm_90
LIMITS = ("whole", "ragged", "split")
SMALLEST = (16, 16, 32, 1, 1)
LARGEST = (512, 512, 256, 32, 8)
NARROWEST = 32  # bytes: every row of weights is a multiple


class Config(NamedTuple):
    """Of one launch of the product's kernel."""

    bm: int  # output pixels a tile
    bn: int  # output channels a tile
    bk: int  # bytes of w a step
    warps: int
    stages: int
    split: int = 1  # programs that share one tile's reduction

    @property
    def accumulators(self) -> int:
        """Sums that a thread holds."""
        return -(-self.bm * self.bn // (32 * self.warps))


class TileTable(NamedTuple):
    """What the code chooses from on one architecture, and what its threads hold."""

    tiles: tuple[Config, ...]
    whole: int
    ragged: int
    split: int

    def holds(self, config: Config, outputs: int) -> bool:
        """Whether a thread has registers enough for a tile of a layer with so many outputs."""
        most = self.ragged if outputs % 16 else self.whole
        return config.accumulators <= (most if config.split == 1 else min(most, self.split))


def table_of(capability: tuple[int, int]) -> TileTable:
    """The table for a GPU of this compute capability.

    Raises:
        EngineError: the shipped file is damaged.
    """
    tables = shipped()
    major, minor = capability
    return tables.get(f"sm_{major}{minor}", tables[OTHERS])


@functools.cache
def shipped() -> dict[str, TileTable]:
    """All tables, by architecture."""
    return read_tables(TABLES)


def read_tables(path: Path) -> dict[str, TileTable]:
    """The tables of a file, by architecture.

    Raises:
        EngineError: the file cannot be read, is of another format, or has a table that no GPU can
            have; the message says which, and what was expected.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as damage:
        raise EngineError(f"{path}: expected tables of tiles, found {damage}") from damage
    form = saved.get("format") if isinstance(saved, dict) else None
    if type(form) is not int or form != FORMAT:
        raise _wrong(path, f"format {FORMAT}", form)
    found = _entries(path, saved, ("format", "architectures"))["architectures"]
    if not isinstance(found, dict) or OTHERS not in found:
        raise _wrong(path, f"tables by architecture, {OTHERS} among them", found)
    if unknown := [name for name in found if not re.fullmatch(r"sm_\d{2,3}", name)]:
        raise _wrong(path, "architectures such as sm_90", unknown[0])
    return {name: _table(f"{path}: {name}", table) for name, table in found.items()}


def _table(where: str, saved: Any) -> TileTable:
    """One architecture's table, checked."""
    entries = _entries(where, saved, ("accumulators", "tiles"))
    limits = _entries(where, entries["accumulators"], LIMITS)
    if wrong := [n for n in limits.values() if not _between(n, 1, 256)]:
        raise _wrong(where, "1 to 256 accumulators a thread", wrong[0])
    rows = entries["tiles"]
    if not isinstance(rows, list) or not rows:
        raise _wrong(where, "a list of tiles", rows)
    if wrong := [row for row in rows if not _is_tile(row)]:
        raise _wrong(where, "[bm, bn, bk, warps, stages]", wrong[0])
    tiles = tuple(Config(*row) for row in rows)
    if len(set(tiles)) < len(tiles):
        raise _wrong(where, "tiles that differ", rows)
    table = TileTable(tiles, **limits)
    if idle := [tile for tile in tiles if not table.holds(tile, 16)]:
        raise _wrong(where, f"at most {table.whole} accumulators a thread", list(idle[0][:5]))
    if not any(c.bk == NARROWEST and table.holds(c._replace(split=1), 1) for c in tiles):
        raise _wrong(where, f"a tile of {NARROWEST} bytes for every width", rows)
    return table


def _entries(where: str | Path, saved: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """A dict that has these entries alone."""
    if not isinstance(saved, dict) or set(saved) != set(names):
        raise _wrong(where, f"entries {', '.join(names)}", saved)
    return saved


def _is_tile(row: Any) -> bool:
    """Whether these are sizes that a launch can have; those of a tile are powers of two."""
    if not isinstance(row, list) or len(row) != len(SMALLEST):
        return False
    inside = map(_between, row, SMALLEST, LARGEST)
    return all(inside) and all(n & (n - 1) == 0 for n in row[:4])


def _between(n: Any, least: int, most: int) -> bool:
    return type(n) is int and least <= n <= most


def _wrong(where: str | Path, expected: str, found: Any) -> EngineError:
    return EngineError(f"{where}: expected {expected}, found {reprlib.repr(found)}")
