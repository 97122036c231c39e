"""Generated README blocks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from questlib.errors import QuestError
from reproduce.readme import BLOCKS, render

ROOT = Path(__file__).resolve().parents[2]


def test_readme_is_up_to_date_with_the_results(tmp_path):
    """Of what git has staged: a user's own run, which replaces results, does not make this fail. Without git: of the files."""
    inside = subprocess.run(["git", "ls-files", "--error-unmatch", "README.md"], cwd=ROOT, capture_output=True, check=False)
    if inside.returncode == 0:
        prefix = f"--prefix={tmp_path}/"
        names = subprocess.run(
            ["git", "ls-files", "README.md", "results", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        subprocess.run(["git", "checkout-index", prefix, "--stdin"], cwd=ROOT, input=names.stdout, text=True, check=True)
    else:
        shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
        for folder in ("results", "benchmarks"):
            shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True)
    text = (tmp_path / "README.md").read_text()
    assert text == render(text, tmp_path / "results"), "README.md is older than results/: run `make readme`"


def test_blocks_are_replaced_and_the_rest_stays(tmp_path):
    text = "before\n" + "".join(f"<!-- generated: {n} -->\nold\n<!-- end: {n} -->\nbetween {n}\n" for n in BLOCKS)
    new = render(text, tmp_path)
    assert new.startswith("before\n") and "old" not in new and all(f"between {n}\n" in new for n in BLOCKS)
    assert render(new, tmp_path) == new
    assert "not measured yet" in new and "not run" in new  # no results: said, not left empty


def test_wrong_blocks(tmp_path):
    with pytest.raises(QuestError, match="tables"):
        render("<!-- generated: commands -->\n<!-- end: commands -->\n", tmp_path)
