"""Where the Triton kernels run: on an NVIDIA GPU, or in Triton's interpreter on CPU tensors.

The interpreter needs the environment variable TRITON_INTERPRET=1 before triton is first imported:
its own library functions are decorated then. CPU builds of torch come without triton: `triton` and
the kernels are None there.
"""

from __future__ import annotations

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


def require_engine() -> None:
    """Check that the kernels can run here.

    Raises:
        EngineError: there is no triton, or no GPU.
    """
    if triton is None:
        raise EngineError(
            "engine triton: expected the package triton (it comes with CUDA builds of torch), "
            "found none"
        )
    if not INTERPRET and not torch.cuda.is_available():
        raise EngineError(
            "engine triton needs an NVIDIA GPU, found none; "
            "for tests set TRITON_INTERPRET=1 before triton is imported"
        )


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
    require_engine()
    if x.dtype not in FLOATS:
        raise EngineError(f"{name}: expected float32, float16 or bfloat16 input, found {x.dtype}")
    if not INTERPRET and not x.is_cuda:
        raise EngineError(f"{name}: engine triton needs input on an NVIDIA GPU, found {x.device}")
    if found != expected:
        raise EngineError(f"{name}: expected {expected} input channels, found {found}")


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Kernels launched inside run on x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
