"""Text to image: COCO prompts from the official annotations file, and the CLIP score on open_clip."""

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

from questlib.errors import ConfigError, MetricError
from reproduce.evaluation.features import check_images

# OpenAI's ViT-B/16. Its weights were trained with QuickGELU: open_clip's plain "ViT-B-16" would compute another activation.
CLIP_MODEL, CLIP_PRETRAINED = "ViT-B-16-quickgelu", "openai"
COCO_PROMPTS = 10_000


def coco_prompts(annotations: str | Path, count: int = COCO_PROMPTS, seed: int = 0) -> list[str]:
    """`count` captions of different images from COCO's captions_val2014.json, in an order that `seed` alone decides.

    The rule: of each image the caption with the smallest annotation id that is not empty, white space collapsed; images sorted
    by id, then permuted by numpy's RandomState(seed) (its sequence is frozen), and the first `count` taken.
    ConfigError: no such file, not COCO captions, or fewer images with captions than `count`.
    """
    path = Path(annotations)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        captions = {}
        for entry in sorted(
            entries, key=lambda e: -e["id"]
        ):  # the smallest id of an image is written last
            if caption := " ".join(entry["caption"].split()):
                captions[int(entry["image_id"])] = caption
    except OSError as error:
        raise ConfigError(f"COCO annotations {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"COCO annotations {path}: expected a list `annotations` of id, image_id, caption ({error!r})"
        ) from error
    images = sorted(captions)
    if not 1 <= count <= len(images):
        raise ConfigError(
            f"COCO annotations {path}: {len(images)} images with captions, asked for {count}"
        )
    return [
        captions[images[i]] for i in np.random.RandomState(seed).permutation(len(images))[:count]
    ]


@torch.no_grad()
def clip_score(
    images: torch.Tensor,
    prompts: Sequence[str],
    *,
    model: str = CLIP_MODEL,
    pretrained: str | None = CLIP_PRETRAINED,
    batch_size: int = 100,
) -> float:
    """Mean over pairs of 100 max(cos(image, text), 0): CLIPScore (Hessel et al. 2021) without its factor 2.5, times 100.

    images: uint8 [N, 3, H, W], each with its prompt. model: open_clip's name with `pretrained`, its tag or a weights file;
    or "local-dir:FOLDER", which holds both. MetricError: other shapes, or a model that cannot be had.
    """
    check_images(images)
    if len(prompts) != len(images):
        raise MetricError(
            f"clip score: {len(images)} images and {len(prompts)} prompts, expected as many"
        )
    net, preprocess, tokenize = load_clip(model, pretrained)
    device = next(net.parameters()).device
    total = 0.0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        pixels = torch.stack(
            [preprocess(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images[part].cpu()]
        )
        seen = net.encode_image(pixels.to(device), normalize=True)
        read = net.encode_text(tokenize(list(prompts[part])).to(device), normalize=True)
        total += 100 * (seen.double() * read.double()).sum(1).clamp_min(0).sum().item()
    if not np.isfinite(total):
        raise MetricError("clip score: NaN or infinite features")
    return total / len(images)


@lru_cache(maxsize=1)
def load_clip(
    model: str = CLIP_MODEL, pretrained: str | None = CLIP_PRETRAINED
) -> tuple[torch.nn.Module, Any, Any]:
    """(network in eval mode, its image transform, its tokenizer); on the GPU where there is one."""
    named = model if model.startswith("local-dir:") else f"{model} ({pretrained})"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message="QuickGELU mismatch"
            )  # the scores would be a little wrong
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
    return net.to("cuda" if torch.cuda.is_available() else "cpu").eval(), preprocess, tokenize
