"""Image metrics on torch-fidelity, and the distance to the full-precision model's images.

FID depends on the reference and on the number of samples (few samples bias it upwards). Results
carry both.
"""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import (
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

from questlib.errors import MetricError
from reproduce.evaluation.adm import Moments
from reproduce.evaluation.features import load_extractor
from reproduce.evaluation.image_statistics import (
    BATCH,
    Statistics,
    check_images,
    features_of,
    statistics,
)
from reproduce.evaluation.reference import ReferenceSource, load_reference

ISC_PART = 5000  # samples of one part of the Inception Score


class Comparison(TypedDict):
    """Samples against a reference; None for what the reference cannot give.

    Keys:
        fid: Frechet distance of pooled features (Heusel et al. 2017).
        sfid: of spatial features (Nash et al. 2021).
        kid: squared MMD of pooled features (Binkowski et al. 2018).
        precision, recall: Kynkaanniemi et al. 2019.
    """

    fid: float | None
    sfid: float | None
    kid: float | None
    precision: float | None
    recall: float | None


class Evaluation(Comparison, total=False):
    """Metrics of one set of samples; None for what could not be computed.

    Keys:
        inception_score: Salimans et al. 2016.
        psnr_to_fp, feature_distance_to_fp: mean over pairs with the full-precision model's images
            from the same noise; absent without these.
        features: the origin of the features.
        n_samples, n_reference: number of images on either side.
        note: why values are None; absent when none is.
    """

    inception_score: float | None
    psnr_to_fp: float
    feature_distance_to_fp: float | None
    features: str
    n_samples: int
    n_reference: int | None
    note: str


def evaluate(
    images: torch.Tensor,
    *,
    reference: ReferenceSource | None = "mini-ldm4",
    features: str = "mini",
    paired: torch.Tensor | None = None,
    paired_features: torch.Tensor | None = None,
    weights: str | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
) -> Evaluation:
    """All metrics of one set of samples.

    Args:
        images: uint8 [N, 3, H, W].
        reference: an embedded model's name or folder (its training data), what
            `python -m reproduce reference` wrote, a folder of images, a tensor, or ADM's .npz: mu,
            sigma, mu_s, sigma_s, or images arr_0 [N, H, W, 3], or both (then the statistics are the
            file's own, and kid, precision, recall compare with its images, as in ADM's suite). None
            compares with nothing.
        features: "mini", "inception", or "none": only psnr_to_fp can be told then.
        paired: the full-precision model's images from the same noise, uint8 [N, 3, H, W].
        paired_features: theirs, float64 [N, D], where known (`features_of`).
        weights: of Inception, see `reproduce.evaluation.features.inception_weights`.
        seed: of KID's subsets.
        batch_size: images at a time.

    Raises:
        MetricError: something is of the wrong kind, size or number, or cannot be read.

    Example:
        >>> evaluate(samples.images, reference="mini-ldm4")["fid"]
        1.661
    """
    check_images(images, "images")
    if paired is not None:
        check_images(paired, "paired")
        if paired.shape != images.shape:
            raise MetricError(
                f"paired images: expected {tuple(images.shape)}, got {tuple(paired.shape)}"
            )
    if features == "none":
        return _without_features(images, reference, paired)
    extractor = load_extractor(features, weights)
    real = Statistics(None, None, None, None, 0)
    if reference is not None:
        size = tuple(images.shape[-2:])
        real = load_reference(reference, features, weights, batch_size, size=size)
    ours = statistics(images, extractor, batch_size)
    assert ours.pooled is not None
    comparison = compare(ours, real, seed)
    result: Evaluation = {
        **comparison,
        "inception_score": None if ours.logits is None else inception_score(ours.logits),
    }
    if paired is not None:
        teacher = paired_features
        if teacher is None:
            teacher = features_of(paired, features, weights, batch_size)
        distances = (ours.pooled - teacher).norm(dim=1)
        result["psnr_to_fp"] = psnr(images, paired)
        result["feature_distance_to_fp"] = distances.mean().item()
    result["features"] = extractor.source
    result["n_samples"] = len(images)
    result["n_reference"] = real.num_images
    notes = ["no reference was given"] if reference is None else _notes(comparison, real)
    if ours.logits is None:
        notes.append("inception_score: these weights have no classifier layer")
    if notes:
        result["note"] = "; ".join(notes)
    return result


def _notes(comparison: Comparison, real: Statistics) -> list[str]:
    """Why values of a comparison are None."""
    notes = []
    if comparison["fid"] is None:
        notes.append("fid: the reference holds no such statistics")
    if comparison["sfid"] is None:
        notes.append("sfid: the reference holds no such statistics")
    if real.pooled is None:
        notes.append(
            "kid, precision, recall: the reference holds moments only, they need its features"
        )
    return notes


def _without_features(
    images: torch.Tensor, reference: ReferenceSource | None, paired: torch.Tensor | None
) -> Evaluation:
    if reference is not None:
        raise MetricError(
            f"features none: there is nothing to compare with reference {reference} by"
        )
    result: Evaluation = {
        "fid": None,
        "sfid": None,
        "kid": None,
        "precision": None,
        "recall": None,
        "inception_score": None,
        "feature_distance_to_fp": None,
    }
    if paired is not None:
        result["psnr_to_fp"] = psnr(images, paired)
    result["features"] = "none"
    result["n_samples"] = len(images)
    result["n_reference"] = 0
    result["note"] = "no features were taken"
    return result


def compare(ours: Statistics, real: Statistics, seed: int = 0) -> Comparison:
    """Samples against a reference.

    Args:
        seed: of KID's subsets.
    """
    result: Comparison = {
        "fid": frechet(ours.pooled_moments, real.pooled_moments),
        "sfid": frechet(ours.spatial_moments, real.spatial_moments),
        "kid": None,
        "precision": None,
        "recall": None,
    }
    if ours.pooled is not None and real.pooled is not None:
        covered = precision_recall(ours.pooled, real.pooled)
        result["kid"] = kid(ours.pooled, real.pooled, seed)
        result["precision"] = covered["precision"]
        result["recall"] = covered["recall"]
    return result


def inception_score(logits: torch.Tensor) -> float:
    """exp E_x KL(p(y|x) || p(y)) (Salimans et al. 2016, Sec. 4), as ADM's suite takes it.

    It is the mean over parts of 5,000 samples in their order: ten for 50,000. Where 5,000 does not
    divide N, it is that over N // 5,000 equal parts, at least one (ADM: the last one is smaller).

    Args:
        logits: [N, C]; of Inception without the bias.
    """
    parts = max(1, len(logits) // ISC_PART)
    return isc_features_to_metric(logits, splits=parts, shuffle=False)[KEY_METRIC_ISC_MEAN]


def frechet(a: Moments | None, b: Moments | None) -> float | None:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, Eq. 6).

    torch-fidelity computes it, in float64. None if either side is not known.
    """
    if a is None or b is None:
        return None
    if a[0].shape != b[0].shape:
        raise MetricError(
            f"feature widths differ: {a[0].shape[0]} and {b[0].shape[0]}; are these statistics "
            "of other features?"
        )
    stats = [
        {"mu": np.asarray(m, np.float64), "sigma": np.asarray(s, np.float64)} for m, s in (a, b)
    ]
    for side in stats:
        if not all(np.isfinite(values).all() for values in side.values()):
            raise MetricError("statistics: expected finite mu and sigma, found NaN or infinity")
        if (np.diagonal(side["sigma"]) < 0).any():
            raise MetricError("statistics: sigma is no covariance: it has negative variances")
    return fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0) -> float:
    """Unbiased MMD^2 with a cubic kernel (Binkowski et al. 2018, Eq. 4).

    It is the mean over torch-fidelity's 100 random subsets of 1000, or of as many as there are.
    """
    size = min(1000, len(a), len(b))
    values = kid_features_to_metric(a, b, kid_subset_size=size, rng_seed=seed, verbose=False)
    return values[KEY_METRIC_KID_MEAN]


def precision_recall(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, Eq. 2) with k = 3.

    The share of samples `a` inside the reference's neighbourhoods, and of the reference `b` inside
    the samples'.
    """
    # In batches, since distances of 50,000 x 50,000 do not fit into memory.
    values = prc_features_to_metric(a, b, save_cpu_ram=True, prc_batch_size=2000, verbose=False)
    return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


def psnr(images: torch.Tensor, paired: torch.Tensor) -> float:
    """Mean over pairs of the per-image PSNR in dB.

    The squared error is at least that of one value off by one, so that one identical pair does not
    make the mean infinite.

    Args:
        images, paired: uint8 [N, C, H, W].
    """
    pairs = zip(images.split(100), paired.split(100), strict=True)
    errors = [(a.double() - b.double()).square().flatten(1).sum(1) for a, b in pairs]
    error = torch.cat(errors)  # [N]
    mse = error.clamp_min(1.0) / images[0].numel()
    return (10 * torch.log10(255.0**2 / mse)).mean().item()


def latent_snr_db(latents: torch.Tensor, latents_fp: torch.Tensor) -> float:
    """10 log10(sum fp^2 / sum (fp - q)^2) over final latents from the same noise, in dB.

    It is infinite when they are equal.
    """
    if latents.shape != latents_fp.shape:
        raise MetricError(
            f"latents: expected {tuple(latents_fp.shape)}, got {tuple(latents.shape)}"
        )
    q, fp = latents.double(), latents_fp.double()
    if not (q.isfinite().all() and fp.isfinite().all()):
        raise MetricError("latents: NaN or infinite values")
    error = (fp - q).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(fp.square().sum().item() / error)
