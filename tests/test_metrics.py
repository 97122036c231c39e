"""Metrics and features: against independent float64 computations, and every way to be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch.utils.data import Dataset

from questlib.errors import MetricError
from reproduce.evaluation import metrics
from reproduce.evaluation.features import MiniFeatures, load_classifier
from reproduce.evaluation.image_statistics import Statistics, moments


def pictures(n: int, seed: int, size: int = 64) -> torch.Tensor:
    """Smooth coloured blobs, uint8 [n, 3, size, size]."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
    ).to(torch.uint8)


@pytest.fixture(scope="module")
def extractor() -> MiniFeatures:
    return MiniFeatures("quest-mini", ["pooled", "spatial"]).eval()


@pytest.fixture(scope="module")
def two_sets(extractor) -> tuple[Statistics, Statistics]:
    first = metrics.statistics(pictures(300, 1), extractor)
    return first, metrics.statistics(255 - pictures(280, 2), extractor)


def independent_fid(x: np.ndarray, y: np.ndarray) -> float:
    """By the symmetric form tr((S_x^1/2 S_y S_x^1/2)^1/2), and eigh in place of eigvals."""
    sx, sy = (((v - v.mean(0)).T @ (v - v.mean(0))) / (len(v) - 1) for v in (x, y))
    w, q = np.linalg.eigh(sx)
    root = q @ np.diag(np.sqrt(w.clip(0))) @ q.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sy @ root).clip(0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx) + np.trace(sy) - 2 * cross)


def independent_kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3, from its definition."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy = (
        (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))
    )
    return float(xx + yy - 2 * kernel(x, y).mean())


def test_fid_equals_an_independent_computation(two_sets):
    a, b = two_sets
    expected = independent_fid(a.pooled.numpy(), b.pooled.numpy())
    assert expected > 0
    assert metrics.frechet(a.pooled_moments, b.pooled_moments) == pytest.approx(expected, rel=1e-5)


def test_sfid_is_fid_of_the_spatial_features(extractor, two_sets):
    x, y = pictures(300, 1), 255 - pictures(280, 2)
    spatial = [
        extractor.classifier.features(i.float() / 127.5 - 1)["spatial"].double().numpy()
        for i in (x, y)
    ]
    a, b = two_sets
    assert metrics.frechet(a.spatial_moments, b.spatial_moments) == pytest.approx(
        independent_fid(*spatial), rel=1e-4
    )


def test_kid_equals_an_independent_computation(two_sets):
    a, b = (
        s.pooled[:280] for s in two_sets
    )  # equal counts below 1000: every subset is the whole set
    assert metrics.kid(a, b) == pytest.approx(independent_kid(a.numpy(), b.numpy()), rel=1e-9)


def test_kid_depends_on_its_seed_only(two_sets):
    a, b = two_sets
    assert metrics.kid(a.pooled, b.pooled, seed=3) == metrics.kid(a.pooled, b.pooled, seed=3)
    assert metrics.kid(a.pooled, b.pooled, seed=3) != metrics.kid(a.pooled, b.pooled, seed=4)


def test_precision_and_recall_equal_an_independent_computation(two_sets):
    """By the definition.

    A point lies in a set's manifold if some point of the set is nearer than its own 3rd neighbour.
    """
    a, b = (s.pooled.numpy() for s in two_sets)
    a, mixed = a[:150], np.concatenate([b[:75], a[150:225]])  # so that neither is 0 or 1

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        radius = [
            np.sort(np.linalg.norm(by - x, axis=1))[3] for x in by
        ]  # the 0th is the point itself
        return float(np.mean([(np.linalg.norm(by - x, axis=1) <= radius).any() for x in points]))

    expected = {"precision": covered(mixed, a), "recall": covered(a, mixed)}
    assert 0 < expected["recall"] < 1 and 0 < expected["precision"] < 1
    assert metrics.precision_recall(torch.from_numpy(mixed), torch.from_numpy(a)) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(("count", "parts"), [(60, 1), (5000, 1), (10_000, 2), (12_000, 2)])
def test_inception_score_equals_an_independent_computation(count, parts):
    logits = torch.randn(count, 7, generator=torch.Generator().manual_seed(count)) * 2
    scores = []
    for part in np.split(logits.double().numpy(), parts):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert (
        metrics.inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-9)
        and np.mean(scores) > 1.5
    )


def test_inception_score_of_evaluate_is_that_of_the_logits(extractor):
    x = pictures(40, 5)
    logits = extractor.classifier.features(x.float() / 127.5 - 1)["logits"]
    result = metrics.evaluate(x, reference=None)
    assert (
        result["inception_score"] == pytest.approx(metrics.inception_score(logits), rel=1e-6)
        and result["inception_score"] > 1
    )
    assert (
        result["fid"] is None
        and result["kid"] is None
        and result["note"] == "no reference was given"
    )


def test_a_set_with_itself():
    x = pictures(300, 1)
    result = metrics.evaluate(x, reference=x, paired=x)
    assert abs(result["fid"]) < 1e-6 and abs(result["sfid"]) < 1e-5
    assert result["precision"] == result["recall"] == 1.0
    assert result["feature_distance_to_fp"] == 0.0 and math.isfinite(result["psnr_to_fp"])
    assert (
        result["features"] == "quest-mini" and result["n_samples"] == result["n_reference"] == 300
    )


def test_registered_with_torch_fidelity():
    class Pictures(Dataset):
        def __init__(self, images: torch.Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> torch.Tensor:
            return self.images[i]

    x, y = pictures(200, 1), 255 - pictures(200, 2)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(x),
        input2=Pictures(y),
        feature_extractor="quest-mini",
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        kid_subset_size=200,
        rng_seed=0,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = metrics.evaluate(x, reference=y)
    assert theirs["frechet_inception_distance"] == pytest.approx(ours["fid"], rel=1e-3)
    assert theirs["kernel_inception_distance_mean"] == pytest.approx(ours["kid"], rel=1e-3)
    assert theirs["precision"] == ours["precision"] and theirs["inception_score_mean"] >= 1


def test_embedded_reference_is_the_training_data():
    result = metrics.evaluate(pictures(32, 1))
    assert result["n_reference"] > 3000
    assert result["fid"] > 0 and result["sfid"] > 0 and result["kid"] > 0


def test_psnr_of_a_known_error():
    x = torch.full((16, 3, 64, 64), 100, dtype=torch.uint8)
    assert metrics.psnr(x, x + 5) == pytest.approx(20 * math.log10(255 / 5))


def test_feature_distance_is_the_mean_l2_distance(extractor):
    x, y = pictures(20, 1), pictures(20, 2)
    a, b = (extractor.classifier.features(i.float() / 127.5 - 1)["pooled"] for i in (x, y))
    expected = (a - b).square().sum(1).sqrt().mean().item()
    assert metrics.evaluate(x, reference=y, paired=y)["feature_distance_to_fp"] == pytest.approx(
        expected, rel=1e-5
    )


def test_latent_snr():
    fp = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert metrics.latent_snr_db(fp * 1.1, fp) == pytest.approx(20.0, abs=1e-4)
    assert metrics.latent_snr_db(fp, fp) == math.inf


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (pictures(15, 0), {}, "too few"),
        (pictures(16, 0).float(), {}, "uint8"),
        (pictures(16, 0).numpy(), {}, "uint8 tensor"),
        (pictures(16, 0)[:, :1], {}, r"\[N, 3, H, W\]"),
        (pictures(16, 0)[0], {}, r"\[N, 3, H, W\]"),
        (pictures(16, 0), {"paired": pictures(17, 0)}, "paired"),
        (pictures(16, 0), {"paired": pictures(16, 0).float()}, "paired"),
        (pictures(16, 0, 32), {"reference": pictures(16, 1)}, "32x32, the reference is 64x64"),
        (pictures(16, 0, 32), {"reference": pictures(16, 1, 32)}, "need 64x64"),
        (pictures(16, 0), {"reference": pictures(15, 1)}, "too few"),
        (pictures(16, 0), {"reference": "no-such-model"}, "not an embedded model"),
        (pictures(16, 0), {"features": "vgg"}, "mini, inception"),
    ],
)
def test_bad_input(images, kwargs, message):
    with pytest.raises(MetricError, match=message):
        metrics.evaluate(images, **kwargs)


def test_without_features():
    """PSNR needs none; what needs them is None, and a reference is refused rather than ignored."""
    x, y = pictures(16, 1, 32), pictures(16, 2, 32)
    result = metrics.evaluate(x, reference=None, features="none", paired=y)
    assert (
        result["psnr_to_fp"] == metrics.psnr(x, y)
        and result["fid"] is result["feature_distance_to_fp"] is None
    )
    assert (result["features"], result["note"]) == ("none", "no features were taken")
    with pytest.raises(MetricError, match="nothing to compare with reference mini-ldm4"):
        metrics.evaluate(x, features="none")


def test_nan_is_an_error():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(MetricError, match="NaN"):
        metrics.latent_snr_db(x / 0, x)
    with pytest.raises(MetricError, match="expected"):
        metrics.latent_snr_db(x[:1], x)
    with pytest.raises(MetricError, match="NaN"):
        moments(torch.full((4, 2), torch.nan))
    with pytest.raises(MetricError, match="widths differ"):
        metrics.frechet(moments(torch.rand(9, 3)), moments(torch.rand(9, 4)))


def test_no_metrics_without_the_trained_classifier(tmp_path):
    with pytest.raises(MetricError, match="trained classifier"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text('{"num_classes": 9, "width": 24}')
    (tmp_path / "classifier.safetensors").write_bytes(b"damaged")
    with pytest.raises(MetricError, match="trained classifier"):
        load_classifier(tmp_path)


def test_reference_folder_of_images(tmp_path):
    x = pictures(20, 1)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02d}.png")
    assert abs(metrics.evaluate(x, reference=tmp_path)["fid"]) < 1e-4
    Image.new("RGB", (32, 32)).save(tmp_path / "99.png")
    with pytest.raises(MetricError):
        metrics.evaluate(x, reference=tmp_path)
    with pytest.raises(MetricError, match="too few"):
        (tmp_path / "empty").mkdir()
        metrics.evaluate(x, reference=tmp_path / "empty")


def test_reference_npz(tmp_path, two_sets):
    x, path = pictures(300, 1), tmp_path / "reference.npz"
    other = two_sets[1]
    np.savez(path, mu=other.pooled_moments[0], sigma=other.pooled_moments[1])
    result = metrics.evaluate(x, reference=path)
    assert result["fid"] == pytest.approx(
        metrics.frechet(two_sets[0].pooled_moments, other.pooled_moments)
    )
    assert (
        result["sfid"] is None
        and result["kid"] is None
        and "sfid" in result["note"]
        and "kid" in result["note"]
    )
    np.savez(
        path,
        mu=other.pooled_moments[0],
        sigma=other.pooled_moments[1],
        mu_s=other.spatial_moments[0],
        sigma_s=other.spatial_moments[1],
    )
    assert metrics.evaluate(x, reference=path)["sfid"] > 0
    np.savez(path, x.permute(0, 2, 3, 1).numpy())  # ADM's reference batches: arr_0, channels last
    assert abs(metrics.evaluate(x, reference=path)["fid"]) < 1e-6
    np.savez(path, something=x.numpy())
    with pytest.raises(MetricError, match="arr_0"):
        metrics.evaluate(x, reference=path)
    path.write_bytes(b"damaged")
    with pytest.raises(MetricError, match="damaged"):
        metrics.evaluate(x, reference=path)


def test_damaged_reference_file(tmp_path):
    (tmp_path / "reference.safetensors").write_bytes(b"damaged")
    with pytest.raises(MetricError, match="damaged"):
        metrics.evaluate(pictures(16, 0), reference=tmp_path / "reference.safetensors")


@pytest.mark.parametrize("damage", ["nan", "inf", "negative"])
def test_statistics_that_are_no_covariance_are_refused(damage):
    eye = np.eye(4)
    sigma = {"nan": eye * np.nan, "inf": np.where(eye, np.inf, 0), "negative": -eye}[damage]
    with pytest.raises(MetricError, match="statistics"):
        metrics.frechet((np.zeros(4), eye), (np.zeros(4), sigma))
