"""What a machine can do to a run: full disks, a kernel that dies, no git, odd locales, no HOME."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from papermill.exceptions import PapermillExecutionError

from questlib import distributed
from questlib.errors import ConfigError, MetricError, QuestError, StorageError
from reproduce import notebooks, provenance
from reproduce.__main__ import main
from reproduce.evaluation import features
from reproduce.reporting import report
from reproduce.results import Status
from reproduce.table_results import without_numbers

ROW = "bedrooms-fp"
KERNEL = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}


@pytest.fixture
def of_code(tiny_plan, tmp_path, monkeypatch):
    """of_code(text) -> a plan whose notebook is one cell of this code."""

    def made(text: str):
        plan = tiny_plan(rows=[ROW])
        parameters = nbformat.v4.new_code_cell("SCALE = None", metadata={"tags": ["parameters"]})
        cells = [parameters, nbformat.v4.new_code_cell(text)]
        folder = tmp_path / "notebooks"
        folder.mkdir()
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), folder / plan.table.notebook
        )
        monkeypatch.setattr(notebooks, "NOTEBOOKS", folder)
        return plan

    return made


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (
            "from questlib.errors import StorageError\nraise StorageError('cannot write x')",
            QuestError,
            "^cannot write x$",
        ),
        ("open('/dev/full', 'w').write('x' * 10**6)", StorageError, "No space left on device"),
        ("import os\nos.kill(os.getpid(), 9)", QuestError, "kernel has ended.*lack of memory"),
        ("1 / 0", PapermillExecutionError, "ZeroDivisionError"),
    ],
)
def test_what_a_user_can_repair_is_one_line(of_code, code, error, says):
    plan = of_code(code)
    with pytest.raises(error, match=says):
        notebooks.execute(plan)


def test_a_device_that_is_not_here_is_refused_before_any_work(tiny_plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda: expected an NVIDIA GPU"):
        notebooks.preflight(tiny_plan(rows=[ROW], device="cuda"))
    notebooks.preflight(tiny_plan(rows=[ROW], device="cpu"))


def test_a_device_cannot_be_changed_afterwards(tiny_plan, monkeypatch):
    """Rows would silently be made on the device that the process has."""
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="--device cpu: this process uses cuda already"):
        notebooks.preflight(tiny_plan(rows=[ROW], device="cpu"))


def test_an_installed_package_without_notebooks_says_so_before_any_work(
    tiny_plan, tmp_path, monkeypatch
):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    with pytest.raises(ConfigError, match="checkout"):
        notebooks.preflight(tiny_plan(rows=[ROW]))


def python(
    code: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


COMMIT = "from reproduce.provenance import provenance as p; print(p()['commit'], p()['dirty'])"


def test_without_git_there_is_no_commit(tmp_path):
    done = python(COMMIT, PATH=str(tmp_path))
    assert done.returncode == 0 and done.stdout.strip() == b"None None", done.stderr


def test_a_copy_in_another_repository_does_not_have_its_commit(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    shutil.copytree(provenance.ROOT / "questlib", tmp_path / "copy" / "questlib", symlinks=True)
    shutil.copytree(
        provenance.ROOT / "reproduce",
        tmp_path / "copy" / "reproduce",
        ignore=shutil.ignore_patterns("weights"),
    )
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "another project"], check=True)
    done = python(COMMIT, tmp_path / "copy", PYTHONPATH=str(tmp_path / "copy"))
    assert done.stdout.strip() == b"None None", done.stderr


def test_signs_that_a_terminal_lacks_do_not_stop_a_command():
    code = """
import argparse, sys
from questlib import arguments
parser = arguments.Parser(prog="x")
parser.set_defaults(run=lambda args: print("1.0 \\u00b1 0.1"))
sys.exit(arguments.run(parser, []))
"""
    done = python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (0, b"1.0 ? 0.1\n"), done.stderr


def test_output_to_a_full_disk_is_one_line():
    code = """
import sys
from questlib import arguments
parser = arguments.Parser(prog="x")
parser.set_defaults(run=lambda args: print("y" * 100))
sys.exit(arguments.run(parser, []))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


def test_names_and_reasons_are_no_html(tiny_plan):
    plan = tiny_plan(rows=[ROW])
    reason = "<script>alert(1)</script>"
    without_numbers(plan.rows[0], plan, Status.FAILED, reason).write(plan.row_file(ROW))
    results = report.finish(plan)
    for text in (report.html(results), report.markdown(results)):
        assert "<script>" not in text and "&lt;script&gt;" in text


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_inceptions_weights_is_run(tmp_path):
    torch.save({"state": Harmful(tmp_path / "run")}, tmp_path / "weights.pt")
    with pytest.raises(MetricError, match="expected weights alone"):
        features.InceptionFeatures("test", ["2048"], str(tmp_path / "weights.pt"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_while_sampling_is_exit_code_2_and_goes_on(tiny, tmp_path, capsys):
    asked = ["sample", "--model", str(tiny / "model"), "--steps", "2", "--num-samples", "2"]
    (tmp_path / "file").write_text("")
    assert main([*asked, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
