"""python -m reproduce reference: statistics that are taken once stand for their images."""

import numpy as np
import pytest
import torch

from questlib.errors import MetricError
from reproduce.__main__ import main
from reproduce.evaluation import metrics
from reproduce.evaluation.features import load_extractor
from reproduce.evaluation.image_statistics import statistics
from reproduce.evaluation.reference import check_features


def noise(count: int) -> torch.Tensor:
    """Images, uint8 [count, 3, 64, 64]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def command(source, out) -> int:
    """The command's exit code."""
    return main(["reference", str(source), str(out), "--features", "mini"])


def test_reference_taken_once(tmp_path, capsys):
    """The file gives the same metrics as the images, but for features rounded to fp16."""
    x, npz, out = noise(40), tmp_path / "images.npz", tmp_path / "r.safetensors"
    np.savez(npz, x[:24].permute(0, 2, 3, 1).numpy())
    assert command(npz, out) == 0
    assert "mini features of 24 images of 64x64" in capsys.readouterr().out
    ours = metrics.evaluate(x[24:], reference=out)
    direct = metrics.evaluate(x[24:], reference=x[:24])
    for name in ("fid", "sfid", "kid", "precision", "recall"):
        assert ours[name] == pytest.approx(direct[name], rel=1e-3, abs=1e-5), name
    assert ours["n_reference"] == 24
    with pytest.raises(MetricError, match="images are 32x32, the reference is 64x64"):
        metrics.evaluate(x[24:, :, :32, :32].contiguous(), reference=out)
    with pytest.raises(MetricError, match="holds mini features, not inception: give images"):
        check_features(out, "inception")


def test_nothing_is_overwritten(tmp_path, capsys):
    npz, out = tmp_path / "images.npz", tmp_path / "r.safetensors"
    np.savez(npz, noise(16).permute(0, 2, 3, 1).numpy())
    out.write_bytes(b"kept")
    assert command(npz, out) == 2
    assert str(out) in capsys.readouterr().err and out.read_bytes() == b"kept"
    assert command(npz, tmp_path / "r.npz") == 2


def test_moments_alone_and_damaged_files(tmp_path, capsys):
    np.savez(tmp_path / "moments.npz", mu=np.zeros(128), sigma=np.eye(128))
    assert command(tmp_path / "moments.npz", tmp_path / "s.safetensors") == 2
    assert "can be used as they are" in capsys.readouterr().err
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    with pytest.raises(MetricError, match="damaged or not a reference file"):
        metrics.evaluate(noise(16), reference=tmp_path / "bad.safetensors")


def test_reference_keeps_the_statistics_of_the_whole_data_set(tmp_path):
    """ADM's batches hold some images, and mean and covariance of many more.

    They may lack those of the spatial features.
    """
    x, npz = noise(40), tmp_path / "adm.npz"
    whole = statistics(x, load_extractor("mini"))
    images = x[:24].permute(0, 2, 3, 1).numpy()
    pooled = dict(zip(("mu", "sigma"), whole.pooled_moments, strict=True))
    spatial = dict(zip(("mu_s", "sigma_s"), whole.spatial_moments, strict=True))
    for i, known in enumerate((pooled, pooled | spatial)):
        np.savez(npz, images, **known)
        out = tmp_path / f"{i}.safetensors"
        assert command(npz, out) == 0
        stored = metrics.evaluate(x[24:], reference=out)
        direct = metrics.evaluate(x[24:], reference=npz)
        assert stored["fid"] == direct["fid"] and stored["sfid"] == direct["sfid"]
        assert (stored["sfid"] is None) == (known is pooled)
