"""Text to image: COCO prompts from the official annotations, and the CLIP score on open_clip."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors import SafetensorError

from questlib.distributed import device
from questlib.errors import ConfigError, MetricError
from reproduce.evaluation.constants import CLIP_MODEL, CLIP_PRETRAINED, COCO_PROMPTS
from reproduce.evaluation.image_statistics import check_images


def coco_prompts(annotations: str | Path, count: int = COCO_PROMPTS, seed: int = 0) -> list[str]:
    """Captions of different images from COCO's captions_val2014.json.

    The rule: of each image the caption with the smallest annotation id that is not empty, white
    space collapsed; images sorted by id, then permuted by numpy's RandomState(seed) (its sequence
    is frozen), and the first `count` taken.

    Raises:
        ConfigError: no such file, not COCO captions, or fewer images with captions than `count`.

    Example:
        >>> prompts = coco_prompts("annotations/captions_val2014.json", count=5000)
    """
    path = Path(annotations)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        captions: dict[int, str] = {}
        # In descending order, so that the smallest id of an image is written last and stays.
        for entry in sorted(entries, key=lambda e: -e["id"]):
            if caption := " ".join(entry["caption"].split()):
                captions[int(entry["image_id"])] = caption
    except OSError as error:
        raise ConfigError(f"COCO annotations {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"COCO annotations {path}: expected a list `annotations` of id, image_id, caption "
            f"({error!r})"
        ) from error
    images = sorted(captions)
    if not 1 <= count <= len(images):
        raise ConfigError(
            f"COCO annotations {path}: {len(images)} images with captions, asked for {count}"
        )
    order = np.random.RandomState(seed).permutation(len(images))
    return [captions[images[i]] for i in order[:count]]


@torch.no_grad()
def clip_score(
    images: torch.Tensor,
    prompts: Sequence[str],
    *,
    model: str = CLIP_MODEL,
    pretrained: str | None = CLIP_PRETRAINED,
    batch_size: int = 100,
) -> float:
    """Mean over pairs of 100 max(cos(image, text), 0).

    It is CLIPScore (Hessel et al. 2021, Eq. 1) without its factor 2.5, times 100.

    Args:
        images: uint8 [N, 3, H, W].
        prompts: one for each image.
        model: open_clip's name; or "local-dir:FOLDER", which holds the weights, too.
        pretrained: open_clip's tag of the weights, or a file.

    Raises:
        MetricError: other shapes, or a model that cannot be had.
    """
    check_images(images)
    if len(prompts) != len(images):
        raise MetricError(
            f"clip score: {len(images)} images and {len(prompts)} prompts, expected as many"
        )
    net, preprocess, tokenize = load_clip(model, pretrained)
    where = next(net.parameters()).device
    total = 0.0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        channels_last = images[part].permute(0, 2, 3, 1).cpu()  # NCHW -> NHWC
        pixels = torch.stack([preprocess(Image.fromarray(i.numpy())) for i in channels_last])
        seen = net.encode_image(pixels.to(where), normalize=True)
        read = net.encode_text(tokenize(list(prompts[part])).to(where), normalize=True)
        total += 100 * (seen.double() * read.double()).sum(1).clamp_min(0).sum().item()
    if not np.isfinite(total):
        raise MetricError("clip score: NaN or infinite features")
    return total / len(images)


@lru_cache(maxsize=1)
def load_clip(
    model: str = CLIP_MODEL, pretrained: str | None = CLIP_PRETRAINED
) -> tuple[torch.nn.Module, Any, Any]:
    """(network in eval mode, its image transform, its tokenizer); on the GPU where there is one.

    Raises:
        MetricError: the model cannot be loaded.
    """
    named = model if model.startswith("local-dir:") else f"{model} ({pretrained})"
    try:
        with warnings.catch_warnings():
            # With another activation than in training the scores would be a little wrong.
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            net, preprocess = open_clip.create_model_from_pretrained(model, pretrained)
            tokenize = open_clip.get_tokenizer(model)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        UserWarning,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise MetricError(
            f"clip score: the model {named} cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    return net.to(device()).eval(), preprocess, tokenize
