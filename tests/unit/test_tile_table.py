"""The shipped tables of tiles: what is in them, who takes which, and what a damaged file says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest

from questlib.errors import EngineError
from questlib.integer.triton.tile_table import TABLES, Config, read_tables, shipped, table_of
from questlib.integer.triton.tiles import Gpu, serves

SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # bytes a block, CUDA's manual


def test_each_architecture_has_its_own_and_others_the_oldest():
    tables = read_tables(TABLES)
    assert set(tables) == set(SHARED)
    assert [table_of(c) for c in ((8, 0), (8, 9), (9, 0))] == list(tables.values())
    # RTX 30, Jetson Orin, B200, RTX 50
    assert all(table_of(c) is shipped()["sm_80"] for c in ((8, 6), (8, 7), (10, 0), (12, 0)))


@pytest.mark.parametrize("name", SHARED)
def test_every_tile_of_a_table_can_be_chosen(name):
    """For some layer on its GPU; whole and split, packed or not."""
    gpu = Gpu(100, SHARED[name], shipped()[name])
    for tile in gpu.table.tiles:
        assert any(serves(tile, 16, packed, gpu) for packed in (True, False)), tile
    for outputs in (16, 17):
        for packed in (True, False):
            assert any(t.bk == 32 and serves(t, outputs, packed, gpu) for t in gpu.table.tiles)


def edited(change: Callable[[dict], None]) -> str:
    """The shipped file after a change."""
    saved = json.loads(TABLES.read_text())
    change(saved)
    return json.dumps(saved)


def put(*keys: str | int, value: object) -> str:
    """The shipped file with another value somewhere."""

    def change(saved: dict) -> None:
        *path, last = keys
        of = saved
        for key in path:
            of = of[key]
        of[last] = value

    return edited(change)


SM90 = ("architectures", "sm_90")
DAMAGED = {
    "not JSON": (TABLES.read_text()[:500], "expected tables of tiles, found"),
    "nested": ("[" * 100_000, "expected tables of tiles, found"),
    "a list": ("[]", "expected format 1, found None"),
    "newer": (put("format", value=2), "expected format 1, found 2"),
    "true": (put("format", value=True), "expected format 1, found True"),
    "more": (put("tuned", value={}), "expected entries format, architectures"),
    "no sm_80": (edited(lambda s: s["architectures"].pop("sm_80")), "sm_80 among them"),
    "a name": (put("architectures", "gfx942", value={}), "such as sm_90, found 'gfx942'"),
    "half": (put(*SM90, value={"tiles": []}), "sm_90: expected entries accumulators, tiles"),
    "limit": (put(*SM90, "accumulators", "split", value=1000), "1 to 256 accumulators"),
    "no tiles": (put(*SM90, "tiles", value=[]), r"a list of tiles, found \[\]"),
    "short": (put(*SM90, "tiles", 0, value=[64, 64, 64, 4]), "bm, bn, bk, warps, stages"),
    "odd": (put(*SM90, "tiles", 0, 1, value=96), r"found \[128, 96, 64, 8, 3\]"),
    "a text": (put(*SM90, "tiles", 0, 1, value="64"), "found .*'64'"),
    "tiny": (put(*SM90, "tiles", 0, 2, value=16), r"found \[128, 256, 16, 8, 3\]"),
    "twice": (put(*SM90, "tiles", 0, value=[256, 128, 64, 8, 3]), "tiles that differ"),
    "spills": (put(*SM90, "tiles", 0, 3, value=4), "at most 128 accumulators a thread, found"),
    "wide": (put(*SM90, "tiles", value=[[64, 64, 64, 4, 4]]), "a tile of 32 bytes for every width"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_an_error_that_says_what(tmp_path, name):
    text, says = DAMAGED[name]
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(EngineError, match=says) as error:
        read_tables(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_one_too(tmp_path):
    with pytest.raises(EngineError, match="expected tables of tiles, found .*No such file"):
        read_tables(tmp_path / "tiles.json")


def test_more_architectures_can_be_added(tmp_path):
    saved = json.loads(TABLES.read_text())
    tables = saved["architectures"]
    tables["sm_120"] = copy.deepcopy(tables["sm_89"]) | {"tiles": [[64, 64, 32, 4, 5]]}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(saved))
    found = read_tables(path)["sm_120"]
    assert found.tiles == (Config(64, 64, 32, 4, 5),)
    assert found.holds(found.tiles[0], 17) and not found.holds(Config(128, 64, 32, 4, 5), 17)
