"""Image metrics on torch-fidelity: FID, sFID, KID, IS, precision and recall, and the distance to the full-precision images.

FID depends on the reference set and on the number of samples (few samples bias it upwards); results carry both.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from questlib.adm import Moments, read_npz
from questlib.errors import MetricError
from questlib.features import WEIGHTS_VARIABLE, InceptionFeatures, MiniFeatures
from questlib.models.loading import MINI

MIN_SAMPLES = 16
ISC_PART = 5000  # samples of one part of the Inception Score
FEATURES = ("mini", "inception")
Images = torch.Tensor | Dataset  # uint8 [N, 3, H, W], or a dataset of uint8 [3, H, W]


class Statistics(NamedTuple):
    """What is known of one set of images. A part that its source does not give is None."""

    pooled: torch.Tensor | None  # float64 [N, D]
    pooled_moments: Moments | None  # mean [D], covariance [D, D]
    spatial_moments: Moments | None
    size: tuple[int, int] | None  # height, width of the images
    count: int | None
    logits: torch.Tensor | None = None  # float32 [N, classes]


def evaluate(
    images: torch.Tensor,
    *,
    reference: str | Path | torch.Tensor | None = "mini-ldm4",
    features: str = "mini",
    paired: torch.Tensor | None = None,
    weights: str | None = None,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, float | int | str | None]:
    """fid, sfid, kid, precision, recall against `reference`, inception_score; with `paired` psnr_to_fp, feature_distance_to_fp.

    images, paired: uint8 [N, 3, H, W]; `paired` holds the full-precision model's images from the same noise.
    reference: an embedded model's name, its folder or reference.safetensors (its training data), a folder of images,
        a tensor, or ADM's .npz: mu, sigma, mu_s, sigma_s, or images arr_0 [N, H, W, 3], or both (then the statistics are the
        file's own and kid, precision, recall compare with its images, as in ADM's suite); None: compare with nothing.
    "features", "n_samples", "n_reference" say what was compared. What the reference cannot give is None, and "note" says why.
    """
    check_images(images, "images")
    if paired is not None:
        check_images(paired, "paired")
        if paired.shape != images.shape:
            raise MetricError(f"paired images: expected {tuple(images.shape)}, got {tuple(paired.shape)}")
    extractor = _extractor(features, weights)
    ref = Statistics(None, None, None, None, 0)
    if reference is not None:
        ref = load_reference(reference, features, weights, batch_size, size=tuple(images.shape[-2:]))
    ours = statistics(images, extractor, batch_size)
    result: dict[str, float | int | str | None] = dict(compare(ours, ref, seed))
    result["inception_score"] = None if ours.logits is None else inception_score(ours.logits)
    notes = [f"{k}: the reference holds no such statistics" for k in ("fid", "sfid") if result[k] is None]
    if ref.pooled is None:
        notes.append("kid, precision, recall: the reference holds moments only, they need its features")
    notes = ["no reference was given"] if reference is None else notes
    if ours.logits is None:
        notes.append("inception_score: these weights have no classifier layer")
    if paired is not None:
        result["psnr_to_fp"] = psnr(images, paired)
        teacher = statistics(paired, extractor, batch_size)
        result["feature_distance_to_fp"] = (ours.pooled - teacher.pooled).norm(dim=1).mean().item()
    return result | {
        "features": extractor.source,
        "n_samples": len(images),
        "n_reference": ref.count,
        **({"note": "; ".join(notes)} if notes else {}),
    }


def compare(a: Statistics, b: Statistics, seed: int = 0) -> dict[str, float | None]:
    """fid, sfid, kid, precision, recall of samples `a` against reference `b`; None where `b` does not hold what is needed."""
    result = {"fid": frechet(a.pooled_moments, b.pooled_moments), "sfid": frechet(a.spatial_moments, b.spatial_moments)}
    if a.pooled is None or b.pooled is None:
        return result | {"kid": None, "precision": None, "recall": None}
    return result | {"kid": kid(a.pooled, b.pooled, seed), **precision_recall(a.pooled, b.pooled)}


def inception_score(logits: torch.Tensor) -> float:
    """exp E_x KL(p(y|x) || p(y)), Salimans et al. 2016, as ADM's suite takes it.

    logits [N, C], without the bias for Inception; in their order, the mean over parts of 5,000: ten for 50,000 samples.
    Where 5,000 does not divide N, over N // 5,000 equal parts, at least one (ADM: the last part is smaller).
    """
    parts = max(1, len(logits) // ISC_PART)
    return isc_features_to_metric(logits, splits=parts, shuffle=False)[KEY_METRIC_ISC_MEAN]


def frechet(a: Moments | None, b: Moments | None) -> float | None:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) by torch-fidelity, in float64. None if either side is not known."""
    if a is None or b is None:
        return None
    if a[0].shape != b[0].shape:
        raise MetricError(f"feature widths differ: {a[0].shape[0]} and {b[0].shape[0]}; are these statistics of other features?")
    stats = [{"mu": np.asarray(m, np.float64), "sigma": np.asarray(s, np.float64)} for m, s in (a, b)]
    return fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0) -> float:
    """Unbiased cubic-kernel MMD^2: mean over torch-fidelity's 100 random subsets of 1000, or of as many as there are."""
    size = min(1000, len(a), len(b))
    return kid_features_to_metric(a, b, kid_subset_size=size, rng_seed=seed, verbose=False)[KEY_METRIC_KID_MEAN]


def precision_recall(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Kynkaanniemi et al. 2019, k = 3: share of samples a inside the reference's neighbourhoods, and of b inside the samples'."""
    values = prc_features_to_metric(a, b, save_cpu_ram=True, prc_batch_size=2000, verbose=False)  # 50,000 x 50,000 do not fit
    return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


def psnr(images: torch.Tensor, paired: torch.Tensor) -> float:
    """Mean over pairs of the per-image PSNR in dB.

    The squared error is at least that of one value off by one, so that one identical pair does not make the mean infinite.
    """
    pairs = zip(images.split(100), paired.split(100), strict=True)
    error = torch.cat([(a.double() - b.double()).square().flatten(1).sum(1) for a, b in pairs])  # [N]
    mse = error.clamp_min(1.0) / images[0].numel()
    return (10 * torch.log10(255.0**2 / mse)).mean().item()


def latent_snr_db(latents: torch.Tensor, latents_fp: torch.Tensor) -> float:
    """10 log10(sum fp^2 / sum (fp - q)^2) over final latents from the same noise; inf when they are equal."""
    if latents.shape != latents_fp.shape:
        raise MetricError(f"latents: expected {tuple(latents_fp.shape)}, got {tuple(latents.shape)}")
    q, fp = latents.double(), latents_fp.double()
    if not (q.isfinite().all() and fp.isfinite().all()):
        raise MetricError("latents: NaN or infinite values")
    error = (fp - q).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(fp.square().sum().item() / error)


def check_images(images: torch.Tensor, what: str = "images") -> None:
    """MetricError unless uint8 [N >= 16, 3, H, W]."""
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        raise MetricError(f"{what}: expected a uint8 tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise MetricError(f"{what}: expected shape [N, 3, H, W], got {list(images.shape)}")
    if len(images) < MIN_SAMPLES:
        raise MetricError(f"{what}: {len(images)} are too few for a metric, at least {MIN_SAMPLES}")


@torch.no_grad()
def statistics(images: Images, extractor: torch.nn.Module, batch_size: int = 100) -> Statistics:
    """Features and moments of a set of images, on the extractor's device."""
    batches = images.split(batch_size) if isinstance(images, torch.Tensor) else DataLoader(images, batch_size)
    device = next(extractor.parameters()).device
    pooled, spatial, logits, size = [], [], [], None
    try:
        for batch in batches:
            p, s, *scores = extractor(batch.to(device))
            pooled.append(p.double().cpu()), spatial.append(s.float().cpu()), logits.extend(x.float().cpu() for x in scores)
            size = size or tuple(batch.shape[-2:])
            if tuple(batch.shape[-2:]) != size:
                raise MetricError(f"images of different sizes: {size} and {tuple(batch.shape[-2:])}")
    except (RuntimeError, OSError) as error:
        raise MetricError(f"features cannot be computed: {str(error).splitlines()[0]}") from error
    features = torch.cat(pooled)
    known = torch.cat(logits) if logits else None
    return Statistics(features, moments(features), moments(torch.cat(spatial)), size, len(features), known)


def moments(features: torch.Tensor) -> Moments:
    """Mean [D] and covariance [D, D] of features [N, D], float64."""
    x = features.double().numpy()
    if not np.isfinite(x).all():
        raise MetricError("features: NaN or infinite values")
    return x.mean(0), np.cov(x, rowvar=False)


def load_reference(
    source: str | Path | torch.Tensor, features: str, weights: str | None = None, batch_size: int = 100,
    size: tuple[int, int] | None = None,
) -> Statistics:  # fmt: skip
    """What to compare with; see `evaluate` for the kinds of source. `size`: (H, W) that it must have, checked before the work."""
    if isinstance(source, torch.Tensor):
        check_images(source, "reference")
        check_size(tuple(source.shape[-2:]), size)
        return statistics(source, _extractor(features, weights), batch_size)
    exported = [p for p in (MINI / str(source) / "reference.safetensors", Path(source) / "reference.safetensors") if p.is_file()]
    path = exported[0] if exported else Path(source)
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if len(files) < MIN_SAMPLES:
            raise MetricError(f"reference {path}: {len(files)} images are too few, at least {MIN_SAMPLES}")
        check_size(_image_size(files[0]), size)
        return statistics(ImagesPathDataset(files, TransformPILtoRGBTensor()), _extractor(features, weights), batch_size)
    if not path.is_file():
        raise MetricError(f"reference {source}: not an embedded model, a file or a folder")
    if path.suffix == ".npz":
        pooled, spatial, images = read_npz(path)
        if images is None:
            return Statistics(None, pooled, spatial, None, None)
        check_size(images.shape[1:3], size)
        if images.shape[0] < MIN_SAMPLES:
            raise MetricError(f"reference {path}: {images.shape[0]} images are too few, at least {MIN_SAMPLES}")
        of_images = statistics(images, _extractor(features, weights), batch_size)
        # ADM's statistics are of the whole data set, its images often a part of it.
        return of_images._replace(pooled_moments=pooled, spatial_moments=spatial) if pooled is not None else of_images
    if features != "mini":
        raise MetricError(f"reference {source} holds mini features; {features} needs images or an .npz of its own")
    check_size((MiniFeatures.SIZE, MiniFeatures.SIZE), size)
    try:
        t = load_file(path)
        pooled = t["pooled"].double()
        spatial_moments = (t["spatial_mean"].numpy(), t["spatial_cov"].numpy())
        return Statistics(pooled, moments(pooled), spatial_moments, (MiniFeatures.SIZE, MiniFeatures.SIZE), int(t["count"]))
    except (SafetensorError, KeyError) as error:
        raise MetricError(f"reference {path}: damaged or not a reference file ({error})") from error


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


def _extractor(features: str, weights: str | None) -> torch.nn.Module:
    if features not in FEATURES:
        raise MetricError(f"unknown features {features!r}: one of {', '.join(FEATURES)}")
    if features == "inception":  # resolved here, so that the cache sees a change of the variable
        weights = weights or os.environ.get(WEIGHTS_VARIABLE)
    return _load_extractor(features, weights)


@lru_cache(maxsize=2)
def _load_extractor(features: str, weights: str | None) -> torch.nn.Module:
    kinds = {
        "mini": (MiniFeatures, "quest-mini", "pooled", "logits"),
        "inception": (InceptionFeatures, "quest-inception", "2048", "logits_unbiased"),
    }
    cls, name, pooled, logits = kinds[features]
    # the mini network is fast anywhere, and on the CPU its numbers do not depend on a GPU's reduced precision
    device = "cuda" if features == "inception" and torch.cuda.is_available() else "cpu"
    extractor = cls(name, [pooled, "spatial"], feature_extractor_weights_path=weights).to(device).eval()
    if extractor.has_classifier:
        extractor.features_list = [pooled, "spatial", logits]
    return extractor
