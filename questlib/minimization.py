"""Minimization by Adam that goes on where a stopped run left it, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from questlib.integrity import Tensors
from questlib.stage_cache import Unfinished

Loss = Callable[[int], torch.Tensor]  # of an iteration

MOMENTS = ("exp_avg", "exp_avg_sq")


def minimize(
    loss: Loss,
    groups: list[dict[str, Any]],
    iters: int,
    regularize: Callable[[int], None] | None = None,
    *,
    generator: torch.Generator | None = None,
    unfinished: Unfinished | None = None,
) -> None:
    """Minimize `loss` by Adam.

    Args:
        loss: called with the number of each iteration.
        groups: Adam's parameter groups.
        iters: number of iterations.
        regularize: called with the number of each iteration after the backward pass; may add to
            the gradients.
        generator: the one that the loss draws from, if it does.
        unfinished: where the state is kept now and then, and where that of a stopped run is.

    Raises:
        CheckpointError: the state of the stopped run cannot be read, or does not fit.
    """
    # one fused step for all tensors, where PyTorch has a kernel for it
    devices = {tensor.device.type for group in groups for tensor in group["params"]}
    optimizer = torch.optim.Adam(groups, fused=devices <= {"cpu", "cuda"})
    unfinished = Unfinished() if unfinished is None else unfinished
    state = _State(optimizer, generator)
    first = state.restore(unfinished)
    for i in range(first, iters):
        value = loss(i)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if regularize is not None:
            regularize(i)
        optimizer.step()
        if unfinished.is_due():
            unfinished.save(state.tensors(i + 1))


class _State:
    """All that the next iteration depends on, as tensors of a file."""

    def __init__(self, optimizer: torch.optim.Adam, generator: torch.Generator | None) -> None:
        self.optimizer = optimizer
        self.generator = generator
        self.params = [p for group in optimizer.param_groups for p in group["params"]]

    def tensors(self, iteration: int) -> Tensors:
        """The state before an iteration. Moments that Adam does not have yet are zero."""
        found = {"iteration": torch.tensor(iteration)}
        if self.generator is not None:
            found["generator"] = self.generator.get_state()
        for n, param in enumerate(self.params):
            found[f"{n}.value"] = param.detach()
            moments = self.optimizer.state.get(param, {})
            for name in MOMENTS:
                found[f"{n}.{name}"] = moments.get(name, torch.zeros_like(param))
        return found

    def restore(self, unfinished: Unfinished) -> int:
        """Take over a stopped run's state, if there is one. Returns the iteration that is next."""
        found = unfinished.load(self.tensors(0))
        if found is None:
            return 0
        for n, param in enumerate(self.params):
            param.data.copy_(found[f"{n}.value"])
        if self.generator is not None:
            self.generator.set_state(found["generator"])
        iteration = int(found["iteration"])
        moments = {
            n: {"step": torch.tensor(float(iteration))}
            | {name: found[f"{n}.{name}"] for name in MOMENTS}
            for n in range(len(self.params))
        }
        # It moves the moments to the device and in the type of their parameters.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return iteration
