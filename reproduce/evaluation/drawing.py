"""Samples of a pipeline, into memory or into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from questlib.diffusion.drawing import Drawing, Samples
from questlib.diffusion.sampling import index_ranges
from questlib.errors import ConfigError
from reproduce.evaluation.samples import read_samples, write_samples


def sample(
    pipe: DiffusionPipeline,
    num_samples: int,
    *,
    batch_size: int = 100,
    out_dir: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
    **drawing: Any,
) -> Samples:
    """Draw images.

    Args:
        out_dir: a folder of samples, where each batch is a file (`reproduce.evaluation.samples`). A
            second call reads what is done and goes on.
        about: what else decides the samples, such as the engine; a folder refuses to mix two.
        drawing: keywords of `questlib.diffusion.drawing.Drawing`.

    Raises:
        ConfigError: counts below one.
        QuestError: `out_dir` holds another run or damaged shards, or cannot be written; or samples
            are not finite.

    Example:
        >>> samples = sample(pipe, 16, num_inference_steps=20, seed=0)
        >>> samples.images.shape
        torch.Size([16, 3, 64, 64])
    """
    if min(num_samples, batch_size) < 1:
        raise ConfigError(
            f"sampling: num_samples, batch_size must be >= 1, found {num_samples}, {batch_size}"
        )
    how = Drawing(pipe, **drawing)
    if out_dir is None:
        ranges = index_ranges(num_samples, batch_size)
        bar = tqdm(ranges, desc="sample", disable=not progress, mininterval=2)
        shards = [how.draw(indices) for indices in bar]
    else:
        run = how.run(num_samples, batch_size) | dict(about or {})
        write_samples(out_dir, run, how.draw, progress=progress)
        shards = list(read_samples(out_dir))
    return Samples(torch.cat([s.images for s in shards]), torch.cat([s.latents for s in shards]))
