"""The real thing on the shipped model: some cells of each table by the command line, twice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CELLS = {
    "table2": "w4a8-te-finetune",
    "table3": "bedrooms-fp,bedrooms-w4a4-q-diffusion,bedrooms-w4a4-quest",
}


@pytest.mark.parametrize("table", CELLS)
def test_smoke(table, tmp_path):
    command = [
        sys.executable,
        "-m",
        "reproduce",
        table,
        "--scale",
        "smoke",
        "--cells",
        CELLS[table],
        "--json",
    ]
    runs = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        runs.append({r["cell"]: r for r in json.loads(done.stdout)["results"]})
    first, second = runs
    for cell in CELLS[table].split(","):
        assert first[cell]["status"] == "done" and first[cell]["model"]["id"] == "mini-ldm4"
        assert first[cell]["metrics"]["fid"]["value"] > 0 and first[cell]["size_bytes"] > 0
        assert second[cell] == first[cell]  # nothing was made again: also the seconds are the same
    others = [r for c, r in first.items() if c not in CELLS[table].split(",")]
    assert others and all(r["status"] == "not run" and "not run yet" in r["reason"] for r in others)
    assert list((tmp_path / "results" / "smoke" / table).glob("*.ipynb"))


def test_engine(tmp_path):
    """The same checkpoint, simulated and in integers: other results beside the first, alike but for codes that flip."""
    fid = {}
    for engine, folder in (("fake", "table2"), ("cpu", "table2-cpu")):
        command = [
            sys.executable,
            "-m",
            "reproduce",
            "table2",
            "--scale",
            "smoke",
            "--cells",
            CELLS["table2"],
            "--engine",
            engine,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        result = json.loads(
            (tmp_path / "results" / "smoke" / folder / f"{CELLS['table2']}.json").read_text()
        )
        assert result["engine"] == engine and result["status"] == "done"
        fid[engine] = result["metrics"]["fid"]["value"]
    assert (
        len(list((tmp_path / "runs" / "checkpoint").iterdir())) == 1
        and len(list((tmp_path / "runs" / "evaluate").iterdir())) == 2
    )
    assert abs(fid["cpu"] - fid["fake"]) < 0.05 * fid["fake"]
