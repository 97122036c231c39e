"""Is one layer right on the GPU, under every tile?

Accumulators are compared with the oracle's, outputs with the simulation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from gpu_subjects import attention_parts, random_layer


class Job(NamedTuple):
    """One layer to be checked."""

    make: Callable
    size: tuple[int, ...]
    extra: dict
    w_bits: int
    a_bits: int
    kind: str
    seed: int


def jobs(small: bool) -> list[Job]:
    """All layers to be checked, in every format; small: as the interpreter can take them."""
    from torch import nn

    cases = [
        (lambda: nn.Linear(75, 70), (3, 37, 75), {}),
        (lambda: nn.Linear(256, 192), (130, 256), {}),
        (lambda: nn.Linear(64, 64), (20, 64), dict(shift=True)),
        (lambda: nn.Linear(200, 40), (3, 20, 200), dict(token=True)),
        (lambda: nn.Conv2d(150, 20, 3, padding=1), (1, 150, 5, 4), dict(shift=True)),
        (lambda: nn.Conv2d(48, 20, 1), (2, 48, 5, 4), dict(split=30)),
        (lambda: nn.Conv2d(40, 36, 3, padding=1), (2, 40, 7, 6), {}),
        (lambda: nn.Conv2d(64, 33, 3, 2, 1), (1, 64, 9, 8), {}),
        (lambda: nn.Conv2d(3, 8, (3, 2), (2, 1), (0, 2)), (2, 3, 8, 9), {}),
    ]
    if not small:
        cases += [
            (lambda: nn.Linear(640, 1280), (2, 500, 640), {}),
            (lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 16, 16), {}),
            (lambda: nn.Conv2d(1280, 640, 3, padding=1), (1, 1280, 8, 8), {}),
            (lambda: nn.Linear(2560, 64), (3, 2560), {}),
        ]
    formats = ((4, 4, "packed"), (4, 4, "int8"), (4, 8, "packed"), (4, 8, "int8"), (8, 8, "int8"))
    return [Job(*case, *of, seed) for seed, case in enumerate(cases) for of in formats]


def check(job: Job, engine: SimpleNamespace, device: str) -> tuple[int, float, list[str]]:
    """(configurations checked, largest relative error in float32, what is wrong)"""
    import torch

    extra = {k: v for k, v in job.extra.items() if k != "shift" or job.a_bits <= 4}
    layer, steps = random_layer(job.make(), job.w_bits, job.a_bits, seed=job.seed, **extra)
    steps.select_group(job.seed % 2)
    x = torch.randn(job.size) * 2
    _, accs = engine.layer_forward(layer, x)
    expected = layer(x)
    expected_half = layer(x.half().float())
    name = (
        f"W{job.w_bits}A{job.a_bits} {job.kind} {type(layer).__name__} {tuple(layer.weight.shape)}"
    )
    mine = engine.TritonLayer(engine.integer_form(layer, name), steps, job.kind).to(device)
    sent = x.to(device)
    checked = 0
    worst = 0.0
    failures = []

    def error(y, of):
        return ((y.float().cpu() - of).abs().max() / of.abs().max()).item()

    for config in each_tile(engine, mine, device, job.seed):
        try:
            exact = all(
                torch.equal(a.long().cpu(), b)
                for a, b in zip(mine.accumulators(sent), accs, strict=True)
            )
            full = error(mine(sent), expected)
            half = error(mine(sent.half()), expected_half)
        except engine.runtime.triton.runtime.errors.OutOfResources as resources:
            # It can be chosen, and then stops the layer.
            failures.append(f"{name} {config}: {resources}")
            continue
        checked += 1
        worst = max(worst, full)
        if not exact or not full <= 1e-5 or not half <= 2e-3:
            failures.append(f"{name} {config}: exact {exact}, error {full:.1e}, float16 {half:.1e}")
    engine.check_finite(mine)
    sent.view(-1)[-1] = float("nan")
    mine(sent)
    if not int(mine.flag):
        failures.append(f"{name}: NaN not flagged")
    return checked, worst, failures


def each_tile(engine: SimpleNamespace, layer, device: str, seed: int) -> Iterator[Any]:
    """Tile configurations that can be chosen for this layer, one after the other in force.

    Half of them have a split reduction. Each is compiled three times: a third of them is tried for
    each layer.
    """
    if device == "cpu":
        yield "interpreted"
        return
    part = layer.parts[0]
    outputs, _, span = part.weight.shape
    gpu = engine.tiles.Gpu.of(part.weight.device)
    tiles = [
        c._replace(split=(1, 3)[(i + seed // 3) % 2])
        for i, c in enumerate(gpu.table.tiles)
        if span % c.bk == 0 and not (part.ends and c.bk > 64)
    ]
    packed = layer.kind == "packed"
    fit = [c for c in tiles if engine.tiles.serves(c, outputs, packed, gpu)]
    chosen = engine.tiles.CACHE
    engine.tiles.CACHE = engine.tiles.ConfigCache()
    try:
        for config in fit[seed % 3 :: 3] or fit[:1]:
            engine.tiles.CACHE.choose = functools.partial(fixed, config)
            yield config
    finally:
        engine.tiles.CACHE = chosen


def fixed(config: Any, *_: Any) -> Any:
    """In place of `ConfigCache.choose`."""
    return config


def attention_error(
    engine: SimpleNamespace,
    bits: int,
    device: str,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
) -> float:
    """Mean error against fake quantization, relative to the largest output.

    Codes on a rounding edge may differ by one.
    """
    import torch

    mine, acts = attention_parts(engine, bits, heads, dim, device)
    q, k, v = (torch.randn(2, n, heads * dim) for n in (queries, keys, keys))
    fq, fk, fv = (
        a(x).unflatten(-1, (heads, dim)).transpose(1, 2)
        for a, x in zip(acts, (q, k, v), strict=False)
    )
    expected = (acts[3]((fq @ fk.mT * dim**-0.5).softmax(-1)) @ fv).transpose(1, 2).flatten(2)
    found = mine.attend(q.to(device), k.to(device), v.to(device), heads, dim**-0.5).cpu()
    return ((found - expected).abs().mean() / expected.abs().max()).item()
