"""Hooks: outputs and calls of named layers, and forward passes that stop early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.calibration import Batch

pass
from contextlib import suppress


class StopForward(Exception):
    """Ends a forward pass of which nothing more is needed."""


@contextmanager
def capture_outputs(
    unet: nn.Module, names: list[str], device: str | None = None, stop: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block, the dict holds the last output of each named layer, with its gradient history; on `device` if given.

    stop: leave the block as soon as each of them has run, without what a UNet computes after the last one.
    """
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            outputs[name] = out if device is None else out.to(device)
            if stop and len(outputs) == len(names):
                raise StopForward

        return keep

    handles = [unet.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def run_time_layers(unet: nn.Module, t: torch.Tensor) -> None:
    """Run only the layers that map t to the embedding and its projections, t int64 [T] (Property 1: they see t alone)."""
    steps = getattr(unet, "quest_steps", None)
    if steps is not None:
        steps.current = steps.lookup(t)
    emb = unet.time_embedding(unet.time_proj(t).to(unet.dtype))  # [T, 4 * width]
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.time_emb_proj(emb if block.skip_time_act else block.nonlinearity(emb))


@torch.no_grad()
def capture_calls(unet: nn.Module, name: str, inputs: Batch, size: int = 64) -> tuple[list, list]:
    """What block `name` received (by position or keyword) and gave in a run of the UNet: two lists, `size` inputs an entry."""
    received, gave = [], []

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
        received.append((args, kwargs))
        gave.append(out)
        raise StopForward  # what comes after the block is not needed

    handle = unet.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        for part in inputs.split(size):
            with suppress(StopForward):
                part.run(unet)
    finally:
        handle.remove()
    return received, gave
