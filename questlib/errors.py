"""Typed errors. Each message is one line: what was expected, and what was found."""

from __future__ import annotations


class QuestError(Exception):
    """Base of all errors that a user can cause.

    The command line prints its message and exits with code 2.
    """


class ConfigError(QuestError, ValueError):
    """An unknown preset, key or scale, or a value outside its range."""


class NotCalibratedError(QuestError, RuntimeError):
    """A quantized model was run although its activation scales were never set."""


class CheckpointError(QuestError, ValueError):
    """A checkpoint is damaged, incomplete, or belongs to another model."""


class MetricError(QuestError, ValueError):
    """A metric cannot be computed on what it was given (too few samples, wrong size)."""


class EngineError(QuestError, RuntimeError):
    """A layer cannot run in integers on an engine, or its input is not finite.

    The message names the layer.
    """


class TimestepWarning(UserWarning):
    """A timestep lies far from every calibrated step group."""
