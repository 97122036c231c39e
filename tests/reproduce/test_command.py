"""The command line: one clear line and exit code 2 before any long work; what a table says when nothing can run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reproduce.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def reproduce(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "reproduce", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table99"], "table: expected one of table2, table3, table3-churches, table4"),
        (
            ["table9", "--model", "x"],
            "these cells are of bedrooms, imagenet: choose some (--cells)",
        ),
        (
            ["table4", "--captions", "x", "--dry-run"],
            "no use for prompts, these cells are of imagenet",
        ),
        (["table4", "--dry-run", "--scale", "huge"], "found 'huge'"),
        (["table4", "--dry-run", "--cells", "imagenet-w9a9"], "found 'imagenet-w9a9'"),
        (["table2", "--scale", "huge"], "scale: expected one of smoke, mini, paper, found 'huge'"),
        (["table2", "--cells", "fp,nothing"], "found 'nothing'"),
        (
            ["table2", "--seeds", "one"],
            "seeds: expected whole numbers separated by commas, found 'one'",
        ),
        (["table2", "--results", "file/below"], "cannot be written"),
        (["table2", "--work", "file"], "cannot be written"),
        (["table2", "--model", "./no/such/folder"], "unknown model './no/such/folder'"),
        (["table2", "--resolts", "x"], "unrecognized arguments"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("results/**/*.json"))


TINY_RUN = ["table3", "--scale", "smoke", "--cells", "bedrooms-fp", "--work", "work"]


@pytest.mark.parametrize(
    ("marker", "found"),
    [
        (None, "found products of a questlib before 0.2"),
        ('{"format": 3}', "found format 3"),
        ("[]", "found format None"),
        ("no JSON", "store.json cannot be read"),
    ],
)
def test_work_folder_of_another_version_is_refused(tmp_path, monkeypatch, capsys, marker, found):
    """One line that says what to do; nothing in the folder is changed."""
    monkeypatch.chdir(tmp_path)
    key = tmp_path / "work" / "sample" / "0123" / "key.json"
    key.parent.mkdir(parents=True)
    key.write_text("{}")
    if marker is not None:
        (tmp_path / "work" / "store.json").write_text(marker)
    before = sorted(tmp_path.glob("work/**/*"))
    assert main(TINY_RUN) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert found in err and "name another folder (--work), or remove it" in err
    assert sorted(tmp_path.glob("work/**/*")) == before
    assert main([*TINY_RUN, "--dry-run"]) == 0  # reads nothing there


def test_bad_input_in_a_process(tmp_path):
    done = reproduce("table2", "--scale", "huge", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "python -m reproduce: scale: expected one of smoke, mini, paper, found 'huge'\n"
    )


def test_paper_scale_without_weights(tmp_path):
    """Every row says "not run" and why, the table is whole, stdout is JSON alone, and that is no failure."""
    done = reproduce("table3", "--scale", "paper", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["table"] == "table3" and len(table["results"]) == 25
    for result in table["results"]:
        assert result["status"] == "not run" and result["reason"].startswith(
            "needs the LSUN-Bedrooms LDM-4 weights"
        )
        assert all(entry["value"] is None for entry in result["metrics"].values())
    folder = tmp_path / "results" / "paper" / "table3"
    assert {"table.md", "table.html", "table03_bedrooms.ipynb", "table03_bedrooms.html"} <= {
        f.name for f in folder.iterdir()
    }
    text = (folder / "table.md").read_text()
    assert text.count("not run") >= 25 and "needs the LSUN-Bedrooms" in text
    assert str(tmp_path) not in (folder / "table03_bedrooms.ipynb").read_text()


def test_rows_of_a_guided_model_without_weights(tmp_path, monkeypatch, capsys):
    """They say so, and that is no failure."""
    monkeypatch.chdir(tmp_path)
    assert main(["table4", "--scale", "paper", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    reasons = {r["reason"].split(" (")[0] for r in table["results"]}
    assert reasons == {"needs the ImageNet LDM-4 weights"} and len(table["results"]) == 19
    row = table["results"][3]
    assert (row["dataset"], row["sampler"], row["num_inference_steps"], row["guidance_scale"]) == (
        "imagenet",
        "ddim",
        20,
        3.0,
    )
    assert row["metrics"]["inception_score"] == {
        "value": None,
        "std": None,
        "paper": 362.34,
        "independent": {},
        "verdict": "not run",
    }
    folder = tmp_path / "results" / "paper" / "table4"
    assert {"table.md", "table.html", "table04_imagenet.ipynb"} <= {
        f.name for f in folder.iterdir()
    }
    text = (folder / "table.md").read_text()
    assert "| IS paper |" in text and "| 362.34 |" in text
