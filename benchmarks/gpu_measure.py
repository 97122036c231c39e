"""How fast is one subject on the GPU?

A row of results each for a layer, a block, an attention and a whole UNet.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from gpu_subjects import (
    FORMATS,
    Shape,
    attention_parts,
    input_of,
    module_of,
    triton_layer,
)


def floor_seconds(operations: float, moved: float, peak: float, bandwidth: float) -> float:
    """The least time for so many operations and bytes."""
    return max(operations / peak, moved / bandwidth)


class Timer:
    """Times contenders on the GPU."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.device = torch.device("cuda")
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def graph(self, run: Callable):
        """`run` captured in a CUDA graph: launches cost no time on the host, for any contender."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            run()
        return graph.replay

    def outputs(self, model: Any, batch: int) -> Any:
        """A UNet's output for a step of `batch` pictures."""
        with self.torch.no_grad():
            return model(*step_inputs(batch, self.device, model.dtype)).sample

    def compare(self, runs: dict[str, Callable], repeats: int = 10) -> dict[str, float]:
        """{name: median seconds}, in the order A B .. B A."""
        torch = self.torch
        replays = {name: self.graph(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for names in (list(runs), list(runs)[::-1]):
            for name in names:
                for warm in (True, False):
                    events = []
                    for _ in range(2 if warm else repeats):
                        self.flush.zero_()
                        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        start.record()
                        replays[name]()
                        end.record()
                        events.append((start, end))
                    torch.cuda.synchronize()
                    if not warm:
                        times[name] += [s.elapsed_time(e) / 1e3 for s, e in events]
        return {name: statistics.median(values) for name, values in times.items()}


def layer_row(
    shape: Shape, batch: int, timer: Timer, ceiling: dict[str, float], engine: SimpleNamespace
) -> dict[str, Any]:
    """A layer in each format, also without its quantization, against the libraries' products."""
    import torch

    x = input_of(shape, batch, "cuda", torch.float16)
    runs: dict[str, Callable] = {}
    stored: dict[str, float] = {}  # bytes of a weight
    for name, w, a, kind, shift in FORMATS:
        mine = triton_layer(engine, shape, w, a, kind, shift)
        before = f"{name}, quantized before"
        sent = mine.quantized(mine.rows(x), 0, 0)
        runs[name] = functools.partial(mine, x)
        runs[before] = functools.partial(mine.multiplied, *sent, 0, 0, x.dtype, mine.bias)
        stored[name] = 0.5 if kind == "packed" else 1.0
        stored[before] = stored[name]
    for dtype in (torch.float16, torch.bfloat16):
        plain = module_of(shape).to("cuda", dtype)
        plain = plain.to(memory_format=torch.channels_last) if shape.taps == 3 else plain
        runs[str(dtype).removeprefix("torch.")] = functools.partial(plain, x.to(dtype))
    if shape.taps == 1 and batch * shape.pixels > 16:
        a8, b8 = (
            torch.randint(-127, 128, (rows, shape.inputs), device="cuda", dtype=torch.int8)
            for rows in (batch * shape.pixels, shape.outputs)
        )
        runs["torch._int_mm"] = functools.partial(torch._int_mm, a8, b8.T)
    times = timer.compare(runs)
    fraction = {}
    for name, seconds in times.items():
        integer = "float" not in name
        product = "_int_mm" in name
        act = 1.0 if product or "before" in name else 2.0
        weight = stored.get(name, 1.0 if integer else 2.0)
        moved = shape.bytes(batch, act, weight, 4.0 if product else 2.0)
        peak = ceiling["int8" if integer else "bf16"]
        floor = floor_seconds(shape.operations(batch), moved, peak, ceiling["bandwidth"])
        fraction[name] = floor / seconds
    speedup = {n: times["float16"] / s for n, s in times.items() if n.startswith("W")}
    return dict(
        shape=str(shape),
        batch=batch,
        seconds=times,
        fraction=fraction,
        speedup_over_float16=speedup,
    )


def block_row(shape: Shape, batch: int, timer: Timer, engine: SimpleNamespace) -> dict[str, Any]:
    """GroupNorm, SiLU and a convolution, as in a ResNet block.

    Quantization is fused into what stands before it.
    """
    import torch
    from torch import nn

    x = input_of(shape, batch, "cuda", torch.float16)
    norm = nn.GroupNorm(32, shape.inputs).to("cuda", torch.float16)
    plain = nn.Sequential(norm, nn.SiLU(), module_of(shape).to("cuda", torch.float16)).to(
        memory_format=torch.channels_last
    )
    runs = {
        "float16": functools.partial(plain, x),
        "float16 compiled": functools.partial(torch.compile(plain), x),
    }

    def fused(mine):
        affine = torch.ops.questlib.group_norm_affine(x, norm.weight, norm.bias, 32, norm.eps)
        return mine(x, norm=affine, silu=True)

    for name, w, a, kind, shift in FORMATS:
        mine = triton_layer(engine, shape, w, a, kind, shift)
        runs[name] = functools.partial(fused, mine)
    runs["W8A8, not fused"] = functools.partial(nn.Sequential(norm, nn.SiLU(), mine), x)
    return dict(shape=f"norm, SiLU, {shape}", batch=batch, seconds=timer.compare(runs))


def attention_row(
    queries: int,
    keys: int,
    dim: int,
    batch: int,
    timer: Timer,
    engine: SimpleNamespace,
    heads: int = 8,
) -> dict[str, Any]:
    """An attention with operands of 4 and 8 bits against torch's fused attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (
        torch.randn(batch, n, heads * dim, device="cuda", dtype=torch.float16)
        for n in (queries, keys, keys)
    )
    runs = {}
    for bits in (4, 8):
        mine, _ = attention_parts(engine, bits, heads, dim, "cuda")
        runs[f"A{bits}"] = functools.partial(mine.attend, q, k, v, heads, dim**-0.5)
    runs["float16"] = functools.partial(
        scaled_dot_product_attention,
        *(x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in (q, k, v)),
    )
    return dict(shape=f"attention {queries}x{keys}x{dim}", batch=batch, seconds=timer.compare(runs))


def unet_rows(models: dict[str, Any], batch: int, timer: Timer) -> list[dict[str, Any]]:
    """One step of each UNet, in the order A B .. B A: seconds, peak memory, bytes of weights."""
    import torch

    x, t, text = step_inputs(batch, timer.device, next(iter(models.values())).dtype)
    peaks = {}
    runs = {}
    for name, model in models.items():
        runs[name] = functools.partial(model, x, t, text)
        # Tunes, compiles, fills the tables of the time path, sets the step group.
        with torch.no_grad():
            for _ in range(2):
                runs[name]()
        if hasattr(model, "quest_hook"):
            # It reads the timestep on the host, which a graph cannot hold.
            model.quest_hook.remove()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            runs[name]()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    seconds = timer.compare(runs)
    return [
        dict(
            model=name,
            batch=batch,
            seconds=seconds[name],
            step_peak_bytes=peaks[name],
            weight_bytes=sum(
                v.numel() * v.element_size() for v in (*model.parameters(), *model.buffers())
            ),
        )
        for name, model in models.items()
    ]


def step_inputs(batch: int, device: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Sample, timestep and text of a step of SD v1.4."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 4, 64, 64, generator=generator)
    text = torch.randn(batch, 77, 768, generator=generator)
    x = x.to(device, dtype, memory_format=torch.channels_last)
    return x, torch.tensor(500, device=device), text.to(device, dtype)
