"""Several processes on one job (`accelerate launch`). With one process everything here gives back what it got."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, reduce

PATIENCE = timedelta(
    days=2
)  # without a common cache each process runs AdaRound: hours, at whose end some are minutes ahead


def processes() -> PartialState:
    """The processes of this job. On a machine without CUDA they are CPU processes that talk by gloo, whatever launched them."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def device() -> torch.device:
    """Of this process. Plain "cpu", not "cpu:0": moving to that copies, which changes strides of single samples and so bits.

    On CUDA convolutions are switched from TF32, torch's default, to float32: the linear layers are, and integers are exact.
    """
    found = processes().device
    if found.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return torch.device("cpu") if found.type == "cpu" else found


def broadcast_from(tensors: dict[str, torch.Tensor] | None, owner: int) -> dict[str, torch.Tensor]:
    """The tensors of process `owner`, on every process, on the CPU and bit for bit; what the others pass does not count."""
    state = processes()
    if state.num_processes == 1:
        return tensors
    mine = state.process_index == owner
    shapes = [{k: (v.shape, v.dtype) for k, v in tensors.items()} if mine else None]
    broadcast_object_list(shapes, from_process=owner)
    return {
        k: broadcast(
            (tensors[k].contiguous() if mine else torch.empty(shape, dtype=dtype)).to(device()),
            owner,
        ).cpu()
        for k, (shape, dtype) in shapes[0].items()
    }


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes."""
    return reduce(tensor, "mean") if processes().num_processes > 1 else tensor


@torch.no_grad()
def synchronize(module: torch.nn.Module) -> None:
    """Give every process the parameters and buffers of process 0: rounding on different devices may differ in the last bits."""
    if processes().num_processes > 1:
        for value in (*module.parameters(), *module.buffers()):
            broadcast(value.data, 0)
