"""The set-up files agree with each other and with what is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reproduce.tables.registry import all_tables

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEV = PROJECT["optional-dependencies"]["dev"]
PINS = {
    canonicalize_name(line.split("==")[0]): line.strip().split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *DEV])
def test_every_dependency_is_pinned_within_its_range(requirement):
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(PINS[canonicalize_name(wanted.name)])
    assert wanted.specifier.contains(
        version(wanted.name), prereleases=True
    )  # another machine's torch may be another, allowed one


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
    assert set(pip[2:]) <= {*PROJECT["dependencies"], *DEV}
    assert environment["name"] == PROJECT["name"]


def test_licence_and_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        PROJECT["license"] == citation["license"] == "Apache-2.0"
        and citation["version"] == PROJECT["version"]
    )
    assert "Apache License" in (ROOT / "LICENSE").read_text()


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


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "GLIBC_TUNABLES"])
def test_make_and_the_driver_set_the_same_environment(name):
    """Whichever starts the notebooks' kernels; what a user has set stays."""
    code = f"import os, reproduce; print(os.environ[{name!r}])"
    env = {k: v for k, v in os.environ.items() if k != name}
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=e,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for e in (env, env | {name: ""})
    ]
    assert found == [
        re.search(rf"^export {name} \?= (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1),
        "",
    ]


def test_every_table_has_its_target():
    tables = all_tables()
    for name, table in tables.items():
        assert make_plan_of(table.target) == [f"{name} --scale smoke"]
    assert sorted(make_plan_of("reproduce-all")) == sorted(
        f"{name} --scale smoke" for name, t in tables.items() if t.in_paper
    )
    assert make_plan_of("reproduce-table3") == [
        "table3 --scale smoke",
        "table3-churches --scale smoke",
    ]
    assert make_plan_of("reproduce-table4") == ["table4 --scale smoke"]


@pytest.mark.parametrize(
    ("active", "expected"),
    [("VIRTUAL_ENV", True), ("CONDA_PREFIX", True), ("base", False), (None, False)],
)
def test_make_uses_the_active_environment(tmp_path, active, expected):
    """An active virtual or conda environment is used; conda's base and an environment that is gone are not."""
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
    assert (
        last
        == f'"{tmp_path if expected else ROOT / ".venv"}/bin/python" -m reproduce table2 --scale mini'
    )
