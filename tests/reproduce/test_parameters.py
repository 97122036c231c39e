"""Parameters that a notebook does not have, set by hand or by papermill."""

from __future__ import annotations

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from questlib.errors import ConfigError
from reproduce.notebooks import NOTEBOOKS
from reproduce.parameters import check_parameters

OWN = 'import importlib.util\n\nif importlib.util.find_spec("x"):\n    pass'
SET = '# Parameters: a comment of our own\nSCALE = "mini"\nIMAGES = 24'


def injected(*lines: str) -> dict[str, object]:
    """The names of a notebook after papermill's cell, as IPython has them."""
    names: dict[str, object] = {"In": ["", OWN, SET, "\n".join(["# Parameters", *lines])]}
    exec("\n".join([SET, *lines]), names)
    return names


@pytest.mark.parametrize("known", [None, ["SCALE", "IMAGES"]])
def test_known_names_pass(known):
    check_parameters(injected('SCALE = "smoke"', "IMAGES = 8"), known)
    check_parameters({"In": ["", OWN, SET, "%matplotlib inline"], "SCALE": "mini"}, known)


@pytest.mark.parametrize("known", [None, ["SCALE", "IMAGES"]])
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('scale = "smoke"', "expected one of .*, found 'scale'; did you mean 'SCALE'?"),
        ("IMAGE = 3", "found 'IMAGE'; did you mean 'IMAGES'?"),
        ("other = 3", "found 'other'$"),
    ],
)
def test_unknown_names_are_named_with_the_nearest(line, says, known):
    with pytest.raises(ConfigError, match=says):
        check_parameters(injected(line), known)


def test_a_name_in_lower_case_is_found_without_papermill():
    with pytest.raises(ConfigError, match="did you mean 'SCALE'"):
        check_parameters({"scale": "smoke", "SCALE": "mini"}, ["SCALE"])
    check_parameters({"model": object(), "MODEL": "mini-ldm4"}, ["MODEL"])  # no parameter's value


@pytest.mark.parametrize("name", ["table02.ipynb", "10_integer_engine.ipynb"])
def test_papermill_says_so_before_any_work(name, tmp_path):
    with pytest.raises(PapermillExecutionError, match="found 'steps'|found 'scale'"):
        papermill.execute_notebook(
            NOTEBOOKS / name,
            tmp_path / name,
            parameters={"scale": "smoke"} if name.startswith("table") else {"steps": 3},
            progress_bar=False,
        )
