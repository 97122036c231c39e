"""A random latent diffusion pipeline, metric classifier and reference set.

They are small enough to run real rows in a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from PIL import Image
from safetensors.torch import save_file
from tiny_bedrooms import tiny_bedrooms

import questlib
from reproduce import datasets, plan, seed_run
from reproduce.choices import Choices
from reproduce.evaluation import features
from reproduce.models.classifier import GroupClassifier
from reproduce.pipeline import run_row


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder with model/, classifier/ and images (reference.npz)."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tiny")
    vae = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=64,
    )
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler(clip_sample=False)).save_pretrained(
        root / "model"
    )
    (root / "classifier").mkdir()
    classifier = GroupClassifier(9, 16)
    save_file(classifier.state_dict(), root / "classifier" / "classifier.safetensors")
    (root / "classifier" / "config.json").write_text(json.dumps({"num_classes": 9, "width": 16}))
    (root / "reference").mkdir()
    for i in range(20):
        Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()).save(
            root / "reference" / f"{i}.png"
        )
    return root


@pytest.fixture
def tiny_plan(tiny, tmp_path, monkeypatch):
    """make(table, **choices) -> a plan at a scale of two DDIM steps on the tiny pipeline."""
    monkeypatch.setattr(features, "MINI_FEATURES", tiny / "classifier")
    features._load_extractor.cache_clear()
    seed_run.load.cache_clear()
    monkeypatch.setitem(datasets.DATASETS, "bedrooms", tiny_bedrooms(tiny))

    def make(table: str = "table3", **choices):
        return plan.make_plan(
            table,
            Choices(scale="smoke", results=tmp_path / "results", work=tmp_path / "work", **choices),
        )

    yield make
    features._load_extractor.cache_clear()
    seed_run.load.cache_clear()


@pytest.fixture
def stop_at_the_end(monkeypatch):
    """stop(row, plan): a run that is stopped before it saves what it has quantized."""

    def interrupt(*args):
        raise KeyboardInterrupt

    def stop(row, plan):
        with monkeypatch.context() as patch:
            patch.setattr(questlib, "save_pretrained", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_row(row, plan)

    return stop
