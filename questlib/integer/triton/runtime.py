"""Where the Triton kernels run: on an NVIDIA GPU, or in Triton's interpreter on CPU tensors.

The interpreter needs the environment variable TRITON_INTERPRET=1 before triton is first imported:
its own library functions are decorated then. CPU builds of torch come without triton: `triton` and
the kernels are None there.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from questlib.errors import EngineError


def _module(name: str) -> Any:
    """A module that needs triton, or None."""
    return None if find_spec("triton") is None else import_module(name)


triton = _module("triton")
attention_kernels = _module("questlib.integer.triton.attention_kernels")
gemm_kernels = _module("questlib.integer.triton.gemm_kernels")
norm_kernels = _module("questlib.integer.triton.norm_kernels")
quantize_kernels = _module("questlib.integer.triton.quantize_kernels")


def _interpreted() -> bool:
    if triton is None:
        return False
    functions = (gemm_kernels.gemm, triton.language.zeros)
    return not any(isinstance(function, triton.JITFunction) for function in functions)


INTERPRET = _interpreted()  # whether the kernels run in the interpreter
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # compute capability: products of bytes and asynchronous copies as Triton has them


def require_engine() -> None:
    """Check that the kernels can run here.

    Raises:
        EngineError: there is no triton, no GPU that torch can use, one that is too old, or no C
            compiler. The message says what is needed, and what was found.
    """
    if triton is None:
        raise EngineError(
            "engine triton: expected the package triton (it comes with CUDA builds of torch), "
            "found none"
        )
    if INTERPRET:
        return
    if not torch.cuda.is_available():
        raise EngineError(
            f"engine triton needs an NVIDIA GPU, found none{_why_no_gpu()}; "
            "for tests set TRITON_INTERPRET=1 before triton is imported"
        )
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        raise EngineError(
            "engine triton needs a GPU of compute capability 8.0 or newer (A100, RTX 30, L4, H100 "
            f"...), found {torch.cuda.get_device_name()} with {found[0]}.{found[1]}; "
            'engine "cpu" runs the same integers'
        )
    # Triton compiles the functions that launch its kernels.
    if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
        raise EngineError(
            "engine triton needs a C compiler, found neither gcc nor clang nor the variable CC"
        )


def _why_no_gpu() -> str:
    """What torch says about it, such as that the driver is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).splitlines()[0]})"
    return ""


def check_input(x: torch.Tensor, name: str, found: int | str, expected: int) -> None:
    """Check that the engine can run on x.

    Args:
        x: the input.
        name: of the layer, for messages.
        found: the number of its channels, or what it has in place of channels.
        expected: the number of channels that the layer takes.

    Raises:
        EngineError: it cannot; the message names the layer.
    """
    if x.dtype not in FLOATS:
        raise EngineError(f"{name}: expected float32, float16 or bfloat16 input, found {x.dtype}")
    if not INTERPRET and not x.is_cuda:
        require_engine()
        raise EngineError(f"{name}: engine triton needs input on an NVIDIA GPU, found {x.device}")
    if found != expected:
        raise EngineError(f"{name}: expected {expected} input channels, found {found}")


def check_size(*tensors: torch.Tensor) -> None:
    """Check that the kernels can find each value of some tensors.

    Raises:
        EngineError: a value lies so far from the first one that 32 bits do not hold its place.
    """
    for x in tensors:
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        if x.numel() and last >= 2**31:
            raise EngineError(
                f"engine triton: a tensor of shape {list(x.shape)} is too large for 32-bit "
                "indices; take a smaller batch"
            )


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Kernels launched inside run on x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
