"""What is emulated: layers, attention and normalization, each against the int64 oracle."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checks import (
    TOLERANCE,
    AttentionJob,
    BrokenJob,
    CodesJob,
    GatedJob,
    Job,
    LayerJob,
    Make,
    NormJob,
    TogetherJob,
)
from torch import nn

from questlib.integer.triton.tiles import SPLITS, Config, Gpu, serves

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check  # noqa: E402


def linear(inputs: int, outputs: int) -> Make:
    return lambda: nn.Linear(inputs, outputs)


def conv(inputs: int, outputs: int, size: int = 3, **choices: Any) -> Make:
    return lambda: nn.Conv2d(inputs, outputs, size, **choices)


def quick_jobs() -> list[Job]:
    """Each kernel and each of its forms once: for `make test`."""
    small = Config(64, 64, 64, 4, 4)
    first = LayerJob(linear(75, 70), (3, 37, 75), 4, 4, "packed", small)
    return [
        first,
        # Copies are not waited for; the nibbles' mask; rounding to integers.
        BrokenJob(first, r"wait_group\s+\w+", "wait_group 99"),
        BrokenJob(first, "0x0F0F0F0F", "0x0F0F0F0E"),
        BrokenJob(first, "0f4B400000", "0f4B400001"),
        LayerJob(linear(200, 40), (60, 200), 8, 8, "int8", Config(128, 64, 64, 4, 4)),
        LayerJob(
            conv(150, 20, padding=1),
            (1, 150, 5, 4),
            4,
            4,
            "packed",
            Config(32, 64, 64, 4, 5),
            dict(shift=True),
            residual=True,
        ),
        LayerJob(
            conv(40, 36, padding=1), (2, 40, 7, 6), 4, 8, "packed", Config(64, 64, 32, 4, 5, 3)
        ),
        LayerJob(linear(200, 40), (2, 20, 200), 4, 4, "packed", small, dict(token=True)),
        LayerJob(
            conv(48, 20, 1), (2, 48, 5, 4), 4, 4, "packed", Config(64, 64, 32, 4, 5), dict(split=30)
        ),
        NormJob(64, True, torch.float16),
        GatedJob(100, Config(64, 64, 64, 4, 4), torch.float16),
        CodesJob(70, Config(64, 64, 64, 4, 4), False),
        CodesJob(48, Config(64, 64, 32, 4, 5, 2), True),
        TogetherJob(75, 3, 4, True, True, torch.float16),
        AttentionJob(4, 8, 40, 140, 130),
        AttentionJob(8, 8, 80, 70, 77),
        AttentionJob(4, 4, 160, 70, 64, 1),
    ]


def refused_jobs() -> list[Job]:
    """Tiles that no table may have: too many sums for the registers, too many stages for a block.

    The checks of machine code must find it.
    """
    return [
        LayerJob(linear(128, 144), (20, 128), 8, 8, "int8", tile)
        for tile in (Config(256, 128, 32, 4, 3), Config(128, 128, 128, 8, 8))
    ]


def tile_jobs(kind: str, gpu: Gpu) -> Iterator[Job]:
    """Each tile that can be chosen in a format, split or not: for a linear and a convolution.

    Layers have outputs that are a multiple of 16, and others.
    """
    w_bits, a_bits, weights, shift = FORMATS[kind]
    extra = dict(shift=True) if shift else {}
    for c in gpu.table.tiles:
        if shift and c.bk > 64:
            continue
        for tile, outputs in itertools.product((c, c._replace(split=SPLITS[0])), (144, 140)):
            if serves(tile, outputs, weights == "packed", gpu):
                how = (w_bits, a_bits, weights, tile, extra, True)
                yield LayerJob(linear(512, outputs), (140, 512), *how)
                yield LayerJob(conv(512, outputs, padding=1), (1, 512, 9, 9), *how)


def shape_jobs(gpu: Gpu) -> Iterator[Job]:
    """Shapes that are no multiples of anything, in every format; all attentions and norms."""
    for i, job in enumerate(gpu_check.jobs(small=True)):
        packed = job.kind == "packed"
        # 64 channels are 32 bytes when packed.
        longest = 32 if packed else 64
        fit = [c for c in gpu.table.tiles if c.bk <= longest and serves(c, 70, packed, gpu)]
        tile = fit[i % len(fit)]
        dtype = list(TOLERANCE)[i % 3]
        yield LayerJob(
            job.make, job.size, job.w_bits, job.a_bits, job.kind, tile, job.extra, dtype=dtype
        )
    for bits, p_bits in ((4, 8), (8, 8), (4, 4), (6, 8)):
        for dim in (20, 32, 40, 64, 80, 160, 256):
            yield AttentionJob(bits, p_bits, dim, 140 if dim < 80 else 70, 77, 1 + dim % 3)
    for c in gpu.table.tiles:
        # 200 channels are 128 bytes when packed.
        for tile in (c, c._replace(split=2)):
            if serves(tile, 144, True, gpu):
                yield from (CodesJob(144, tile, transposed, 80) for transposed in (True, False))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for layer_norm in (True, False):
            yield TogetherJob(320, 2, 8, False, layer_norm, dtype)
            yield TogetherJob(600, 1, 4, False, layer_norm, dtype)
            yield TogetherJob(320, 3, 4, True, layer_norm, dtype)
        for channels in (40, 320):
            for channels_last in (True, False):
                yield NormJob(channels, channels_last, dtype)
            split = channels // 160 + 1
            yield GatedJob(channels, Config(64, 64, 32, 4, 5, split), dtype)


FORMATS = {
    "packed": (4, 4, "packed", False),
    "shifted": (4, 4, "packed", True),
    "int8": (8, 8, "int8", False),
}


def jobs_of(choice: str, gpu: Gpu) -> list[Job]:
    """Those of a choice, for one GPU: "quick", "refused", "shapes", or one of FORMATS."""
    if choice == "quick":
        return quick_jobs()
    if choice == "refused":
        return refused_jobs()
    return list(shape_jobs(gpu) if choice == "shapes" else tile_jobs(choice, gpu))
