"""Loading: the embedded models, folders, hub ids, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import questlib
from questlib.diffusion.digests import model_digest
from questlib.errors import CheckpointError, ConfigError
from reproduce.models.loading import MINI, embedded_models, load_pipeline
from reproduce.models.minis.architectures import MINI_MODELS
from reproduce.models.minis.data import ARCHIVES


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("mini-ldm4")


def test_embedded_model(pipe):
    assert "mini-ldm4" in embedded_models()
    assert type(pipe).__name__ == "LDMPipeline" and type(pipe.scheduler).__name__ == "DDIMScheduler"
    for part in (pipe.unet, pipe.vqvae):
        assert not part.training and {p.dtype for p in part.parameters()} == {torch.float32}
    out = pipe.unet(torch.zeros(2, 3, 16, 16), 5).sample
    assert out.shape == (2, 3, 16, 16) and out.isfinite().all()


def test_embedded_files_are_small_and_readable():
    files = [p for p in MINI.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) < 6e6
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in files)


@pytest.mark.parametrize("name", embedded_models())
def test_card_belongs_to_the_weights(name):
    quality = json.loads((MINI / name / "quality.json").read_text())
    assert quality["model_sha256"] == model_digest(load_pipeline(name))
    card = (MINI / name / "README.md").read_text()
    assert quality["model_sha256"] in card and f"{quality['samples']['fid']:.3f}" in card
    assert ARCHIVES[MINI_MODELS[name].data].licence in card


@pytest.mark.parametrize("name", embedded_models())
def test_the_model_is_good(name):
    """The samples look like the data to the metrics' features.

    The metric networks know the groups and the captions. mini-cifar, trained for an hour and a half
    on one core, is weak, and its card says so: by Inception a fifth of CIFAR-10 is among its
    samples. Its FID of 2,000 samples stays below 100; noise (Q-Diffusion at W4A4, Table 11) has one
    near 300.
    """
    quality = json.loads((MINI / name / "quality.json").read_text())
    samples = quality["samples"]
    assert samples["count"] >= 2000 and samples["precision"] > 0.3
    if ARCHIVES[MINI_MODELS[name].data].features == "mini":
        assert samples["recall"] > 0.3
    else:
        assert samples["recall"] > 0.15 and samples["fid"] < 100
    if "halves" in quality:
        assert quality["halves"]["fid"] < samples["fid"] and quality["reconstructions"]["psnr"] > 20
    if "classifier" in quality:
        assert quality["classifier"]["accuracy"] > quality["classifier"]["largest_class"] + 0.1
    if "condition" in quality:
        assert quality["condition"]["samples"] > 0.6
    if "clip" in quality:
        # Ten times what chance finds.
        assert quality["clip"]["top5"] > 10 * 5 / quality["clip"]["captions"]
        assert quality["clip"]["score"] > quality["clip"]["score_of_others"] + 5


def test_embedded_models_are_36_mb_together():
    assert sum(p.stat().st_size for p in MINI.rglob("*") if p.is_file()) < 36e6


def test_folder_and_digest(pipe, tmp_path):
    folder = shutil.copytree(MINI / "mini-ldm4", tmp_path / "copy")
    other = load_pipeline(folder)
    assert model_digest(other) == model_digest(pipe) == model_digest(pipe.unet)
    with torch.no_grad():
        next(other.unet.parameters()).view(-1)[0] += 1
    assert model_digest(other) != model_digest(pipe)


def test_unknown_name_names_the_known_ones():
    with pytest.raises(ConfigError, match="embedded: mini-cifar, .*; did you mean 'mini-ldm"):
        load_pipeline("mini-ldm5")


def test_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ConfigError, match="model_index.json"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_folder(tmp_path, damage):
    folder = shutil.copytree(MINI / "mini-ldm4", tmp_path / "copy")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pipeline(folder)


def test_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no-such-owner/no-such-model"):
        load_pipeline("no-such-owner/no-such-model")


def test_the_library_knows_the_embedded_models():
    """`reproduce` registers its loader as an entry point."""
    assert type(questlib.load_pipeline("mini-ldm4")).__name__ == "LDMPipeline"


def test_without_a_package_that_ships_models(monkeypatch):
    """Folders can be loaded; a name is none."""
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    assert questlib.load_pipeline(MINI / "mini-ldm4").unet.training is False
    with pytest.raises(ConfigError, match="expected a diffusers folder or a hub id owner/name$"):
        questlib.load_pipeline("mini-ldm4")


def test_another_package_ships_models(tmp_path, monkeypatch):
    (tmp_path / "zoo.py").write_text("def load(name):\n    return f'{name} of the zoo'\n")
    about = tmp_path / "zoo-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[questlib.pipelines]\nzoo = zoo:load\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert questlib.load_pipeline("mini-lion") == "mini-lion of the zoo"
