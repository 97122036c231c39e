"""One field of `Choices` is an option, a parameter of the notebooks, and part of the command."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

import papermill
import pytest

from questlib.errors import ConfigError
from questlib.integer.engines import ENGINES
from reproduce.choices import Choices, add_options, from_arguments, option_name
from reproduce.notebooks import NOTEBOOKS
from reproduce.plan import make_plan
from reproduce.scales import SCALES

# For each choice a value as Python has it, and as a command line has it.
EXAMPLES = {
    "scale": ("smoke", "smoke"),
    "rows": (("bedrooms-fp", "bedrooms-w4a4-quest"), "bedrooms-fp,bedrooms-w4a4-quest"),
    "seeds": ((3, 4), "3,4"),
    "keep_seeds": (True, None),
    "stored": (True, None),
    "features": ("inception", "inception"),
    "engine": ("cpu", "cpu"),
    "device": ("cpu", "cpu"),
    "model": ("a folder", "a folder"),
    "reference": ("images", "images"),
    "captions": ("captions.json", "captions.json"),
    "jobs": (2, "2"),
    "results": (Path("there"), "there"),
    "work": (Path("here"), "here"),
}
NAMES = [field.name for field in dataclasses.fields(Choices)]


def parse(words: list[str]) -> Choices:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return from_arguments(parser.parse_args(words))


def options(name: str) -> list[str]:
    text = EXAMPLES[name][1]
    return [option_name(name)] if text is None else [option_name(name), text]


def test_every_choice_has_an_example_here():
    assert NAMES == list(EXAMPLES)


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_the_same_from_everywhere(name):
    value, text = EXAMPLES[name]
    expected = Choices(**{name: value})
    assert getattr(expected, name) == value
    assert getattr(parse(options(name)), name) == value

    # Into a notebook and back.
    parameters = expected.parameters(())
    assert list(parameters) == [name.upper()]
    assert Choices.from_notebook(parameters | {"__name__": "x", "other": 1}) == expected
    assert Choices.from_notebook({name.upper(): None}) == Choices()


def test_the_command_makes_the_same_choices_but_for_folders_and_processes():
    chosen = Choices(**{name: value for name, (value, _) in EXAMPLES.items() if name != "stored"})
    words = shlex.split(chosen.command("table3"))
    assert words[:4] == ["python", "-m", "reproduce", "table3"]
    unsaid = {name: getattr(chosen, name) for name in ("results", "work", "jobs")}
    assert dataclasses.replace(parse(words[4:]), **unsaid) == chosen
    assert Choices().command("table3") == "python -m reproduce table3 --scale mini"


def test_defaults():
    assert Choices().chosen() == []
    command_line = parse([])
    assert (command_line.results, command_line.work) == (Path("runs/results"), Path("runs"))
    assert make_plan("table2", Choices(), dry=True).seeds == (0, 1)


def test_what_a_notebook_sets_is_set_again():
    """Or its own values would stay: mini scale, and the published rows."""
    there = papermill.inspect_notebook(str(NOTEBOOKS / "table03_bedrooms.ipynb"))
    assert Choices().parameters(there) == {"SCALE": "mini", "STORED": False}
    assert Choices(scale="smoke", seeds=[5]).parameters(there) == {
        "SCALE": "smoke",
        "STORED": False,
        "SEEDS": [5],
    }


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"CELLS": ["bedrooms-fp"]}, "expected one of SCALE, ROWS, SEEDS.*found 'CELLS'"),
        ({"SEED": [1]}, "found 'SEED'; did you mean 'SEEDS'?"),
        ({"scale": "smoke"}, "found 'scale'; did you mean 'SCALE'?"),
        ({"SCALE": "Smoke"}, "found 'Smoke'; did you mean 'smoke'?"),
        ({"SCALE": "huge"}, f"scale: expected one of {', '.join(SCALES)}, found 'huge'"),
        ({"SCALE": 3}, "scale: expected text, found 3"),
        *(
            ({"ROWS": value}, "rows: expected a list of names")
            for value in ([], 3, "bedrooms-fp", [""], [3])
        ),
        *(
            ({"SEEDS": value}, "seeds: expected a list of whole numbers")
            for value in ("0,1", "0", 0, [0.5], ["0"], [True], [])
        ),
        ({"KEEP_SEEDS": "False"}, "keep_seeds: expected True or False"),
        ({"STORED": 1}, "stored: expected True or False"),
        ({"FEATURES": "clip"}, "features: expected one of mini, inception"),
        ({"ENGINE": "gpu"}, f"engine: expected one of fastest, fake, {', '.join(ENGINES)}"),
        ({"RESULTS": 3}, "results: expected a path"),
    ],
)
def test_wrong_values_are_named(names, says):
    with pytest.raises(ConfigError, match=says):
        Choices.from_notebook(names)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", ""], "rows: expected at least one name, separated by commas"),
        (["--rows", "a,,b"], "rows: expected at least one name, separated by commas"),
        (["--seeds", "one"], "seeds: expected whole numbers separated by commas, found 'one'"),
        (["--seeds", "0.5"], "seeds: expected whole numbers separated by commas"),
    ],
)
def test_wrong_text_is_named(options, says):
    with pytest.raises(ConfigError, match=says):
        parse(options)
