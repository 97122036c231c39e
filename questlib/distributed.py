"""Several processes on one job (`accelerate launch`), and the device that each of them uses.

With a single process every function here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce

from questlib.errors import ConfigError

# How long a process waits for the others. Without a common cache each process runs AdaRound
# itself, which takes hours, and some finish minutes before others.
PATIENCE = timedelta(days=2)


def processes() -> PartialState:
    """The processes of this job.

    Without CUDA they are CPU processes that communicate by gloo, however they were launched.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def device() -> torch.device:
    """The device of this process.

    On a CPU it is plain "cpu", not "cpu:0". Moving a tensor to "cpu:0" copies it, which changes the
    strides of single samples, and with them the last bits of results.
    """
    found = processes().device
    return torch.device("cpu") if found.type == "cpu" else found


def chosen_device(name: str | None) -> torch.device:
    """The device of this process where a user may choose: "cpu" or "cuda".

    To be called before `processes`. None: a GPU where there is one.

    Raises:
        ConfigError: there is no GPU that torch can use, or this process has another device already.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: expected an NVIDIA GPU that torch can use, found none")
    if name == "cpu":
        PartialState(cpu=True, timeout=PATIENCE)
    found = device()
    if name is not None and found.type != name:
        raise ConfigError(
            f"--device {name}: this process uses {found.type} already; start a new one"
        )
    return found


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """torch computes with `count` CPU threads in the block; the order of its sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_full_float32() -> None:
    """Switch TF32 off for the whole process: CUDA computes in float32 with all its bits.

    PyTorch uses TF32, which keeps 10 of 23 bits, for convolutions unless told otherwise. Simulated
    quantization then differs from integers, which are exact. Command lines and drivers call this
    once before they load a model; a program that uses questlib as a library decides for itself.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def broadcast_from(tensors: dict[str, torch.Tensor] | None, owner: int) -> dict[str, torch.Tensor]:
    """Give every process the tensors of one process, bit for bit.

    All processes must call this together.

    Args:
        tensors: those to share, in process `owner`; ignored in the others, which may pass None.
        owner: index of the process whose tensors are shared.

    Returns:
        The owner's tensors, on the CPU. A single process gets back the very dict that it passed.

    Raises:
        ValueError: the owner passed None.
    """
    state = processes()
    is_owner = state.process_index == owner
    if is_owner and tensors is None:
        raise ValueError(f"broadcast_from: process {owner} owns the tensors but passed None")
    if state.num_processes == 1 and tensors is not None:
        return tensors
    own = tensors if is_owner and tensors is not None else {}
    described = [{name: (value.shape, value.dtype) for name, value in own.items()}]
    broadcast_object_list(described, from_process=owner)
    shared = {}
    for name, (shape, dtype) in described[0].items():
        value = own[name].contiguous() if is_owner else torch.empty(shape, dtype=dtype)
        shared[name] = broadcast(value.to(device()), owner).cpu()
    return shared


def broadcast_value(value: Any, owner: int) -> Any:
    """Give every process a value of one process, as pickle carries it."""
    values = [value]
    broadcast_object_list(values, from_process=owner)
    return values[0]


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    return reduce(tensor, "mean") if processes().num_processes > 1 else tensor


@torch.no_grad()
def synchronize(module: torch.nn.Module) -> None:
    """Give every process the parameters and buffers of process 0.

    Rounding on different devices may differ in the last bits; from here on it does not matter.
    """
    if processes().num_processes > 1:
        for value in (*module.parameters(), *module.buffers()):
            broadcast(value.data, 0)
