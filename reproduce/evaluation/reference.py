"""Reference statistics for FID and the others.

They are read from a model's folder, images or ADM's .npz, and kept as .safetensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

from questlib.errors import MetricError
from questlib.files import atomic_path
from reproduce.evaluation.adm import Moments, read_npz
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
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            size = _stored_size(file)
        pooled = tensors["pooled"].double()
        return Statistics(
            pooled,
            _stored_moments(tensors, "pooled") or moments(pooled),
            _stored_moments(tensors, "spatial"),
            size,
            int(tensors["count"]),
        )
    except (SafetensorError, KeyError) as error:
        raise MetricError(f"reference {path}: damaged or not a reference file ({error})") from error


def _stored_moments(tensors: dict[str, torch.Tensor], of: str) -> Moments | None:
    if f"{of}_mean" not in tensors:
        return None
    return tensors[f"{of}_mean"].numpy(), tensors[f"{of}_cov"].numpy()


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
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"features": features, "size": f"{height}x{width}"})


def check_features(reference: Path, features: str) -> tuple[int, int]:
    """(height, width) of a .safetensors reference's images.

    Raises:
        MetricError: it cannot be read, or holds other features.
    """
    try:
        with safe_open(reference, "pt") as file:
            # mini-ldm4's file is older than the entry.
            found = (file.metadata() or {}).get("features", "mini")
            size = _stored_size(file)
            lacks = {"pooled", "count"} - set(file.keys())
    except (OSError, SafetensorError) as error:
        raise MetricError(
            f"reference {reference}: damaged or not a reference file ({error})"
        ) from error
    if found != features:
        raise MetricError(
            f"reference {reference} holds {found} features, not {features}: give images, an .npz, "
            f"or make one by python -m reproduce reference IMAGES OUT.safetensors "
            f"--features {features}"
        )
    if lacks:
        raise MetricError(
            f"reference {reference}: damaged or not a reference file "
            f"(no {', '.join(sorted(lacks))})"
        )
    return size


def _stored_size(file: safe_open) -> tuple[int, int]:
    # mini-ldm4's file is older than the entry.
    size = (file.metadata() or {}).get("size", f"{MiniFeatures.SIZE}x{MiniFeatures.SIZE}")
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
