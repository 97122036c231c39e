"""Bedrooms at a scale of two DDIM steps, with the tiny pipeline of `conftest.tiny`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from reproduce import datasets


def tiny_bedrooms(tiny: Path) -> datasets.Dataset:
    """The data set whose only scale, smoke, has the models and images of a folder."""
    setting = datasets.Setting(
        model=str(tiny / "model"),
        reference=str(tiny / "reference"),
        samples_per_seed=16,
        num_inference_steps=2,
        sample_batch=8,
        calib_samples=4,
    )
    return dataclasses.replace(datasets.DATASETS["bedrooms"], settings={"smoke": setting})
