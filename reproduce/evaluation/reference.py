"""What samples are compared with: read from a model's folder, images or ADM's .npz, and kept as .safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

from questlib.errors import MetricError
from reproduce.evaluation.adm import read_npz
from reproduce.evaluation.features import (
    BATCH,
    MIN_SAMPLES,
    Images,
    MiniFeatures,
    Statistics,
    check_images,
    load_extractor,
    moments,
    statistics,
)
from reproduce.models.loading import MINI


def load_reference(
    source: str | Path | torch.Tensor,
    features: str,
    weights: str | None = None,
    batch_size: int = BATCH,
    size: tuple[int, int] | None = None,
) -> Statistics:
    """What to compare with; see `evaluate` for the kinds of source. `size`: (H, W) that it must have, checked before the work."""
    return open_reference(source, features, weights, batch_size, size)()


def open_reference(
    source: str | Path | torch.Tensor,
    features: str,
    weights: str | None = None,
    batch_size: int = BATCH,
    size: tuple[int, int] | None = None,
) -> Callable[[], Statistics]:
    """`load_reference`'s checks, MetricError for what is wrong; the work itself waits in what is returned."""

    def take(images: Images) -> Statistics:
        return statistics(images, load_extractor(features, weights), batch_size)

    if isinstance(source, torch.Tensor):
        check_images(source, "reference")
        check_size(tuple(source.shape[-2:]), size)
        return lambda: take(source)
    exported = [
        p
        for p in (
            MINI / str(source) / "reference.safetensors",
            Path(source) / "reference.safetensors",
        )
        if p.is_file()
    ]
    path = exported[0] if exported else Path(source)
    if path.is_dir():
        files = sorted(
            str(p) for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg")
        )
        if len(files) < MIN_SAMPLES:
            raise MetricError(
                f"reference {path}: {len(files)} images are too few, at least {MIN_SAMPLES}"
            )
        check_size(_image_size(files[0]), size)
        return lambda: take(ImagesPathDataset(files, TransformPILtoRGBTensor()))
    if not path.is_file():
        raise MetricError(f"reference {source}: not an embedded model, a file or a folder")
    if path.suffix == ".npz":
        pooled, spatial, images = read_npz(path)
        if images is None:
            return lambda: Statistics(None, pooled, spatial, None, None)
        check_size(images.shape[1:3], size)
        if images.shape[0] < MIN_SAMPLES:
            raise MetricError(
                f"reference {path}: {images.shape[0]} images are too few, at least {MIN_SAMPLES}"
            )
        # ADM's statistics are of the whole data set, its images often a part of it.
        known = {} if pooled is None else {"pooled_moments": pooled, "spatial_moments": spatial}
        return lambda: take(images)._replace(**known)
    check_size(check_features(path, features), size)
    return lambda: _stored(path)


def _stored(path: Path) -> Statistics:
    """What `save_reference` wrote."""
    try:
        with safe_open(path, "pt") as file:
            t, size = {name: file.get_tensor(name) for name in file.keys()}, _stored_size(file)
        pooled = t["pooled"].double()
        of_all = (
            (t["pooled_mean"].numpy(), t["pooled_cov"].numpy())
            if "pooled_mean" in t
            else moments(pooled)
        )
        spatial_moments = (
            (t["spatial_mean"].numpy(), t["spatial_cov"].numpy()) if "spatial_mean" in t else None
        )
        return Statistics(pooled, of_all, spatial_moments, size, int(t["count"]))
    except (SafetensorError, KeyError) as error:
        raise MetricError(f"reference {path}: damaged or not a reference file ({error})") from error


def save_reference(real: Statistics, path: Path, features: str) -> None:
    """What `load_reference` reads as .safetensors: the images need not be looked at again for every row of a table.

    Pooled features in fp16 [N, D] (KID, precision and recall need them all), image count, and in float64 the moments of pooled
    and spatial features, which may be of more images than these (ADM's reference batches).
    """
    tensors = {"pooled": real.pooled.half(), "count": torch.tensor(real.count)}
    for name, known in (("pooled", real.pooled_moments), ("spatial", real.spatial_moments)):
        if known is not None:
            tensors |= {
                f"{name}_{k}": torch.from_numpy(m).contiguous()
                for k, m in zip(("mean", "cov"), known, strict=True)
            }
    height, width = real.size
    save_file(tensors, path, {"features": features, "size": f"{height}x{width}"})


def check_features(reference: Path, features: str) -> tuple[int, int]:
    """(height, width) of a .safetensors reference's images. MetricError if it cannot be read or holds other features."""
    try:
        with safe_open(reference, "pt") as file:
            found = (file.metadata() or {}).get(
                "features", "mini"
            )  # mini-ldm4's file is older than the entries
            size, lacks = _stored_size(file), {"pooled", "count"} - set(file.keys())
    except (OSError, SafetensorError) as error:
        raise MetricError(
            f"reference {reference}: damaged or not a reference file ({error})"
        ) from error
    if found != features:
        raise MetricError(
            f"reference {reference} holds {found} features, not {features}: give images, an .npz, "
            f"or make one by python -m reproduce.evaluation reference IMAGES OUT.safetensors --features {features}"
        )
    if lacks:
        raise MetricError(
            f"reference {reference}: damaged or not a reference file (no {', '.join(sorted(lacks))})"
        )
    return size


def _stored_size(file: safe_open) -> tuple[int, int]:
    height, width = map(
        int,
        (file.metadata() or {}).get("size", f"{MiniFeatures.SIZE}x{MiniFeatures.SIZE}").split("x"),
    )
    return height, width


def check_size(reference: tuple[int, ...], images: tuple[int, int] | None) -> None:
    """MetricError unless the reference has the images' resolution."""
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
