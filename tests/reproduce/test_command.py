"""The command line: help, wrong input, and what a table says when nothing can run."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import questlib
from reproduce.__main__ import COMMANDS, main
from reproduce.scales import SCALES
from reproduce.tables.registry import all_tables

SCALE_NAMES = ", ".join(SCALES)
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
        (["table99"], "did you mean 'table9'?"),
        (["tabel3"], "did you mean 'table3'?"),
        (["sampel"], "did you mean 'sample'?"),
        (["table4", "--dry-run", "--scale", "smoek"], "did you mean 'smoke'?"),
        (["table4", "--dry-run", "--rows", "imagenet-pf"], "did you mean 'imagenet-fp'?"),
        (["table4", "--dry-run", "--engine", "trition"], "did you mean 'triton'?"),
        (["table9", "--model", "x"], "rows are of bedrooms, imagenet: choose some (--rows)"),
        (["table4", "--captions", "x", "--dry-run"], "no use for prompts"),
        (["table4", "--dry-run", "--scale", "huge"], "found 'huge'"),
        (["table4", "--dry-run", "--rows", "imagenet-w9a9"], "found 'imagenet-w9a9'"),
        (
            ["table2", "--scale", "huge"],
            f"scale: expected one of {', '.join(SCALES)}, found 'huge'",
        ),
        (["table2", "--rows", "fp,nothing"], "found 'nothing'"),
        (["table2", "--rows", ""], "rows: expected at least one name"),
        (["table2", "--seeds", "one"], "seeds: expected whole numbers separated by commas"),
        (["table2", "--results", "file/below"], "cannot be written"),
        (["table2", "--work", "file"], "cannot be written"),
        (["table2", "--model", "./no/such/folder"], "unknown model './no/such/folder'"),
        (["table2", "--resolts", "x"], "unrecognized arguments"),
        (["table2", "--stored", "--seeds", "0"], "expected no --seeds"),
        (["table2", "--stored", "--scale", "paper"], "expected rows of table2 at paper scale"),
        (["notebooks", "nowhere.ipynb"], "found no file nowhere.ipynb"),
        ([], "required"),
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
    assert not list(tmp_path.glob("**/*.json"))


TINY_RUN = ["table3", "--scale", "smoke", "--rows", "bedrooms-fp", "--work", "work"]


@pytest.mark.parametrize(
    ("marker", "found"),
    [
        (None, "found artifacts of a questlib before 0.2"),
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
        == f"python -m reproduce: scale: expected one of {', '.join(SCALES)}, found 'huge'\n"
    )


HEAVY = ("torch", "diffusers", "transformers", "pandas", "matplotlib", "papermill", "triton")


@pytest.mark.parametrize("package", ["questlib", "reproduce"])
def test_help_is_answered_at_once(package, tmp_path):
    """Nothing heavy is loaded. CPU time, so that a loaded machine does not matter."""
    code = f"""
import runpy, sys
try:
    runpy.run_module({package!r}, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code
print("loaded:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.startswith(f"usage: python -m {package}")
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("arguments", [["table3", "--dry-run"], ["--help"]])
def test_a_reader_that_leaves_early_ends_the_command_quietly(arguments):
    """As `... | head` does."""
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "reproduce", *arguments],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    # argparse itself ignores that its help cannot be written.
    assert done.returncode in (0, 141) and done.stderr == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"questlib {questlib.__version__}\n"


def test_every_command_has_its_help(capsys):
    for command in (*all_tables(), *COMMANDS):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"python -m reproduce {command}" in capsys.readouterr().out


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupt(*args, **choices):
        raise KeyboardInterrupt

    monkeypatch.setattr("reproduce.plan.make_plan", interrupt)
    assert main(["table2", "--dry-run"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "goes on where this stopped" in err


def test_paper_scale_without_weights(tmp_path):
    """Every row says "not run" and why, the table is whole, and stdout is JSON alone."""
    done = reproduce("table3", "--scale", "paper", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert table["table"] == "table3" and len(table["rows"]) == 25
    for row in table["rows"]:
        result = row["result"]
        assert result["status"] == "not run"
        assert result["reason"].startswith("needs the LSUN-Bedrooms LDM-4 weights")
        assert all(metric["value"] is None for metric in row["metrics"].values())
    folder = tmp_path / "runs" / "results" / "paper" / "table3"
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
    reasons = {row["result"]["reason"].split(" (")[0] for row in table["rows"]}
    assert reasons == {"needs the ImageNet LDM-4 weights"} and len(table["rows"]) == 19
    row = table["rows"][3]
    conditions = row["result"]["conditions"]
    assert conditions["dataset"] == "imagenet"
    assert conditions["sampling"] == {
        "sampler": "ddim",
        "num_inference_steps": 20,
        "eta": 0.0,
        "guidance_scale": 3.0,
    }
    assert row["metrics"]["inception_score"] == {"value": None, "std": None}
    assert row["specified"]["paper"]["inception_score"] == 362.34
    assert row["verdicts"]["inception_score"]["order"] == "not run"
    folder = tmp_path / "runs" / "results" / "paper" / "table4"
    assert {"table.md", "table.html", "table04_imagenet.ipynb"} <= {
        f.name for f in folder.iterdir()
    }
    text = (folder / "table.md").read_text()
    assert "| IS paper |" in text and "| 362.34 |" in text
