"""ADM's .npz files (guided-diffusion's evaluation suite): reference batches in, our samples out; images are streamed.

A file holds `arr_0`, uint8 images [N, H, W, 3], and a reference may hold statistics of Inception features beside or instead:
`mu` [2048], `sigma` [2048, 2048] (pool_3) and `mu_s` [2023], `sigma_s` [2023, 2023] (mixed_6, spatial).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.data import IterableDataset

from questlib.errors import MetricError
from reproduce.evaluation.samples import read_run, read_samples

Moments = tuple[np.ndarray, np.ndarray]  # mean [D], covariance [D, D]
DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class NpzImages(IterableDataset):
    """Images `arr_0` of an .npz as uint8 [3, H, W], one after the other: 50,000 of 256x256 would be 10 GB in memory.

    `shape` is (N, H, W, 3), known from the header. MetricError for another layout or dtype, or when the images are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            self.shape, fortran, dtype = _header(file)
        if len(self.shape) != 4 or self.shape[-1] != 3 or dtype != np.uint8 or fortran:
            raise MetricError(
                f"{path}: arr_0 is {dtype} {list(self.shape)}, expected uint8 [N, H, W, 3]"
            )

    def __iter__(self) -> Iterator[torch.Tensor]:
        count, *image = self.shape
        size = int(np.prod(image))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                _header(file)
                for i in range(count):
                    data = file.read(size)
                    if len(data) < size:
                        raise EOFError(f"arr_0 ends after {i} of {count} images")
                    yield (
                        torch.frombuffer(bytearray(data), dtype=torch.uint8)
                        .view(*image)
                        .permute(2, 0, 1)
                        .contiguous()
                    )
        except DAMAGED as error:
            raise MetricError(f"{self.path}: damaged ({error})") from error


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    return (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )(file)


def read_npz(path: Path) -> tuple[Moments | None, Moments | None, NpzImages | None]:
    """(pooled moments, spatial moments, images) of a reference batch; None for what it does not hold.

    MetricError: not an .npz, damaged, neither statistics nor images, or half of a pair of statistics.
    """
    pairs: list[Moments | None] = []
    try:
        with np.load(path) as data:
            names = data.files
            for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
                found = [data[k] for k in pair if k in names]
                if len(found) == 1:
                    raise MetricError(
                        f"reference {path}: {' and '.join(pair)} belong together, only one is there"
                    )
                if found and (
                    found[0].ndim != 1 or found[1].shape != (len(found[0]), len(found[0]))
                ):
                    shapes = " and ".join(str(list(a.shape)) for a in found)
                    raise MetricError(
                        f"reference {path}: {' and '.join(pair)} have shapes {shapes}, expected [D] and [D, D]"
                    )
                pairs.append((found[0], found[1]) if found else None)
        images = NpzImages(path) if "arr_0" in names else None
    except MetricError:  # a ValueError too
        raise
    except DAMAGED as error:
        raise MetricError(f"reference {path}: damaged or not an .npz file ({error})") from error
    if pairs[0] is None and images is None:
        raise MetricError(
            f"reference {path}: expected mu and sigma, or images arr_0; found {', '.join(names) or 'nothing'}"
        )
    return pairs[0], pairs[1], images


def export_npz(folder: str | Path, out: str | Path, count: int | None = None) -> tuple[int, ...]:
    """Write the first `count` samples (None: all) of a folder of samples as ADM's .npz; -> its shape [N, H, W, 3].

    One shard is in memory at a time; `out` appears when it is whole, and is never overwritten. MetricError for a wrong name or
    count and where `out` cannot be written; QuestError for samples that are missing or damaged (`reproduce.evaluation.samples`).
    """
    out = Path(out)
    if out.exists() or out.suffix != ".npz":
        raise MetricError(
            f"{out}: {'exists already' if out.exists() else 'expected a name that ends in .npz'}"
        )
    total = read_run(folder)["num_samples"]
    left = total if count is None else count
    if not 1 <= left <= total:
        raise MetricError(f"{folder}: {total} samples, asked for {left}")
    parts = read_samples(folder)
    first = next(parts).images
    shape = (left, *first.shape[2:], 3)
    tmp = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with (
            zipfile.ZipFile(tmp, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            for images in chain([first], (part.images for part in parts)):
                file.write(images[:left].permute(0, 2, 3, 1).contiguous().numpy())
                left -= min(left, len(images))
                if left == 0:
                    break
        os.replace(tmp, out)
    except OSError as error:
        raise MetricError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        tmp.unlink(missing_ok=True)
    return shape
