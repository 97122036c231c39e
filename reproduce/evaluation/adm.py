"""ADM's .npz files (guided-diffusion's evaluation suite): reference batches in, samples out.

A file holds `arr_0`, uint8 images [N, H, W, 3], which are streamed. A reference may hold statistics
of Inception features beside or instead: `mu` [2048], `sigma` [2048, 2048] (pool_3) and `mu_s`
[2023], `sigma_s` [2023, 2023] (mixed_6, spatial).
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset

from questlib.errors import MetricError
from questlib.files import atomic_path
from reproduce.evaluation.samples import read_run, read_samples

Moments: TypeAlias = tuple[np.ndarray, np.ndarray]  # mean [D], covariance [D, D]

# What numpy and zipfile raise for a damaged file.
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    UnicodeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)

# A covariance's least eigenvalue may lie this far below zero, relative to the largest: rounding.
ROUNDING = 1e-4


class NpzImages(IterableDataset):
    """Images `arr_0` of an .npz as uint8 [3, H, W], one after the other.

    In memory, 50,000 of 256x256 would be 10 GB. `shape` is (N, H, W, 3), known from the header.

    Raises:
        MetricError: another layout or dtype; on reading, damaged images.
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
                    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(*image)
                    yield pixels.permute(2, 0, 1).contiguous()  # HWC -> CHW
        except DAMAGED as error:
            raise MetricError(f"{self.path}: damaged ({error})") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of the .npy at the file's position."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


class ReferenceBatch(NamedTuple):
    """What an .npz holds; None for what it does not hold."""

    pooled: Moments | None
    spatial: Moments | None
    images: NpzImages | None


def read_npz(path: Path) -> ReferenceBatch:
    """Read a reference batch.

    Raises:
        MetricError: not an .npz, damaged, neither statistics nor images, or half of a pair of
            statistics.
    """
    try:
        with np.load(path) as data:
            names = data.files
            pooled = _moments(path, data, "mu", "sigma")
            spatial = _moments(path, data, "mu_s", "sigma_s")
        images = NpzImages(path) if "arr_0" in names else None
    except MetricError:  # it is a ValueError, too
        raise
    except DAMAGED as error:
        raise MetricError(f"reference {path}: damaged or not an .npz file ({error})") from error
    if pooled is None and images is None:
        raise MetricError(
            f"reference {path}: expected mu and sigma, or images arr_0; "
            f"found {', '.join(names) or 'nothing'}"
        )
    return ReferenceBatch(pooled, spatial, images)


def _moments(path: Path, data: np.lib.npyio.NpzFile, mean: str, covariance: str) -> Moments | None:
    known = [name for name in (mean, covariance) if name in data.files]
    if not known:
        return None
    if len(known) == 1:
        raise MetricError(
            f"reference {path}: {mean} and {covariance} belong together, only one is there"
        )
    m, c = data[mean], data[covariance]
    check_moments(path, m, c)
    return m, c


def check_moments(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Check that these are a mean [D] and a covariance [D, D].

    Raises:
        MetricError: other types or shapes, values that are not finite, or a matrix that is the
            covariance of nothing: a distance to it would be no distance.
    """
    where = f"reference {path}"
    shapes = mean.ndim == 1 and len(mean) > 0 and covariance.shape == (len(mean), len(mean))
    if not shapes or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise MetricError(
            f"{where}: mean and covariance: expected [D] and [D, D] in floats, found "
            f"{mean.dtype} {list(mean.shape)} and {covariance.dtype} {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise MetricError(f"{where}: NaN or infinite values in its mean or covariance")
    size = np.abs(covariance).max()
    if not np.allclose(covariance, covariance.T, rtol=0, atol=ROUNDING * size):
        raise MetricError(f"{where}: its covariance is not symmetric")
    eigenvalues = np.linalg.eigvalsh(covariance.astype(np.float64))
    if eigenvalues[0] < -ROUNDING * eigenvalues[-1]:
        raise MetricError(
            f"{where}: not a covariance: it has the eigenvalue {eigenvalues[0]:g}, expected none "
            "below zero"
        )


def export_npz(folder: str | Path, out: str | Path, count: int | None = None) -> tuple[int, ...]:
    """Write samples as ADM's .npz and give its shape, [N, H, W, 3].

    One shard is in memory at a time. `out` appears when it is whole, and is never overwritten.

    Args:
        folder: of samples, see `reproduce.evaluation.samples`.
        count: the first ones; None: all.

    Raises:
        MetricError: a wrong name or count, or `out` cannot be written.
        QuestError: samples are missing or damaged.

    Example:
        >>> export_npz("runs/samples", "samples.npz")
        (50000, 256, 256, 3)
    """
    out = Path(out)
    if out.exists():
        raise MetricError(f"{out}: exists already")
    if out.suffix != ".npz":
        raise MetricError(f"{out}: expected a name that ends in .npz")
    if not out.parent.is_dir():
        raise MetricError(f"{out}: cannot be written (no folder {out.parent})")
    total = read_run(folder)["num_samples"]
    left = total if count is None else count
    if not 1 <= left <= total:
        raise MetricError(f"{folder}: {total} samples, asked for {left}")
    shards = read_samples(folder)
    first = next(shards).images
    shape = (left, *first.shape[2:], 3)
    try:
        with (
            atomic_path(out) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            about = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            for images in chain([first], (shard.images for shard in shards)):
                pixels = images[:left].permute(0, 2, 3, 1)  # NCHW -> NHWC
                file.write(pixels.contiguous().numpy())
                left -= min(left, len(images))
                if left == 0:
                    break
    except OSError as error:
        raise MetricError(f"{out}: cannot be written ({error.strerror or error})") from error
    return shape
