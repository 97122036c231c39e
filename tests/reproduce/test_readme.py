"""Generated README blocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from made_results import made_result

from questlib.errors import QuestError
from reproduce.reporting import benchmarks, findings, overview
from reproduce.reporting.readme import AT_BUILD, BLOCKS, fill, pages, rebased, update

ROOT = Path(__file__).resolve().parents[2]


def test_readme_and_docs_are_up_to_date_with_the_results(tmp_path):
    """Of what git has staged: a user's own run, which replaces results, does not make this fail.

    Without git: of the files.
    """
    parts = ["README.md", "docs", "results", "benchmarks"]
    listed = subprocess.run(
        ["git", "ls-files", *parts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "README.md" in listed.stdout.splitlines():
        subprocess.run(
            ["git", "checkout-index", f"--prefix={tmp_path}/", "--stdin"],
            cwd=ROOT,
            input=listed.stdout,
            text=True,
            check=True,
        )
    else:
        shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
        for folder in parts[1:]:
            shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True)
    for path, text in pages(tmp_path, tmp_path / "results"):
        name = path.relative_to(tmp_path)
        assert path.is_file(), f"{name} is missing: run `make readme`"
        assert path.read_text() == text, f"{name} is older than results/: run `make readme`"


@pytest.fixture
def reproduce_all(tmp_path):
    """(file of times, make): the Makefile's own recipe in `tmp_path`.

    There is no table to make, and the clock stands still.
    """
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "installed").touch()
    log = tmp_path / "results" / "mini" / "all-time"
    log.parent.mkdir(parents=True)
    clock = tmp_path / "bin" / "date"
    clock.parent.mkdir()
    clock.write_text("#!/bin/sh\necho 1000\n")
    clock.chmod(0o755)
    environment = os.environ | {"PATH": f"{clock.parent}{os.pathsep}{os.environ['PATH']}"}

    def make(*options: str, check: bool = True) -> None:
        words = ["make", "reproduce-all", "-o", "installed", "STAMP=installed", "PAPER="]
        words += ["RESULTS=results", *options]
        subprocess.run(words, cwd=tmp_path, capture_output=True, check=check, env=environment)

    return log, make


def measured(folder: Path) -> str:
    """What the README says of the time of `make reproduce-all`, by the results in `folder`."""
    lines = BLOCKS["commands"](folder / "results").splitlines()
    (line,) = (line for line in lines if line.startswith("| `make reproduce-all`"))
    return line.split(" | ")[2]


def with_all_blocks(folder: Path) -> Path:
    """A repository whose README has every block."""
    blocks = "\n".join(f"<!-- generated: {name} -->\n<!-- end: {name} -->" for name in BLOCKS)
    (folder / "README.md").write_text(blocks)
    return folder


def test_reproduce_all_is_timed_over_all_its_sessions(tmp_path, reproduce_all):
    """One that is stopped, one that ends; what comes later is told apart."""
    log, make = reproduce_all
    log.write_text("999 0\n")  # of the committed run: a run from nothing begins anew
    make("JOBS=none", check=False)
    assert log.read_text() == "0 2\n"
    assert measured(tmp_path) == "not measured yet"
    (tmp_path / "runs" / "evaluate").mkdir(parents=True)
    log.write_text("600 stopped\n" + log.read_text())
    make()
    make()
    assert [line.split()[1] for line in log.read_text().splitlines()] == ["stopped", "2", "0", "0"]
    assert update(with_all_blocks(tmp_path), tmp_path / "results", tmp_path / "runs")
    assert "| 10.0 min in 3 sessions |" in (tmp_path / "README.md").read_text()
    found = log.read_text()
    log.write_text(found + "90 0\n")
    assert measured(tmp_path) == "10.0 min in 3 sessions; later, rows of newer code: 1.5 min"
    log.write_text(found)
    make("-n")
    assert log.read_text() == found
    log.unlink()  # something was there already: not the whole
    make()
    assert log.read_text() == "warm\n0 0\n"
    assert measured(tmp_path) == "not measured yet"


def test_update_writes_tables_and_only_reads_results(tmp_path):
    """The rows' files stay as they are."""
    row = tmp_path / "results" / "mini" / "table3" / "bedrooms-fp.json"
    made_result({"fid": [1.0]}, row="bedrooms-fp").write(row)
    before = row.read_bytes(), row.stat().st_mtime_ns
    assert update(with_all_blocks(tmp_path), tmp_path / "results", tmp_path / "runs")
    assert (row.read_bytes(), row.stat().st_mtime_ns) == before
    assert (row.parent / "table.md").is_file()
    assert not (tmp_path / "results" / "mini" / "table2").exists()  # it has no rows
    assert "1.00" in (tmp_path / "docs" / "results" / "table3.md").read_text()
    assert not update(tmp_path, tmp_path / "results", tmp_path / "runs")


@pytest.mark.parametrize(
    ("before", "after"), [("600 stopped\n", "600 stopped\n0 0\n"), (None, "warm\n0 0\n")]
)
def test_the_time_of_unfinished_rows_adds_to_that_of_the_rows_that_are_there(
    reproduce_all, before, after
):
    """Another clone goes on with the rows, and the times, that are committed."""
    log, make = reproduce_all
    if before is not None:
        log.write_text(before)
    make("UNFINISHED=1")
    assert log.read_text() == after


def test_blocks_are_replaced_and_the_rest_stays(tmp_path):
    text = "before\n" + "".join(
        f"<!-- generated: {n} -->\nstale\n<!-- end: {n} -->\nbetween {n}\n" for n in BLOCKS
    )
    new = fill(text, tmp_path)
    assert new.startswith("before\n")
    assert "stale" not in new
    assert all(f"between {n}\n" in new for n in BLOCKS)
    assert fill(new, tmp_path) == new
    # No results: this is said, not left empty.
    assert "not measured yet" in new
    assert "not run" in new


def test_blocks_that_the_site_writes_stay(tmp_path):
    text = "".join(f"<!-- generated: {n} -->\nas it is\n<!-- end: {n} -->\n" for n in AT_BUILD)
    assert fill(text, tmp_path) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- generated: timess -->\n<!-- end: timess -->\n", "timess: expected one of"),
        ("<!-- generated: claims -->\n", "expected <!-- end: NAME -->"),
        ("<!-- generated: claims -->\n<!-- end: picture -->\n", "expected <!-- end: NAME -->"),
    ],
)
def test_wrong_blocks(text, words, tmp_path):
    with pytest.raises(QuestError, match=words):
        fill(text, tmp_path)


def test_links_are_seen_from_the_page():
    text = "[a](docs/claims.md) ![b](results/p.png) [c](https://x.org/d) [e](#f)"
    assert (
        rebased(text, "docs")
        == "[a](claims.md) ![b](../results/p.png) [c](https://x.org/d) [e](#f)"
    )
    assert rebased(text, "") == text


def test_claims_of_the_story_are_all_there():
    """Each line of README's summary is about claims; none has lost its claim."""
    assert all(part.claims for parts in overview.STORY.values() for part in parts)
    assert all(question.claims for question in findings.QUESTIONS)
    assert len(overview.STORY) == 7


def test_the_answers_follow_the_numbers(tmp_path):
    """The same question, answered by two results."""
    rows = tmp_path / "results" / "mini" / "ablation"
    asked = "## Is it finetuning that does the work?\n\n"
    for fid, answer in ((9.0, "**Yes.**"), (1.0, "**No.**")):
        for row, value in (("w4a4-quest", 5.0), ("w4a4-not-finetuned", fid)):
            numbers = {"fid": [value, value], "feature_distance_to_fp": [value, value]}
            made_result(numbers, table="ablation", row=row).write(rows / f"{row}.json")
        assert asked + answer in findings.answers(tmp_path / "results")


def test_each_machine_that_was_measured_has_a_column(tmp_path):
    """NAME.json is the first machine's, NAME_MACHINE.json another's."""
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    published = ROOT / "benchmarks" / "results" / "cpu_unet.json"
    first = json.loads(published.read_text(encoding="utf-8"))
    (folder / "cpu_unet.json").write_text(json.dumps(first), encoding="utf-8")
    other = first["models"]["sd14"]
    other["provenance"]["machine"]["cpu"] = "Another"
    other["variants"]["w4a4-fused"]["step_s"] = 7.25
    del other["variants"]["bf16-compiled"]
    (folder / "cpu_unet_other.json").write_text(json.dumps(first), encoding="utf-8")
    assert benchmarks.of_machines(tmp_path / "results", "cpu_unet") == [
        "cpu_unet",
        "cpu_unet_other",
    ]
    lines = benchmarks.savings(tmp_path / "results").splitlines()
    cells = {c[1].strip(): c[3].strip() for line in lines if len(c := line.split("|")) > 3}
    assert cells[""] == "step, Another"
    assert cells["bfloat16, compiled"] == "-"
    assert cells["**W4A4 in integers, `fuse=True`**"] == "7.2 s"
    assert "Another, 2 cores" in benchmarks.engines(tmp_path / "results")
