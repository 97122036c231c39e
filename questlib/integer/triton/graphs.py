"""A denoiser's step as one CUDA graph, for each step group and shape of its inputs.

A step launches some 600 kernels, which take the GPU less time than Python takes to launch them. A
graph is launched at once. It reads its inputs where they were when it was captured: every call
copies them there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from questlib.integer.time_table import TimeTable, fill_rows
from questlib.integer.triton.flags import Flagged
from questlib.integer.triton.fused_attention import FusedAttention


def captured(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture what a function launches: (what launches it again, the function's result)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # kernels are compiled, and tiles chosen
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


class Graphs:
    """In place of a denoiser's `forward`: launches graphs, which are captured when they are new.

    Calls whose samples have several timesteps run as they stand. A copy of the denoiser captures
    graphs of its own.
    """

    def __init__(self, unet: nn.Module) -> None:
        functools.update_wrapper(self, type(unet).forward)
        self.unet = unet
        self.signature = inspect.signature(type(unet).forward)
        self.graphs: dict[Any, _Graph] = {}
        self.moves = -1  # of the tables, when the graphs were captured
        self.tables: list[TimeTable] = []

    def __deepcopy__(self, memo: dict) -> Graphs:
        return Graphs(copy.deepcopy(self.unet, memo))

    def __reduce__(self) -> tuple:
        return Graphs, (self.unet,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.signature.bind(self.unet, *args, **kwargs).arguments)
        given = {k: v for k, v in given.items() if v is not self.unet}
        t = self.unet.quest_steps.timestep
        moves = next(m.moves for m in self.unet.modules() if isinstance(m, Flagged))
        if self.moves != moves:
            self.graphs.clear()  # they read what is no longer there
            self.tables = [m for m in self.unet.modules() if isinstance(m, TimeTable)]
            self.moves = moves
        if t is None or not fill_rows(self.unet, self.tables, given["sample"].dtype):
            return type(self.unet).forward(self.unet, *args, **kwargs)
        given.pop("timestep")
        as_class = given.pop("return_dict", True)
        leaves, spec = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = [None if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
        shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        key = str((self.unet.quest_steps.current, spec, others, shapes))
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = _Graph(self.unet, self.tables, leaves, spec)
        out = graph.run(t, tensors)
        return graph.kind(sample=out) if as_class else (out,)


class _Graph:
    """One graph, its inputs and its output."""

    def __init__(
        self, unet: nn.Module, tables: list[TimeTable], leaves: list[Any], spec: Any
    ) -> None:
        first = next(x for x in leaves if isinstance(x, torch.Tensor))
        self.tables = tables
        self.timestep = torch.zeros((), device=first.device)
        own = [torch.empty_like(x).copy_(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        self.inputs = [x for x in own if isinstance(x, torch.Tensor)]
        self.came = [(weakref.ref(x), -1) for x in self.inputs]  # what was copied last
        self.rows = [torch.empty_like(table.row()).copy_(table.row()) for table in self.tables]
        given = tree_unflatten(own, spec)
        self.timestep.fill_(unet.quest_steps.timestep)

        def run() -> torch.Tensor:
            with fixed_rows(self.tables, self.rows):
                out = type(unet).forward(unet, timestep=self.timestep, **given)
            self.kind = type(out)
            return out.sample

        self.replay, self.out = captured(run)
        # Keys and values of the context are inputs as well, which are computed when it changes.
        group = unet.quest_steps.current
        self.contexts = [
            (module, held)
            for module in unet.modules()
            if isinstance(module, Attention) and isinstance(module.processor, FusedAttention)
            if (held := module.processor.contexts.held.pop(group, None)) is not None
        ]

    def run(self, t: float, tensors: list[torch.Tensor]) -> torch.Tensor:
        """The output for a timestep and the inputs' tensors."""
        self.timestep.fill_(t)
        changed = False
        for i, (own, x) in enumerate(zip(self.inputs, tensors, strict=True)):
            came, version = self.came[i]
            now = -2 if x.is_inference() else x._version  # it does not say when it changes
            if now == -2 or now != version or came() is not x:
                own.copy_(x)
                changed |= i > 0  # the sample always is another
                self.came[i] = (weakref.ref(x), now)
        for own, table in zip(self.rows, self.tables, strict=True):
            own.copy_(table.row())
        if changed:
            for attn, held in self.contexts:
                made = attn.processor.of_context(attn, held.context())
                for own, new in zip(held.made, made, strict=True):
                    own.copy_(new)
        self.replay()
        return self.out.clone()


@contextmanager
def fixed_rows(tables: list[TimeTable], rows: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the tables give these rows, whatever the timestep."""
    for table, row in zip(tables, rows, strict=True):
        table.fixed = row
    try:
        yield
    finally:
        for table in tables:
            table.fixed = None


def use_graphs(unet: nn.Module) -> None:
    """Let a converted denoiser run as CUDA graphs, in place."""
    unet.forward = Graphs(unet)
