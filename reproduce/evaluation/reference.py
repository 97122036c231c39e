"""Reference statistics for FID and the others.

They are read from a model's folder, images or ADM's .npz, and kept as .safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image, UnidentifiedImageError
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

from questlib.errors import MetricError
from questlib.integrity import check_finite, fail_if_any, opened, read_tensors, write_tensors
from reproduce.evaluation.adm import Moments, check_moments, read_npz
from reproduce.evaluation.features import MiniFeatures, load_extractor
from reproduce.evaluation.image_statistics import (
    BATCH,
    MIN_SAMPLES,
    Images,
    Statistics,
    check_images,
    moments,
    statistics,
)
from reproduce.models.embedded import MINI

# An embedded model's name, its folder or reference.safetensors (its training data); a file that
# `save_reference` wrote; a folder of images; a tensor of images; or ADM's .npz.
ReferenceSource: TypeAlias = str | Path | torch.Tensor


def load_reference(
    source: ReferenceSource,
    features: str,
    weights: str | None = None,
    batch_size: int = BATCH,
    size: tuple[int, int] | None = None,
) -> Statistics:
    """The statistics to compare with.

    Args:
        source: see `ReferenceSource`.
        features: "mini" or "inception".
        weights: of Inception, see `reproduce.evaluation.features.inception_weights`.
        size: (H, W) that the images must have; checked before the work.

    Raises:
        MetricError: nothing such is there, or it is damaged or of another kind.
    """
    return open_reference(source, features, weights, batch_size, size)()


def open_reference(
    source: ReferenceSource,
    features: str,
    weights: str | None = None,
    batch_size: int = BATCH,
    size: tuple[int, int] | None = None,
) -> Callable[[], Statistics]:
    """`load_reference`'s checks; the work itself waits in what is returned."""

    def take(images: Images) -> Statistics:
        return statistics(images, load_extractor(features, weights), batch_size)

    if isinstance(source, torch.Tensor):
        images = source
        check_images(images, "reference")
        check_size(tuple(images.shape[-2:]), size)
        return lambda: take(images)
    path = _stored_file(source) or Path(source)
    if path.is_dir():
        return _open_folder(path, take, size)
    if not path.is_file():
        raise MetricError(f"reference {source}: not an embedded model, a file or a folder")
    if path.suffix == ".npz":
        return _open_npz(path, take, size)
    check_size(check_features(path, features), size)
    return lambda: _read_stored(path)


def _stored_file(source: str | Path) -> Path | None:
    """reference.safetensors of an embedded model, or in a folder."""
    for folder in (MINI / str(source), Path(source)):
        if (folder / "reference.safetensors").is_file():
            return folder / "reference.safetensors"
    return None


def _open_folder(
    path: Path, take: Callable[[Images], Statistics], size: tuple[int, int] | None
) -> Callable[[], Statistics]:
    kinds = (".png", ".jpg", ".jpeg")
    files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in kinds)
    _check_count(path, len(files))
    check_size(_image_size(files[0]), size)
    return lambda: take(ImagesPathDataset(files, TransformPILtoRGBTensor()))


def _open_npz(
    path: Path, take: Callable[[Images], Statistics], size: tuple[int, int] | None
) -> Callable[[], Statistics]:
    pooled, spatial, images = read_npz(path)
    if images is None:
        return lambda: Statistics(None, pooled, spatial, None, None)
    check_size(images.shape[1:3], size)
    _check_count(path, images.shape[0])
    if pooled is None:
        return lambda: take(images)
    # ADM's statistics are those of the whole data set, its images often a part of it.
    return lambda: take(images)._replace(pooled_moments=pooled, spatial_moments=spatial)


def _check_count(path: Path, found: int) -> None:
    if found < MIN_SAMPLES:
        raise MetricError(f"reference {path}: {found} images are too few, at least {MIN_SAMPLES}")


def _read_stored(path: Path) -> Statistics:
    """What `save_reference` wrote."""
    tensors, about = read_tensors(path, DamagedReference)
    check_finite(path, tensors, DamagedReference)
    pooled = tensors["pooled"]
    count = tensors["count"]
    whole = pooled.ndim == 2 and pooled.is_floating_point() and len(pooled) >= MIN_SAMPLES
    if not whole or count.numel() != 1 or count.is_floating_point() or int(count) < 1:
        raise DamagedReference(
            f"{path}: expected features [N, D] of {MIN_SAMPLES} images or more and their number, "
            f"found {list(pooled.shape)} and {count.tolist()}"
        )
    pooled = pooled.double()
    return Statistics(
        pooled,
        _stored_moments(path, tensors, "pooled") or moments(pooled),
        _stored_moments(path, tensors, "spatial"),
        _stored_size(path, about),
        int(count),
    )


class DamagedReference(MetricError):
    """A reference file does not hold what was written, or is none."""

    def __init__(self, what: str) -> None:
        super().__init__(f"reference {what}: damaged or not a reference file")


def _stored_moments(path: Path, tensors: dict[str, torch.Tensor], of: str) -> Moments | None:
    names = {f"{of}_mean", f"{of}_cov"}
    missing = names - tensors.keys()
    if missing == names:
        return None
    fail_if_any(path, {"missing": missing}, DamagedReference)
    found = tensors[f"{of}_mean"].numpy(), tensors[f"{of}_cov"].numpy()
    check_moments(path, *found)
    return found


def save_reference(real: Statistics, path: Path, features: str) -> None:
    """Write statistics of images, so that the images need not be looked at for every row.

    The file holds the pooled features in fp16 [N, D] (KID, precision and recall need them all), the
    number of images, and in float64 the moments of pooled and spatial features. These may be of
    more images than the features are, as in ADM's reference batches.

    Raises:
        MetricError: the statistics are moments alone.
    """
    if real.pooled is None or real.size is None:
        raise MetricError("statistics without images can be used as they are")
    tensors = {"pooled": real.pooled.half(), "count": torch.tensor(real.num_images)}
    for name, known in (("pooled", real.pooled_moments), ("spatial", real.spatial_moments)):
        if known is not None:
            mean, covariance = known
            tensors[f"{name}_mean"] = torch.from_numpy(mean).contiguous()
            tensors[f"{name}_cov"] = torch.from_numpy(covariance).contiguous()
    height, width = real.size
    write_tensors(path, tensors, {"features": features, "size": f"{height}x{width}"})


def check_features(reference: Path, features: str) -> tuple[int, int]:
    """(height, width) of a .safetensors reference's images.

    Raises:
        MetricError: it cannot be read, or holds other features.
    """
    with opened(reference, DamagedReference) as (file, known):
        # mini-ldm4's file is older than the entry.
        found = known.about.get("features", "mini")
        size = _stored_size(reference, known.about)
        lacks = {"pooled", "count"} - set(file.keys())
    if found != features:
        raise MetricError(
            f"reference {reference} holds {found} features, not {features}: give images, an .npz, "
            f"or make one by python -m reproduce reference IMAGES OUT.safetensors "
            f"--features {features}"
        )
    fail_if_any(reference, {"missing": lacks}, DamagedReference)
    return size


def _stored_size(path: Path, about: dict[str, Any]) -> tuple[int, int]:
    # mini-ldm4's file is older than the entry.
    size = str(about.get("size", f"{MiniFeatures.SIZE}x{MiniFeatures.SIZE}"))
    if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", size):
        raise DamagedReference(f"{path}: size: expected HEIGHTxWIDTH, found {size!r}")
    height, width = size.split("x")
    return int(height), int(width)


def check_size(reference: tuple[int, ...], images: tuple[int, int] | None) -> None:
    """Check that the reference has the images' resolution.

    Raises:
        MetricError: it has another one.
    """
    if images is not None and tuple(reference) != tuple(images):
        raise MetricError(
            f"images are {images[0]}x{images[1]}, the reference is {reference[0]}x{reference[1]}"
        )


def _image_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise MetricError(f"reference image {path}: cannot be read ({error})") from error
