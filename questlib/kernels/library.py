"""The compiled kernels, or why there are none."""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import record_function

from questlib.kernels.compiler import NoCompilerError, compiled

SWITCH = "QUEST_NO_KERNELS"  # any value: torch's operations are used everywhere


class KernelWarning(UserWarning):
    """Kernels could not be compiled or loaded: torch's operations do their work, more slowly."""


class Kernels(NamedTuple):
    """The kernels, or why there are none."""

    library: ctypes.CDLL | None
    reason: str | None


def kernels() -> Kernels:
    """The kernels of this machine; they are compiled when they are first asked for.

    With $QUEST_NO_KERNELS there are none; that may be set and unset at any time.

    Example:
        >>> from questlib.kernels.library import kernels
        >>> kernels().reason  # None: they are there
    """
    if os.environ.get(SWITCH):
        return Kernels(None, f"${SWITCH} is set")
    return load()


@cache
def load() -> Kernels:
    """Compile and load the kernels, once in a process; a failure is told once."""
    path: Path | None = None
    try:
        path = compiled()
        return Kernels(ctypes.CDLL(str(path)), None)
    except NoCompilerError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{path} cannot be loaded ({error}); delete it to have it compiled again"
    warnings.warn(
        f"CPU kernels: {reason}. Torch's operations are used, which give the same numbers more "
        f"slowly; set ${SWITCH}=1 to do without kernels and this warning",
        KernelWarning,
        stacklevel=3,
    )
    return Kernels(None, reason)


def call(name: str, *arguments: object) -> int:
    """Call a kernel with tensors, ctypes structures and numbers, and torch's number of threads.

    ctypes lets other Python threads run meanwhile. Torch's profiler shows the call as
    `questlib::NAME`.
    """
    function = getattr(kernels().library, name)
    passed = [
        ctypes.c_void_p(None if x is None else x.data_ptr())
        if x is None or isinstance(x, torch.Tensor)
        else ctypes.c_float(x)
        if isinstance(x, float)
        else x
        for x in arguments
    ]
    # A range costs microseconds, which small kernels would feel.
    if torch.autograd._profiler_enabled():
        with record_function(f"questlib::{name}"):
            return function(*passed, torch.get_num_threads())
    return function(*passed, torch.get_num_threads())
