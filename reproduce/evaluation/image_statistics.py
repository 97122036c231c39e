"""What the metrics know of one set of images: features and their moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from questlib.errors import MetricError
from reproduce.evaluation.adm import Moments
from reproduce.evaluation.features import load_extractor

MIN_SAMPLES = 16

# Images at a time: on a CPU Inception takes a sixth less time than with 100, whose activations
# leave the cache.
BATCH = 20

# uint8 [N, 3, H, W], or a dataset of uint8 [3, H, W]
Images: TypeAlias = torch.Tensor | Dataset


class Statistics(NamedTuple):
    """Statistics of a set of images. A part that its source does not give is None.

    Args:
        pooled: features float64 [N, D].
        pooled_moments: mean [D] and covariance [D, D].
        spatial_moments: those of the spatial features.
        size: height and width of the images.
        num_images: number of images.
        logits: float32 [N, classes].
    """

    pooled: torch.Tensor | None
    pooled_moments: Moments | None
    spatial_moments: Moments | None
    size: tuple[int, int] | None
    num_images: int | None
    logits: torch.Tensor | None = None


def check_images(images: object, what: str = "images") -> None:
    """Check that `images` are uint8 [N, 3, H, W] with N >= MIN_SAMPLES.

    Raises:
        MetricError: they are not.
    """
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        found = getattr(images, "dtype", type(images).__name__)
        raise MetricError(f"{what}: expected a uint8 tensor, got {found}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise MetricError(f"{what}: expected shape [N, 3, H, W], got {list(images.shape)}")
    if len(images) < MIN_SAMPLES:
        raise MetricError(f"{what}: {len(images)} are too few for a metric, at least {MIN_SAMPLES}")


@torch.no_grad()
def statistics(images: Images, extractor: torch.nn.Module, batch_size: int = BATCH) -> Statistics:
    """Features and moments of a set of images, computed on the extractor's device.

    Raises:
        MetricError: images of different sizes, or ones that cannot be read.
    """
    batches: Iterable[torch.Tensor] = (
        images.split(batch_size)
        if isinstance(images, torch.Tensor)
        else DataLoader(images, batch_size)
    )
    device = next(extractor.parameters()).device
    pooled: list[torch.Tensor] = []
    spatial: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    size: tuple[int, int] | None = None
    try:
        for batch in batches:
            found = tuple(batch.shape[-2:])
            size = size or found
            if found != size:
                raise MetricError(f"images of different sizes: {size} and {found}")
            of_pool, of_grid, *scores = extractor(batch.to(device))
            pooled.append(of_pool.double().cpu())
            spatial.append(of_grid.float().cpu())
            logits.extend(score.float().cpu() for score in scores)
    except (RuntimeError, OSError) as error:
        raise MetricError(f"features cannot be computed: {str(error).splitlines()[0]}") from error
    features = torch.cat(pooled)
    return Statistics(
        features,
        moments(features),
        moments(torch.cat(spatial)),
        size,
        len(features),
        torch.cat(logits) if logits else None,
    )


def features_of(
    images: Images, features: str, weights: str | None = None, batch_size: int = BATCH
) -> torch.Tensor:
    """Pooled features of images, float64 [N, D].

    Args:
        features: "mini" or "inception".
    """
    pooled = statistics(images, load_extractor(features, weights), batch_size).pooled
    assert pooled is not None
    return pooled


def moments(features: torch.Tensor) -> Moments:
    """Mean [D] and covariance [D, D] of features [N, D], in float64."""
    x = features.double().numpy()
    if not np.isfinite(x).all():
        raise MetricError("features: NaN or infinite values")
    return x.mean(0), np.cov(x, rowvar=False)
