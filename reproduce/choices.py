"""What may be chosen about a table's run, each choice said once.

From the fields of `Choices` alone follow the options of `python -m reproduce TABLE`, the
upper-case variables of a table's notebook, and the command that makes a plan again. A new choice
is a new field here, and its use.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from questlib.arguments import DEVICES
from questlib.errors import ConfigError, unknown
from questlib.integer.engines import ENGINES as INTEGER_ENGINES
from reproduce.parameters import check_parameters
from reproduce.scales import FASTEST, SCALES, SIMULATED

FEATURES = ("mini", "inception")

# How the quantized models draw: simulated, in integers, or the faster of these for each row.
ENGINES = (FASTEST, SIMULATED, *INTEGER_ENGINES)


@dataclass(frozen=True)
class Option:
    """How one choice is explained, read and written."""

    help: str
    read: Callable[[Any], Any]
    """From a value in Python, as a notebook has it; ValueError says what was expected."""

    parse: Callable[[str], Any] = str
    """From a command line's text; ValueError likewise."""

    values: tuple[str, ...] = ()
    """What is allowed; without any, everything is."""

    on_command_line: Any = None
    """The default of the command line, where it is another one than the notebook's."""

    for_a_run: bool = False
    """Whether the choice means something only where rows are run, not where they are shown."""

    in_command: bool = True
    """Whether the command that makes a plan again names it. Folders of a machine are left out."""

    always: bool = False
    """Whether that command names the default, too."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _names(value: Any) -> tuple[str, ...]:
    """From ["a", "b"]."""
    if not _is_list_of(str, value) or not all(value):
        raise ValueError('a list of names, such as ["a", "b"]')
    return tuple(value)


def _numbers(value: Any) -> tuple[int, ...]:
    """From [0, 1]."""
    if not _is_list_of(int, value):
        raise ValueError("a list of whole numbers, such as [0, 1]")
    return tuple(value)


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether `value` has items, all of this very type: True is no number here."""
    return isinstance(value, list | tuple) and len(value) > 0 and {kind} == set(map(type, value))


def _split_names(text: str) -> list[str]:
    """From "a,b"."""
    names = text.split(",")
    if not all(names):
        raise ValueError("at least one name, separated by commas")
    return names


def _split_numbers(text: str) -> list[int]:
    """From "0,1"."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError("whole numbers separated by commas") from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("a whole number from 1 on")
    return value


def _parse_count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number from 1 on") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("a path")
    return Path(value)


def _choice(default: Any, help: str, read: Callable[[Any], Any] = _text, **about: Any) -> Any:
    """A field of `Choices`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, read, **about)})


@dataclass(frozen=True)
class Choices:
    """The choices about one run of a table.

    On a command line `keep_seeds` is `--keep-seeds`, in a notebook it is `KEEP_SEEDS`. Lists are
    text with commas on a command line, and lists in Python. None stands for the default.

    Raises:
        ConfigError: a value of another type, or one that is not among those allowed.

    Example:
        >>> Choices(scale="smoke", seeds=[0, 1]).command("table3")
        'python -m reproduce table3 --scale smoke --seeds 0,1'
    """

    scale: str = _choice("mini", ", ".join(SCALES), values=tuple(SCALES), always=True)
    rows: tuple[str, ...] | None = _choice(
        None,
        "ids of some of the table's rows, separated by commas (default: all)",
        _names,
        parse=_split_names,
    )
    seeds: tuple[int, ...] | None = _choice(
        None,
        "numbers separated by commas (default: the scale's)",
        _numbers,
        parse=_split_numbers,
        for_a_run=True,
    )
    keep_seeds: bool = _choice(
        False,
        "keep the other seeds that the row has in --results",
        _flag,
        for_a_run=True,
    )
    stored: bool = _choice(
        False,
        "run nothing, show rows that are there: those in --results, or the published ones where it "
        "has none of this table at this scale",
        _flag,
    )
    features: str | None = _choice(
        None,
        "mini or inception, the features of the metrics (default: the scale's)",
        values=FEATURES,
        for_a_run=True,
    )
    engine: str | None = _choice(
        None,
        "fastest (in integers where a row can on this CPU, otherwise simulated; the row names it), "
        f"fake (simulated), or always in integers: {', '.join(INTEGER_ENGINES)}, whose results are "
        "in TABLE-ENGINE (default: the scale's)",
        values=ENGINES,
    )
    device: str | None = _choice(
        None,
        "cpu or cuda (default: a GPU where there is one)",
        values=DEVICES,
        for_a_run=True,
    )
    model: str | None = _choice(
        None,
        "embedded name, diffusers folder or hub id (default: the scale's)",
        for_a_run=True,
    )
    reference: str | None = _choice(
        None,
        "for FID: embedded name, folder of images, .npz or .safetensors (default: the scale's)",
        for_a_run=True,
    )
    captions: str | None = _choice(
        None,
        "prompts of Stable Diffusion: COCO's captions_val2014.json (default: the scale's)",
        for_a_run=True,
    )
    jobs: int = _choice(
        1,
        "seeds that are made at a time, each by a process with its share of the threads",
        _count,
        parse=_parse_count,
        in_command=False,
    )
    results: Path | None = _choice(
        None,
        "folder of your result files, tables and notebooks; the published ones are in results/, "
        "which only --results results writes",
        _path,
        on_command_line="runs/results",
        in_command=False,
    )
    work: Path | None = _choice(
        None,
        "folder of the stages' artifacts, from which a stopped run goes on",
        _path,
        on_command_line="runs",
        in_command=False,
    )

    def __post_init__(self) -> None:
        for field, option in _options():
            value = getattr(self, field.name)
            if value is None:
                value = field.default
            elif value != field.default or type(value) is not type(field.default):  # True == 1
                value = _checked(field.name, option, value)
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_notebook(cls, names: Mapping[str, Any]) -> Choices:
        """The choices that a notebook's upper-case variables make.

        Args:
            names: the notebook's `globals()`. What is not in upper case is not looked at.

        Raises:
            ConfigError: an upper-case name that is no choice, a choice in lower case, a name that
                papermill set and that is no choice, or a value that is not allowed.
        """
        known = {field.name.upper(): field.name for field, _ in _options()}
        check_parameters(names, known)
        given = {name: value for name, value in names.items() if name.isupper()}
        for name in given:
            if name not in known:
                raise unknown("upper-case names are parameters", name, known)
        return cls(**{known[name]: value for name, value in given.items()})

    def parameters(self, set_there: Collection[str]) -> dict[str, Any]:
        """What papermill has to set so that a notebook makes the same choices.

        Args:
            set_there: upper-case names that the notebook itself sets; these are always given.
        """
        values = {field.name.upper(): getattr(self, field.name) for field, _ in _options()}
        chosen = {name.upper() for name in self.chosen()}
        return {
            name: _plain(value)
            for name, value in values.items()
            if name in chosen or name in set_there
        }

    def chosen(self) -> list[str]:
        """Names of the choices that differ from their defaults."""
        return [f.name for f, _ in _options() if getattr(self, f.name) != f.default]

    def chosen_for_a_run(self) -> list[str]:
        """Those of `chosen` that mean something only where rows are run."""
        return [f.name for f, o in _options() if o.for_a_run and f.name in self.chosen()]

    def command(self, table: str) -> str:
        """The command line that makes these choices about `table`, without folders."""
        words = ["python", "-m", "reproduce", table]
        for field, option in _options():
            value = getattr(self, field.name)
            if option.in_command and (option.always or value != field.default):
                words.append(option_name(field.name))
                words += [] if value is True else [_written(value)]
        return shlex.join(words)


def option_name(choice: str) -> str:
    """How a choice is written on a command line."""
    return f"--{choice.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` an option for each choice; `from_arguments` reads them."""
    for field, option in _options():
        default = field.default if option.on_command_line is None else option.on_command_line
        said = "" if default in (None, False) else f" (default: {default})"
        how: dict[str, Any] = {"action": "store_true"} if field.default is False else {}
        parser.add_argument(
            option_name(field.name), default=default, help=option.help + said, **how
        )


def from_arguments(args: argparse.Namespace) -> Choices:
    """The choices of a parsed command line.

    Raises:
        ConfigError: a value that is not allowed.
    """
    values = {field.name: getattr(args, field.name) for field, _ in _options()}
    for field, option in _options():
        if isinstance(values[field.name], str):
            values[field.name] = _read(field.name, option.parse, values[field.name])
    return Choices(**values)


def _options() -> list[tuple[dataclasses.Field[Any], Option]]:
    return [(field, field.metadata["option"]) for field in dataclasses.fields(Choices)]


def _checked(name: str, option: Option, value: Any) -> Any:
    """The value as the field has it."""
    read = _read(name, option.read, value)
    if option.values and read not in option.values:
        raise unknown(name, read, option.values)
    return read


def _read(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{name}: expected {error}, found {value!r}") from error


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    """The value in types that papermill can write into a notebook."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
