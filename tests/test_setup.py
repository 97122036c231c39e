"""The set-up files agree with each other and with what is installed."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reproduce.environment import VARIABLES, set_defaults
from reproduce.tables.registry import all_tables

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
OTHERS = "questlib[reproduce,docs]"
DEV = [requirement for requirement in EXTRAS["dev"] if requirement != OTHERS]
ALL = [*PROJECT["dependencies"], *EXTRAS["reproduce"], *EXTRAS["docs"], *DEV]
PINS = {
    canonicalize_name(line.split("==")[0]): line.strip().split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


@pytest.mark.parametrize("requirement", ALL)
def test_every_dependency_is_pinned_within_its_range(requirement):
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])
    # another machine's torch may be another, allowed one
    assert wanted.specifier.contains(version(wanted.name), prereleases=True)


def test_developers_have_what_the_reproduction_and_the_site_need():
    assert OTHERS in EXTRAS["dev"]


def test_constraints_name_no_host_and_no_path():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", line) for line in lines)
    assert "questlib" not in PINS


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "pip" in conda and pip[0] == "-c constraints.txt" and "-e .[dev]" in pip
    (python,) = (d.removeprefix("python=") for d in conda if d.startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)
    # whatever else it lists by name must be a dependency here, in the same words
    assert set(pip[2:]) <= set(ALL)
    assert environment["name"] == PROJECT["name"]


def test_licence_and_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_all_name_the_same_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.M)
    assert newest and newest[1] == PROJECT["version"] == citation["version"]


@pytest.mark.parametrize(("name", "code"), [(n, c) for n, c in PROJECT["scripts"].items()])
def test_commands_are_installed_and_return_their_exit_code(name, code, capsys):
    (script,) = entry_points(group="console_scripts", name=name)
    assert script.value == code
    main = script.load()
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code in (0, None) and "usage" in capsys.readouterr().out


def test_questlib_finds_the_embedded_models_by_entry_point():
    (embedded,) = entry_points(group="questlib.pipelines")
    assert callable(embedded.load())


@pytest.mark.parametrize("package", ["questlib", "reproduce"])
def test_every_data_file_is_installed(package):
    """A wheel has the modules and what `package-data` names."""
    root = ROOT / package
    patterns = SETTINGS["tool"]["setuptools"]["package-data"][package]
    installed = {path for pattern in patterns for path in root.glob(pattern)}
    files = {path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} <= installed


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text() and "make test" in script.read_text()


def make(*arguments: str) -> subprocess.CompletedProcess:
    """make, without the variables of a make that runs these tests."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def test_every_make_target_of_help_resolves():
    for target in re.findall(r"^  make ([a-z0-9-]+) ", make("help").stdout, re.M):
        make("-n", target, "SCALE=smoke")


def test_workflow_runs_on_all_versions_and_systems_that_are_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    steps = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    assert jobs["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert {"make lint", "make units"} <= set(steps["tests"])
    assert "make notebook-tests" in steps["notebooks"]
    assert jobs["imports"]["strategy"]["matrix"]["os"] == ["windows-latest", "macos-latest"]
    assert not any("make" in run or "[dev]" in run for run in steps["imports"])


def test_pre_commit_has_the_pinned_ruff():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (ruff,) = (repo for repo in config["repos"] if repo["repo"].endswith("/ruff-pre-commit"))
    assert ruff["rev"] == f"v{PINS['ruff']}"
    assert {"ruff-check", "ruff-format"} == {hook["id"] for hook in ruff["hooks"]}


@pytest.mark.parametrize(
    "target",
    [
        "help",
        "install",
        "lint",
        "test",
        "notebooks",
        "readme",
        "site",
        "reproduce-all",
        "reproduce-table3",
    ]
    + [t.target for t in all_tables().values()],
)
def test_make_help_lists_the_target(target):
    listed = make("help").stdout
    assert re.search(rf"^  make {target} ", listed, re.M)


def make_plan_of(target: str) -> list[str]:
    """What `make TARGET` would run of this package."""
    return re.findall(r"-m reproduce (.*)", make("-n", target, "SCALE=smoke").stdout)


@pytest.mark.parametrize("name", VARIABLES)
def test_make_and_the_driver_set_the_same_environment(name):
    """Whichever starts the notebooks' kernels; what a user has set stays."""
    makefile = (ROOT / "Makefile").read_text()
    with patch.dict(os.environ):
        os.environ.pop(name, None)
        set_defaults()
        assert re.search(rf"^export {name} \?= (.+)$", makefile, re.M)[1] == os.environ[name]
        os.environ[name] = ""
        set_defaults()
        assert os.environ[name] == ""


SMOKE = '--scale smoke --results "runs/results"'
ALONE = f"{SMOKE} --jobs 2"  # reproduce-all has two tables at a time instead


def test_every_table_has_its_target():
    tables = all_tables()
    for name, table in tables.items():
        assert make_plan_of(table.target) == [f"{name} {ALONE}"]
    assert sorted(make_plan_of("reproduce-all")) == sorted(
        f"{name} {SMOKE}" for name, t in tables.items() if t.in_paper
    )
    assert make_plan_of("reproduce-table3") == [
        f"table3 {ALONE}",
        f"table3-churches {ALONE}",
    ]
    assert make_plan_of("reproduce-table4") == [f"table4 {ALONE}"]


@pytest.mark.parametrize("number", [3, 4, 5])
def test_show_takes_the_names_that_reproduce_takes(number):
    shown = make_plan_of(f"show-table{number}")
    made = make_plan_of(f"reproduce-table{number}")
    assert shown == [plan.replace("--jobs 2", "--stored") for plan in made]


@pytest.mark.parametrize(
    ("active", "expected"),
    [("VIRTUAL_ENV", True), ("CONDA_PREFIX", True), ("base", False), (None, False)],
)
def test_make_uses_the_active_environment(tmp_path, active, expected):
    """An active environment is used, but neither conda's base nor one that is gone."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(os.path.realpath("/bin/true"))
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "MAKEFLAGS")
    }
    environment |= {
        "VIRTUAL_ENV": {"VIRTUAL_ENV": str(tmp_path)},
        "CONDA_PREFIX": {"CONDA_PREFIX": str(tmp_path), "CONDA_DEFAULT_ENV": "quest"},
        "base": {"CONDA_PREFIX": str(tmp_path), "CONDA_DEFAULT_ENV": "base"},
        None: {"VIRTUAL_ENV": str(tmp_path / "gone")},
    }[active]
    plan = subprocess.run(
        ["make", "--no-print-directory", "-n", "reproduce-table2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    last = plan.stdout.strip().splitlines()[-1]
    used = tmp_path if expected else ROOT / ".venv"
    command = "-m reproduce table2 --scale mini --results"
    assert last == f'"{used}/bin/python" {command} "runs/results" --jobs 2'


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_a_checkout_stays_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 60 * 2**20
