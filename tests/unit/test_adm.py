"""ADM's .npz: numpy and the metrics read what is written; and every way to be wrong."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from questlib.diffusion.drawing import Samples
from questlib.errors import MetricError, QuestError
from reproduce.__main__ import main
from reproduce.evaluation import features, metrics, reference
from reproduce.evaluation.adm import NpzImages, export_npz, read_npz
from reproduce.evaluation.samples import write_samples


def pictures(n: int, seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def shards(tmp_path):
    """(folder with three shards of 20 samples in all, the images)."""
    x = pictures(20)
    write_samples(
        tmp_path / "shards",
        {"num_samples": 20, "batch_size": 8},
        lambda r: Samples(x[r.start : r.stop], torch.zeros(len(r), 1)),
    )
    return tmp_path / "shards", x


def test_exported_file_is_what_numpy_reads(shards, tmp_path):
    folder, x = shards
    assert export_npz(folder, tmp_path / "out.npz") == (20, 64, 64, 3)
    with np.load(tmp_path / "out.npz") as data:
        assert data.files == ["arr_0"] and data["arr_0"].dtype == np.uint8
        assert np.array_equal(data["arr_0"], x.permute(0, 2, 3, 1).numpy())
    assert torch.equal(torch.stack(list(NpzImages(tmp_path / "out.npz"))), x)
    # No temporary file is left.
    assert {p.name for p in tmp_path.iterdir()} == {"shards", "out.npz"}
    assert abs(metrics.evaluate(x, reference=tmp_path / "out.npz")["fid"]) < 1e-6


def test_export_of_the_first_samples_by_the_command(shards, tmp_path, capsys):
    folder, x = shards
    assert main(["export-npz", str(folder), str(tmp_path / "out.npz"), "--count", "10"]) == 0
    assert "10 images of 64x64" in capsys.readouterr().out
    assert np.array_equal(
        np.load(tmp_path / "out.npz")["arr_0"], x[:10].permute(0, 2, 3, 1).numpy()
    )
    assert main(["export-npz", str(folder), str(tmp_path / "out.npz")]) == 2  # never overwritten
    assert "exists already" in capsys.readouterr().err
    assert len(np.load(tmp_path / "out.npz")["arr_0"]) == 10


def test_compressed_files_are_read_too(tmp_path):
    x = pictures(16)
    np.savez_compressed(tmp_path / "c.npz", x.permute(0, 2, 3, 1).numpy())
    assert torch.equal(torch.stack(list(NpzImages(tmp_path / "c.npz"))), x)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "000008-8.safetensors").unlink(), "1 of 3 shards are missing"),
        (lambda f: (f / "run.json").unlink(), "not a folder of samples"),
        (lambda f: (f / "000000-8.safetensors").write_bytes(b"damaged"), "damaged"),
        (
            lambda f: (f / "000016-4.safetensors").write_bytes(b"damaged"),
            "damaged",
        ),  # found when half is written
        (
            lambda f: save_file({"images": pictures(4)}, f / "000016-4.safetensors"),
            "belongs to another run",
        ),
    ],
)
def test_bad_samples_leave_no_file(shards, tmp_path, spoil, message):
    folder, _ = shards
    spoil(folder)
    with pytest.raises(QuestError, match=message):
        export_npz(folder, tmp_path / "out.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


def test_bad_choices(shards, tmp_path):
    folder, _ = shards
    for count in (0, 21):
        with pytest.raises(MetricError, match=f"20 samples, asked for {count}"):
            export_npz(folder, tmp_path / "out.npz", count)
    with pytest.raises(MetricError, match="ends in .npz"):
        export_npz(folder, tmp_path / "out.zip")
    with pytest.raises(MetricError, match="cannot be written"):
        export_npz(folder, tmp_path / "absent" / "out.npz")


def test_statistics_and_images_in_one_file(tmp_path):
    """As ADM does: FID and sFID by the file's statistics, the others by its images."""
    x, y, path = pictures(40, 1), pictures(30, 2), tmp_path / "reference.npz"
    extractor = features.load_extractor("mini")
    whole = metrics.statistics(pictures(200, 3), extractor)
    (mu, sigma), (mu_s, sigma_s) = whole.pooled_moments, whole.spatial_moments
    np.savez(path, y.permute(0, 2, 3, 1).numpy(), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    result, of_images = metrics.evaluate(x, reference=path), metrics.evaluate(x, reference=y)
    ours = metrics.statistics(x, extractor)
    assert result["fid"] == pytest.approx(metrics.frechet(ours.pooled_moments, (mu, sigma)))
    assert result["sfid"] == pytest.approx(metrics.frechet(ours.spatial_moments, (mu_s, sigma_s)))
    assert result["fid"] != pytest.approx(of_images["fid"], rel=1e-3)
    for name in ("kid", "precision", "recall", "n_reference"):
        assert result[name] == of_images[name]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "belong together"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"expected \[D\] and \[D, D\]"),
        (
            {"mu": np.zeros(3), "sigma": np.zeros((3, 3)), "mu_s": np.zeros(3)},
            "mu_s and sigma_s belong together",
        ),
        ({"images": np.zeros(3)}, "expected mu and sigma, or images arr_0; found images"),
        ({}, "found nothing"),
        ({"arr_0": np.zeros((16, 3, 64, 64), np.uint8)}, r"expected uint8 \[N, H, W, 3\]"),
        ({"arr_0": np.zeros((16, 64, 64, 3))}, "expected uint8"),
        (
            {"arr_0": np.zeros((16, 32, 32, 3), np.uint8)},
            "images are 64x64, the reference is 32x32",
        ),
        ({"arr_0": np.zeros((15, 64, 64, 3), np.uint8)}, "15 images are too few"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "widths differ: 128 and 2048"),
    ],
)
def test_bad_reference(tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(MetricError, match=message):
        metrics.evaluate(pictures(16), reference=tmp_path / "r.npz")


def test_wrong_resolution_is_found_before_any_feature_is_computed(tmp_path, monkeypatch):
    np.savez(tmp_path / "r.npz", np.zeros((16, 32, 32, 3), np.uint8))
    monkeypatch.setattr(reference, "statistics", lambda *a: pytest.fail("features were computed"))
    with pytest.raises(MetricError, match="the reference is 32x32"):
        metrics.evaluate(pictures(16), reference=tmp_path / "r.npz")


def test_cut_and_changed_files(tmp_path):
    path = tmp_path / "r.npz"
    np.savez(path, np.zeros((20, 64, 64, 3), np.uint8))
    whole = path.read_bytes()
    for damaged in (b"", whole[:5000], whole[:5000] + b"\x07" + whole[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(MetricError, match="damaged"):
            metrics.evaluate(pictures(16), reference=path)
    with zipfile.ZipFile(path, "w") as archive:  # fewer images than the header says
        whole_array = np.lib.format.header_data_from_array_1_0(np.zeros((20, 64, 64, 3), np.uint8))
        with archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, whole_array)
            file.write(bytes(3 * 64 * 64 * 3))
    with pytest.raises(MetricError, match="arr_0 ends after 3 of 20 images"):
        metrics.evaluate(pictures(16), reference=path)
    assert read_npz(path).images.shape == (20, 64, 64, 3)
