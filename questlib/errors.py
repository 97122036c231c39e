"""Typed errors. Each message is one line: what was expected, and what was found."""

from __future__ import annotations

from collections.abc import Iterable

LONG = 15  # names, that a message does not list where one is near to the wrong one


class QuestError(Exception):
    """Base of all errors that a user can cause.

    The command line prints its message and exits with code 2. A message is one line: names out of
    damaged files may hold anything, and what cannot be printed is escaped.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class ConfigError(QuestError, ValueError):
    """An unknown preset, key or scale, or a value outside its range."""


class NotCalibratedError(QuestError, RuntimeError):
    """A quantized model was run although its activation scales were never set."""


class CheckpointError(QuestError, ValueError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""


class NotFiniteError(QuestError):
    """A weight, an input or an output is NaN or infinite. The message names the layer or step."""


class StorageError(QuestError):
    """A file cannot be written: the disk is full, or the place is read-only."""


class MetricError(QuestError, ValueError):
    """A metric cannot be computed on what it was given (too few samples, wrong size)."""


class EngineError(QuestError, RuntimeError):
    """A layer cannot run in integers on an engine, or its input is not finite.

    The message names the layer.
    """


class TimestepWarning(UserWarning):
    """A timestep lies far from every calibrated step group."""


def did_you_mean(found: object, known: Iterable[object]) -> str:
    """The end of a message about an unknown name: the nearest known one, if any is near.

    Example:
        >>> "found 'qest'" + did_you_mean("qest", ["quest", "minmax"])
        "found 'qest'; did you mean 'quest'?"
    """
    from difflib import get_close_matches

    names = {str(name).lower(): str(name) for name in known}
    near = get_close_matches(str(found).lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def unknown(what: str, found: object, known: Iterable[object]) -> ConfigError:
    """The error for a name that is none of the known ones.

    Example:
        >>> raise unknown("preset", "qest", ["quest", "minmax"])
        ConfigError: preset: expected one of quest, minmax, found 'qest'; did you mean 'quest'?
    """
    names = [str(name) for name in known]
    near = did_you_mean(found, names)
    some = f"{len(names)} names" if near and len(names) > LONG else ", ".join(names)
    return ConfigError(f"{what}: expected one of {some}, found {found!r}{near}")
