"""Image metrics on torch-fidelity: FID, sFID, KID, IS, precision and recall, and the distance to the full-precision images.

FID depends on the reference set and on the number of samples (few samples bias it upwards); results carry both.
"""

from __future__ import annotations

import math
from pathlib import Path

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
from reproduce.evaluation.features import (
    BATCH,
    Statistics,
    check_images,
    features_of,
    load_extractor,
    statistics,
)
from reproduce.evaluation.reference import load_reference

ISC_PART = 5000  # samples of one part of the Inception Score


def evaluate(
    images: torch.Tensor,
    *,
    reference: str | Path | torch.Tensor | None = "mini-ldm4",
    features: str = "mini",
    paired: torch.Tensor | None = None,
    paired_features: torch.Tensor | None = None,
    weights: str | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
) -> dict[str, float | int | str | None]:
    """fid, sfid, kid, precision, recall against `reference`, inception_score; with `paired` psnr_to_fp, feature_distance_to_fp.

    images, paired: uint8 [N, 3, H, W]; `paired` holds the full-precision model's images from the same noise.
    paired_features: theirs [N, D], where known (`features_of`); taken from `paired` otherwise.
    reference: an embedded model's name, its folder or reference.safetensors (its training data), what `python -m questlib
        reference` wrote, a folder of images, a tensor, or ADM's .npz: mu, sigma, mu_s, sigma_s, or images arr_0 [N, H, W, 3],
        or both (then the statistics are the file's own and kid, precision, recall compare with its images, as in ADM's suite);
        None: compare with nothing.
    features: "mini", "inception", or "none": nothing but psnr_to_fp can be told then.
    "features", "n_samples", "n_reference" say what was compared. What the reference cannot give is None, and "note" says why.
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
    ref = Statistics(None, None, None, None, 0)
    if reference is not None:
        ref = load_reference(
            reference, features, weights, batch_size, size=tuple(images.shape[-2:])
        )
    ours = statistics(images, extractor, batch_size)
    result: dict[str, float | int | str | None] = dict(compare(ours, ref, seed))
    result["inception_score"] = None if ours.logits is None else inception_score(ours.logits)
    notes = [
        f"{k}: the reference holds no such statistics" for k in ("fid", "sfid") if result[k] is None
    ]
    if ref.pooled is None:
        notes.append(
            "kid, precision, recall: the reference holds moments only, they need its features"
        )
    notes = ["no reference was given"] if reference is None else notes
    if ours.logits is None:
        notes.append("inception_score: these weights have no classifier layer")
    if paired is not None:
        result["psnr_to_fp"] = psnr(images, paired)
        teacher = (
            features_of(paired, features, weights, batch_size)
            if paired_features is None
            else paired_features
        )
        result["feature_distance_to_fp"] = (ours.pooled - teacher).norm(dim=1).mean().item()
    return result | {
        "features": extractor.source,
        "n_samples": len(images),
        "n_reference": ref.count,
        **({"note": "; ".join(notes)} if notes else {}),
    }


def _without_features(
    images: torch.Tensor, reference: str | Path | torch.Tensor | None, paired: torch.Tensor | None
) -> dict[str, float | int | str | None]:
    if reference is not None:
        raise MetricError(
            f"features none: there is nothing to compare with reference {reference} by"
        )
    names = (
        "fid",
        "sfid",
        "kid",
        "precision",
        "recall",
        "inception_score",
        "feature_distance_to_fp",
    )
    result: dict[str, float | int | str | None] = dict.fromkeys(names)
    if paired is not None:
        result["psnr_to_fp"] = psnr(images, paired)
    return result | {
        "features": "none",
        "n_samples": len(images),
        "n_reference": 0,
        "note": "no features were taken",
    }


def compare(a: Statistics, b: Statistics, seed: int = 0) -> dict[str, float | None]:
    """fid, sfid, kid, precision, recall of samples `a` against reference `b`; None where `b` does not hold what is needed."""
    result = {
        "fid": frechet(a.pooled_moments, b.pooled_moments),
        "sfid": frechet(a.spatial_moments, b.spatial_moments),
    }
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
        raise MetricError(
            f"feature widths differ: {a[0].shape[0]} and {b[0].shape[0]}; are these statistics of other features?"
        )
    stats = [
        {"mu": np.asarray(m, np.float64), "sigma": np.asarray(s, np.float64)} for m, s in (a, b)
    ]
    return fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]


def kid(a: torch.Tensor, b: torch.Tensor, seed: int = 0) -> float:
    """Unbiased cubic-kernel MMD^2: mean over torch-fidelity's 100 random subsets of 1000, or of as many as there are."""
    size = min(1000, len(a), len(b))
    return kid_features_to_metric(a, b, kid_subset_size=size, rng_seed=seed, verbose=False)[
        KEY_METRIC_KID_MEAN
    ]


def precision_recall(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Kynkaanniemi et al. 2019, k = 3: share of samples a inside the reference's neighbourhoods, and of b inside the samples'."""
    values = prc_features_to_metric(
        a, b, save_cpu_ram=True, prc_batch_size=2000, verbose=False
    )  # 50,000 x 50,000 do not fit
    return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


def psnr(images: torch.Tensor, paired: torch.Tensor) -> float:
    """Mean over pairs of the per-image PSNR in dB.

    The squared error is at least that of one value off by one, so that one identical pair does not make the mean infinite.
    """
    pairs = zip(images.split(100), paired.split(100), strict=True)
    error = torch.cat(
        [(a.double() - b.double()).square().flatten(1).sum(1) for a, b in pairs]
    )  # [N]
    mse = error.clamp_min(1.0) / images[0].numel()
    return (10 * torch.log10(255.0**2 / mse)).mean().item()


def latent_snr_db(latents: torch.Tensor, latents_fp: torch.Tensor) -> float:
    """10 log10(sum fp^2 / sum (fp - q)^2) over final latents from the same noise; inf when they are equal."""
    if latents.shape != latents_fp.shape:
        raise MetricError(
            f"latents: expected {tuple(latents_fp.shape)}, got {tuple(latents.shape)}"
        )
    q, fp = latents.double(), latents_fp.double()
    if not (q.isfinite().all() and fp.isfinite().all()):
        raise MetricError("latents: NaN or infinite values")
    error = (fp - q).square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(fp.square().sum().item() / error)
