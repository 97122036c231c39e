"""Kernels that a section of benchmarks/gpu.py will need, compiled beforehand by several processes.

Each process takes its share. Afterwards the kernels come from Triton's cache on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from gpu_subjects import BATCHES, FORMATS, FORMS, SHAPES, input_of, load_engine, triton_layer

if TYPE_CHECKING:
    from roofline_launches import Launch, Models


def compile_layers(i: int, n: int, enough: Callable[[str], bool]) -> None:
    """Run every tile that tuning would try, once, for this process's share of the shapes.

    Args:
        i: the share.
        n: of so many.
        enough: whether there is time for it.
    """
    import torch

    engine = load_engine()

    class Compiling(engine.tiles.ConfigCache):
        """Reads and writes no choices, and times nothing."""

        def load(self) -> Path:
            return Path()

        def save(self, path: Path) -> None:
            pass

        def seconds(self, config: Any, run: Callable) -> float:
            return run_once(engine, config, run)

    engine.tiles.CACHE = Compiling()
    for shape, (_, w, a, kind, shift) in list(itertools.product(SHAPES, FORMATS))[i::n]:
        if not enough(f"layers: kernels of share {i} of {n}, from {shape} on"):
            return
        mine = triton_layer(engine, shape, w, a, kind, shift)
        for batch in BATCHES:
            mine(input_of(shape, batch, "cuda", torch.float16))


def run_once(engine: SimpleNamespace, config: Any, run: Callable) -> float:
    """Compile and run one configuration; a tile that this GPU cannot hold is passed over."""
    try:
        run(config)
    except engine.runtime.triton.runtime.errors.OutOfResources:
        pass  # tuning will find the same
    return 0.0


def compile_unets(
    i: int,
    n: int,
    tuned: bool,
    enough: Callable[[str], bool],
    make: Callable[[], Models] | None = None,
    batches: Iterable[int] = BATCHES,
    kinds: Iterable[tuple[int, str]] = tuple(itertools.product((4, 8), FORMS)),
) -> int:
    """Compile what steps of the UNet section launch: this process's share. Nothing is launched.

    Args:
        i: the share.
        n: of so many.
        tuned: whether each tile that tuning would time is compiled, or the first of them alone.
        enough: whether there is time for it.
        make: the UNet; SD v1.4's by default.
        batches: of the steps.
        kinds: bits and name in FORMS of each converted UNet.

    Returns:
        The number of kernels of this share.
    """
    import torch
    from roofline_launches import all_launches, converted, kernel_of, sd14

    gpu = torch.cuda.get_device_properties(0)
    distinct: dict[Any, Launch] = {}
    for bits, form in kinds:
        models = (make or sd14)()
        unet = converted(models, bits=bits, **FORMS[form])
        for batch in batches:
            for launch in all_launches(unet, models, batch, gpu, tuned):
                distinct.setdefault(specialization(launch), launch)
    mine = list(distinct.values())[i::n]
    for k, launch in enumerate(mine):
        if not enough(f"unet: the last {len(mine) - k} kernels of share {i} of {n}"):
            break
        kernel_of(launch.kernel).warmup(grid=launch.grid, **launch.arguments)
    return len(mine)


def specialization(launch: Launch) -> tuple[Any, ...]:
    """What tells a launch's compiled code from another's, at least as finely as Triton does."""
    from roofline_launches import kernel_of

    plain = {p.name for p in kernel_of(launch.kernel).params if not p.is_constexpr}
    return launch.kernel, *(
        (name, _class_of(value) if name in plain else value)
        for name, value in launch.arguments.items()
    )


def _class_of(value: Any) -> Any:
    """Of an argument of a kernel that is no constant."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, abs(value) >= 2**31
    return value.dtype if hasattr(value, "dtype") else type(value)
