"""What README, CONTRIBUTING and docs/ tell a reader to do can be done."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from PIL import Image

import questlib.__main__
import reproduce.__main__

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
PARSERS = {"questlib": questlib.__main__.parser, "reproduce": reproduce.__main__.parser}
# First words of commands that are not run here, and need no check.
OF_THE_SHELL = {"source", "export", "echo", "pip", "conda"}


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in one language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", path.read_text(), re.M | re.S)
    return [re.sub(f"^{indent}", "", code, flags=re.M) for indent, code in found]


def commands(path: Path) -> list[list[str]]:
    """Every shell command of a page, in words."""
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]


def made(path: Path) -> set[str]:
    """Targets of make that a page names in code."""
    text = path.read_text()
    code = [" ".join(words) for words in commands(path)]
    code += re.findall(r"`([^`\n]*)`", text) + re.findall(r"^ {4}make .*$|run: .*$", text, re.M)
    names = re.compile(r"\bmake ([a-z][a-z0-9-]*)(?![\w-])")
    return {name for part in code for name in names.findall(part)}


# ---- README ----


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200
    assert README.stat().st_size <= 12_000


def test_readme_and_citation_name_the_same_paper():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    bibtex = " ".join(blocks(README, "bibtex")[0].split()).replace("{", "").replace("}", "")
    people = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert f"author = {' and '.join(people)}," in bibtex
    assert f"title = {paper['title']}," in bibtex
    assert f"pages = {paper['start']}--{paper['end']}," in bibtex
    assert f"year = {paper['year']}" in bibtex


def in_little(code: str) -> str:
    """The same code with a few iterations, samples and steps."""
    code = re.sub(r"\b(adaround_iters|tla_iters|cma_iters|num_samples)=\d+", r"\1=2", code)
    return re.sub(r"\bnum_inference_steps=\d+", "num_inference_steps=4", code)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_code_runs_and_saves_an_image_in_integers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / name, "python")
    assert 'engine="cpu"' in code
    exec(compile(in_little(code), name, "exec"), {})
    (image,) = tmp_path.glob("*.png")
    assert Image.open(image).size == (64, 64)


# ---- every page ----


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_to_a_file(name):
    path = ROOT / name
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
    for url in re.findall(r"\]\(([^()\s]+)\)", text):
        parts = urlsplit(url)
        if not parts.scheme and parts.path:
            assert (path.parent / parts.path).exists(), f"{name} links to {url}"


def test_every_target_of_make_resolves():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    pages = [*PAGES, ROOT / ".github" / "workflows" / "ci.yml"]
    for target in sorted(set().union(*map(made, pages))):
        done = subprocess.run(
            ["make", "-n", target, "SCALE=smoke"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_readme_names_targets_and_commands():
    assert {"install", "show-table3", "reproduce-table2", "site"} <= made(README)
    assert ["jupyter", "lab", "notebooks/00_tour.ipynb"] in commands(README)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name):
    for words in commands(ROOT / name):
        if words[:2] == ["accelerate", "launch"]:
            words = ["python", *words[2:]]
        if words[:2] == ["python", "-m"]:
            check_module(words[2], words[3:])
        elif words[0] in ("python", "jupyter"):
            assert (ROOT / words[-1]).is_file(), " ".join(words)
        else:  # targets of make have a test of their own
            assert words[0] in {"make", *OF_THE_SHELL}, " ".join(words)


def check_module(module: str, words: list[str]) -> None:
    """Whether a module of ours knows a command line."""
    if module in PARSERS:
        PARSERS[module]().parse_args(words)
        return
    told = help_of(module, words[0])
    for option in (word for word in words if word.startswith("--")):
        assert option in told, f"{module} {words[0]} {option}"


@cache
def help_of(module: str, command: str) -> str:
    """What a module says of one of its commands."""
    done = subprocess.run(
        [sys.executable, "-m", module, command, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{module} {command}: {done.stderr}"
    return done.stdout
