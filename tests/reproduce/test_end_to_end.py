"""The real thing on the embedded model: some rows of each table by the command line, twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reproduce.results import Result

ROWS = {
    "table2": ["w4a8-te-finetune"],
    "table3": ["bedrooms-fp", "bedrooms-w4a4-q-diffusion", "bedrooms-w4a4-quest"],
}


def run_smoke(folder: Path, table: str, *options: str) -> dict[str, dict[str, Any]]:
    """What the command prints as JSON, by row id."""
    command = [sys.executable, "-m", "reproduce", table, "--scale", "smoke", "--json"]
    command += ["--rows", ",".join(ROWS[table]), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {row["specified"]["id"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.fixture(scope="module", params=ROWS)
def made(request, tmp_path_factory):
    """A table, the folder where its rows were run, and what the command printed."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run_smoke(folder, request.param)


def test_smoke(made):
    table, folder, first = made
    second = run_smoke(folder, table)
    for row_id in ROWS[table]:
        result = first[row_id]["result"]
        assert result["status"] == "done"
        assert result["conditions"]["model"]["id"] == "mini-ldm4"
        assert first[row_id]["metrics"]["fid"]["value"] > 0
        assert first[row_id]["size_bytes"] > 0
        assert second[row_id] == first[row_id]  # nothing is made again, so seconds are equal, too
    others = [row["result"] for row_id, row in first.items() if row_id not in ROWS[table]]
    assert others
    for result in others:
        assert result["status"] == "not run" and "not run yet" in result["reason"]
    assert list((folder / "runs" / "results" / "smoke" / table).glob("*.ipynb"))


def smoke_result(folder, table: str, row: str) -> Result:
    return Result.read(folder / "runs" / "results" / "smoke" / table / f"{row}.json")


@pytest.mark.parametrize("made", ["table2"], indirect=True)
def test_engine(made):
    """The same checkpoint, simulated and in integers: alike, but for codes that flip."""
    table, folder, _ = made
    row = ROWS[table][-1]
    fid = {"fastest": smoke_result(folder, table, row).metric("fid").value}
    run_smoke(folder, table, "--engine", "cpu")
    run_smoke(folder, table, "--engine", "fake")
    for engine, name in (("fake", table), ("cpu", f"{table}-cpu")):
        result = smoke_result(folder, name, row)
        assert result.engine == engine and result.done
        fid[engine] = result.metric("fid").value
    for engine in ("fastest", "cpu"):
        assert abs(fid[engine] - fid["fake"]) < 0.05 * fid["fake"], engine
    quantized = [name for name in ROWS[table] if not name.endswith("-fp")]
    assert len(list((folder / "runs" / "checkpoint").iterdir())) == len(quantized)
    assert len(list((folder / "runs" / "evaluate").iterdir())) == len(ROWS[table]) + 2 * len(
        quantized
    )
