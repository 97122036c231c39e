"""An estimate of a UNet step on a GPU: W4A4 on Triton against fp16 under torch.compile. No GPU.

Kernels are counted from the launches that the code makes (`roofline_launches`), all in one CUDA
graph. Each takes the longest of what it computes, what it moves, and a floor below which no kernel
comes. The constants are assumptions and are printed; none was measured on this code.

    python benchmarks/roofline.py                    # every model and batch
    python benchmarks/roofline.py --models sd14 --batches 2
    python benchmarks/roofline.py --write            # for docs/integer-engine.md
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import common
import torch
from roofline_launches import (
    Event,
    Launch,
    Models,
    Operator,
    converted,
    events_of,
    ldm4,
    runtime,
    sd14,
)

RESULT = common.RESULTS / "roofline.json"
MODELS: dict[str, Callable[[], Models]] = {"sd14": sd14, "ldm4": ldm4}


class Gpu(NamedTuple):
    """An H200, and what is expected of code on it."""

    processors: int = 132
    shared: int = 227 << 10
    clock: float = 1.755e9
    int8: float = 1.58e15  # operations a second
    half: float = 0.79e15
    memory: float = 4.3e12  # bytes a second
    cache: float = 7.0e12  # of the L2 cache, for what fits it
    cache_bytes: float = 50e6
    floor: float = 2.3e-6  # seconds of a kernel in a CUDA graph, however small
    int8_share: float = 0.60  # of the peak that our products reach: wgmma waits for each group
    half_share: float = 0.72  # and those of cuBLAS
    conv_share: float = 0.61  # and the convolutions of cuDNN
    attention_int8_share: float = 0.5
    attention_half_share: float = 0.45


GPU = Gpu()
# The share of a product's peak that a tile reaches, by output channels and pixels of the tile.
TILES = {(128, 256): 1.0, (128, 128): 1.0, (64, 128): 0.85, (64, 64): 0.7, (64, 32): 0.4}
SMALLEST_TILE = 0.22


class Estimate(NamedTuple):
    """Seconds and kernels by kind."""

    seconds: Counter
    kernels: Counter

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def count(self) -> int:
        return sum(self.kernels.values())


def moved(size: float) -> float:
    """Seconds of a kernel that moves `size` bytes."""
    speed = GPU.cache if size < GPU.cache_bytes else GPU.memory
    return max(GPU.floor, size / speed + 1.2e-6)


def multiplied(
    m: int, n: int, k: float, peak: float, share: float, tile: tuple[int, int], split: int = 1
) -> float:
    """Seconds of the arithmetic of a product [m, k] x [k, n] in tiles of [tile[0], tile[1]]."""
    blocks = math.ceil(m / tile[0]) * math.ceil(n / tile[1]) * split
    waves = math.ceil(blocks / GPU.processors)
    reached = peak / GPU.processors * share * TILES.get(tuple(sorted(tile)), SMALLEST_TILE)
    return waves * 2 * tile[0] * tile[1] * k / split / reached + 2.0e-6


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- our kernels ----


def gemm(of: dict) -> float:
    taps = of["taps_y"] * of["taps_x"]
    depth = of["span"] * (2 if of["PACKED"] else 1) * taps
    split = of["split"]
    time = multiplied(
        of["M"], of["N"], depth, GPU.int8, GPU.int8_share, (of["BM"], of["BN"]), split
    )
    size = sum(bytes_of(of[x]) for x in ("A", "W", "OUT"))
    size += bytes_of(of["RESIDUAL"]) if of["HAS_RESIDUAL"] else 0
    return max(time, moved(size)) + (handed_over(of, split) if of["SPLIT"] else 0.0)


def handed_over(of: dict, split: int) -> float:
    """Seconds of a split reduction: shares are written, and then read by one block a tile."""
    tile = of["BM"] * of["BN"] * 4
    tiles = math.ceil(of["M"] / of["BM"]) * math.ceil(of["N"] / of["BN"])
    each = GPU.cache / GPU.processors  # bytes a second, when all read
    alone = min(64 * GPU.clock, GPU.cache / tiles)
    return tile / each + split * tile / alone + 1e-6


def quantize(of: dict) -> float:
    # A gather reads single elements.
    return moved((bytes_of(of["X"]) + bytes_of(of["OUT"])) * (1.6 if of["ORDERED"] else 1.0))


def quantize_rows(of: dict) -> float:
    size = bytes_of(of["X"]) + sum(bytes_of(of[f"OUT{i}"]) for i in range(of["RESULTS"]))
    return moved(size * (1.6 if of["ORDERED"] else 1.0))


def attention(of: dict) -> float:
    """Two passes over the scores, and one over the values."""
    heads = of["OUT"].shape[0] * of["heads"]
    scores = heads * of["queries"] * of["keys"]
    products = 6 * scores * of["BD"] / (GPU.int8 * GPU.attention_int8_share)
    # Special functions: 16 a cycle for two exp2, 64 for two conversions. 13 other operations a
    # score, counted in the PTX, of 128 a cycle.
    cycles = GPU.processors * GPU.clock
    special = scores * (2 / 16 + 2 / 64) / cycles
    other = scores * 13 / 128 / cycles
    if of["P_CONSTANT"]:
        # Each block adds up its values: a conversion and an addition of each.
        other += scores * 2 * of["BD"] / of["BQ"] / 128 / cycles
    # Keys that come by single bytes are not copied asynchronously: each block waits for its own.
    blocks = scores / (of["BQ"] * of["BK"]) / GPU.processors
    waits = 0.0 if key_width(of) >= 4 else blocks * 2 * 700 / GPU.clock
    return max(GPU.floor, products + max(special, other) + waits + 2e-6)


def key_width(of: dict) -> int:
    """Bytes of a key that one load reads: as many as the compiler knows to be aligned."""
    dim = inspect.signature(runtime.attention_kernels.attention.fn).parameters["dim"]
    constant = "constexpr" in str(dim.annotation)
    return math.gcd(of["dim"], 16) if constant or of["dim"] % 16 == 0 else 1


def sdpa(of: dict, batch: int) -> float:
    width = 64 if of["dim"] <= 64 else 128 if of["dim"] <= 128 else 256
    scores = batch * of["heads"] * of["queries"] * of["keys"]
    return max(GPU.floor + 1e-6, 4 * scores * width / (GPU.half * GPU.attention_half_share) + 2e-6)


def launch_seconds(launch: Launch) -> tuple[str, float]:
    """(kind, seconds) of one of our kernels."""
    of = launch.arguments
    if launch.kernel == "gemm":
        return "gemm", gemm(of | {"split": launch.grid[1]})
    if launch.kernel == "quantize":
        return "quantize", quantize(of)
    if launch.kernel == "quantize_rows":
        return "quantize", quantize_rows(of)
    if launch.kernel == "attention":
        return "attention", attention(of)
    if launch.kernel == "sdpa":
        return "attention", sdpa(of, launch.grid[0])
    if launch.kernel == "moments":
        return "norm", moved(bytes_of(of["X"]))
    if launch.kernel == "group_affine":
        return "norm", moved(bytes_of(of["MOMENTS"]))
    raise ValueError(f"no estimate for the kernel {launch.kernel}")


# ---- other operators ----

NORMS = ("native_group_norm", "native_layer_norm")


def product_seconds(of: Operator) -> float:
    """A product in half precision, by the best of some tiles and splits."""
    m, n, k = of.product
    share = GPU.conv_share if of.taps > 1 else GPU.half_share
    times = []
    for tile in TILES:
        for split in (1, 2, 4, 8):
            if split > 1 and k / split < 256:
                continue
            time = multiplied(m, n, k, GPU.half, share, tile, split)
            if split > 1:
                time += 2 * GPU.floor + m * n * 12 / GPU.cache
            times.append(time)
    size = sum(of.inputs.values()) + sum(of.outputs.values())
    return max(min(times), moved(size))


def operator_size(of: Operator) -> int:
    return sum(of.inputs.values()) + sum(of.outputs.values())


def estimate(events: list[Event], compiled: bool = False) -> Estimate:
    """The time of what is launched.

    Args:
        events: in their order.
        compiled: whether torch.compile has fused the operators. Neighbours that work element by
            element are one kernel then, and what directly follows a norm is part of it.
    """
    found = Estimate(Counter(), Counter())

    def add(kind: str, seconds: float) -> None:
        found.seconds[kind] += seconds
        found.kernels[kind] += 1

    run: list[Operator] = []  # operators that are fused

    def end_run() -> None:
        if run:
            made = {key for of in run for key in of.outputs}
            size = sum({k: v for of in run for k, v in of.inputs.items() if k not in made}.values())
            size += sum(run[-1].outputs.values())
            norm = any(of.name in NORMS for of in run)
            add("norm" if norm else "other", moved(size))
            run.clear()

    for event in events:
        if isinstance(event, Launch):
            end_run()
            add(*launch_seconds(event))
        elif event.product is not None:
            end_run()
            add("gemm", product_seconds(event))
        elif event.name in NORMS:
            end_run()
            if event.name == "native_group_norm":
                # Its statistics, before they are applied.
                add("norm", moved(sum(event.inputs.values())))
            if compiled:
                run.append(event)
            else:
                add("norm", moved(operator_size(event)))
        elif compiled:
            run.append(event)
        else:
            add("other", moved(operator_size(event)))
    end_run()
    return found


def seconds_of(events: list[Event]) -> float:
    return estimate(events).total


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--write", action="store_true", help=f"also write {RESULT}")
    arguments = parser.parse_args()
    rows = list(estimates(arguments.models, arguments.batches))
    if arguments.write:
        common.write_json(RESULT, {"assumed": GPU._asdict(), "rows": rows})


def estimates(models: list[str], batches: list[int]) -> Iterator[dict[str, Any]]:
    """Each model and batch, printed as it comes."""
    print(f"assumed: {GPU}")
    gpu = SimpleNamespace(
        multi_processor_count=GPU.processors,
        shared_memory_per_block_optin=GPU.shared,
        major=9,
        minor=0,
    )
    kinds = ("gemm", "quantize", "attention", "norm", "other")
    for name in models:
        of = MODELS[name]()
        plain = of.full.eval().requires_grad_(False).half()
        found = {
            ("fp16 compiled", batch): estimate(
                events_of(plain, of, batch, gpu, seconds_of), compiled=True
            )
            for batch in batches
        }
        for weights, attention in product(("packed", "int8"), ("quantized", "auto")):
            of = MODELS[name]()
            unet = converted(of, weights=weights, attention=attention)
            what = f"W4A4, {weights} weights" + (", attention auto" * (attention == "auto"))
            for batch in batches:
                events = events_of(unet, of, batch, gpu, seconds_of)
                found[what, batch] = estimate(events)
        for (what, batch), mine in sorted(found.items(), key=lambda pair: pair[0][1]):
            speed_up = found["fp16 compiled", batch].total / mine.total
            parts = ", ".join(f"{k} {mine.seconds[k] * 1e3:.2f}/{mine.kernels[k]}" for k in kinds)
            print(
                f"{name} batch {batch} {what:34s} {mine.total * 1e3:6.2f} ms, "
                f"{mine.count:4d} kernels, x {speed_up:.2f} (ms/kernels: {parts})"
            )
            yield {
                "model": name,
                "batch": batch,
                "what": what,
                "ms": round(mine.total * 1e3, 3),
                "kernels": mine.count,
                "speed_up": round(speed_up, 3),
            }


if __name__ == "__main__":
    main()
