"""What samples are compared with: read from a model's folder, images or ADM's .npz, and kept as .safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

from questlib.adm import Moments, read_npz
from questlib.errors import MetricError
from questlib.features import MIN_SAMPLES, Images, MiniFeatures, Statistics, check_images, load_extractor, moments, statistics
from questlib.models.loading import MINI


class Unread(NamedTuple):
    """Images whose features are not taken yet, and what is known of their data set."""

    images: Images
    pooled_moments: Moments | None = None
    spatial_moments: Moments | None = None


def load_reference(
    source: str | Path | torch.Tensor, features: str, weights: str | None = None, batch_size: int = 100,
    size: tuple[int, int] | None = None,
) -> Statistics:  # fmt: skip
    """What to compare with; see `evaluate` for the kinds of source. `size`: (H, W) that it must have, checked before the work."""
    found = open_reference(source, features, size)
    return found if isinstance(found, Statistics) else _take(found, features, weights, batch_size)


def open_reference(source: str | Path | torch.Tensor, features: str, size: tuple[int, int] | None = None) -> Statistics | Unread:
    """What needs no network: a file's statistics, or images and the statistics beside them. MetricError for all that is wrong."""
    if isinstance(source, torch.Tensor):
        check_images(source, "reference")
        check_size(tuple(source.shape[-2:]), size)
        return Unread(source)
    exported = [p for p in (MINI / str(source) / "reference.safetensors", Path(source) / "reference.safetensors") if p.is_file()]
    path = exported[0] if exported else Path(source)
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if len(files) < MIN_SAMPLES:
            raise MetricError(f"reference {path}: {len(files)} images are too few, at least {MIN_SAMPLES}")
        check_size(_image_size(files[0]), size)
        return Unread(ImagesPathDataset(files, TransformPILtoRGBTensor()))
    if not path.is_file():
        raise MetricError(f"reference {source}: not an embedded model, a file or a folder")
    if path.suffix == ".npz":
        pooled, spatial, images = read_npz(path)
        if images is None:
            return Statistics(None, pooled, spatial, None, None)
        check_size(images.shape[1:3], size)
        if images.shape[0] < MIN_SAMPLES:
            raise MetricError(f"reference {path}: {images.shape[0]} images are too few, at least {MIN_SAMPLES}")
        return Unread(images, pooled, spatial)
    check_features(path, features)
    try:
        with safe_open(path, "pt") as file:
            t = {name: file.get_tensor(name) for name in file.keys()}
            height, width = map(int, (file.metadata() or {}).get("size", f"{MiniFeatures.SIZE}x{MiniFeatures.SIZE}").split("x"))
        check_size((height, width), size)
        pooled = t["pooled"].double()
        of_all = (t["pooled_mean"].numpy(), t["pooled_cov"].numpy()) if "pooled_mean" in t else moments(pooled)
        spatial_moments = (t["spatial_mean"].numpy(), t["spatial_cov"].numpy()) if "spatial_mean" in t else None
        return Statistics(pooled, of_all, spatial_moments, (height, width), int(t["count"]))
    except (SafetensorError, KeyError) as error:
        raise MetricError(f"reference {path}: damaged or not a reference file ({error})") from error


def _take(unread: Unread, features: str, weights: str | None, batch_size: int) -> Statistics:
    """Features of the images. Statistics that stand beside them win: ADM's are of the whole data set, its images a part of it."""
    found = statistics(unread.images, load_extractor(features, weights), batch_size)
    if unread.pooled_moments is None:
        return found
    return found._replace(pooled_moments=unread.pooled_moments, spatial_moments=unread.spatial_moments)


def save_reference(real: Statistics, path: Path, features: str) -> None:
    """What `load_reference` reads as .safetensors: the images need not be looked at again for every row of a table.

    Pooled features in fp16 [N, D] (KID, precision and recall need them all), image count, and in float64 the moments of pooled
    and spatial features, which may be of more images than these (ADM's reference batches).
    """
    tensors = {"pooled": real.pooled.half(), "count": torch.tensor(real.count)}
    for name, known in (("pooled", real.pooled_moments), ("spatial", real.spatial_moments)):
        if known is not None:
            tensors |= {f"{name}_{k}": torch.from_numpy(m).contiguous() for k, m in zip(("mean", "cov"), known, strict=True)}
    height, width = real.size
    save_file(tensors, path, {"features": features, "size": f"{height}x{width}"})


def check_features(reference: Path, features: str) -> None:
    """MetricError if a .safetensors reference cannot be read or is of other features than those wanted."""
    try:
        with safe_open(reference, "pt") as file:
            found = (file.metadata() or {}).get("features", "mini")  # mini-ldm4's file is older than the entry
    except (OSError, SafetensorError) as error:
        raise MetricError(f"reference {reference}: damaged or not a reference file ({error})") from error
    if found != features:
        raise MetricError(
            f"reference {reference} holds {found} features, not {features}: give images, an .npz, "
            f"or make one by python -m questlib reference IMAGES OUT.safetensors --features {features}"
        )


def check_size(reference: tuple[int, ...], images: tuple[int, int] | None) -> None:
    """MetricError unless the reference has the images' resolution."""
    if images is not None and tuple(reference) != tuple(images):
        raise MetricError(f"images are {images[0]}x{images[1]}, the reference is {reference[0]}x{reference[1]}")


def _image_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise MetricError(f"reference image {path}: cannot be read ({error})") from error
