"""Quality of an exported model: samples, autoencoder and metric networks against the data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from questlib.diffusion.digests import model_digest
from questlib.diffusion.sampling import autoencoder
from reproduce.evaluation.clip_score import clip_score, load_clip
from reproduce.evaluation.drawing import sample
from reproduce.evaluation.features import load_classifier
from reproduce.evaluation.image_statistics import Statistics, statistics
from reproduce.evaluation.metrics import compare, psnr
from reproduce.models.loading import load_pipeline
from reproduce.models.minis.architectures import MINI_MODELS
from reproduce.models.minis.data import TrainingData
from reproduce.models.minis.latents import reconstruct
from reproduce.models.minis.text import retrieval
from reproduce.models.minis.training import held_out

SEED = 0  # of the samples and of the order of the data
BATCH = 100  # images at a time


def shuffled(data: TrainingData) -> torch.Tensor:
    """Indices of the data in an order drawn from SEED: int64 [N]."""
    return torch.randperm(len(data.images), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def measure(
    name: str,
    data: TrainingData,
    real: Statistics,
    extractor: nn.Module,
    out: Path,
    num_samples: int,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Measure the stored model.

    Labels and prompts of the samples are those of the data in a random order: as frequent as they
    are there.

    Args:
        real: reference statistics.
        extractor: of the metrics' features.
        out: folder of the exported models.

    Returns:
        What quality.json holds, and the samples, uint8 [N, 3, H, W].
    """
    model = MINI_MODELS[name]
    pipe = load_pipeline(out / name)
    order = shuffled(data)
    given: dict[str, Any] = {}
    if model.condition == "class":
        assert data.classes is not None
        given["labels"] = data.classes[order].tolist()
    elif model.condition == "text":
        given["prompts"] = [data.captions[i] for i in order]
    start = time.time()
    images = sample(pipe, num_samples, seed=SEED, **model.sampling, **given).images
    about = {"count": num_samples, "steps": model.sampling["num_inference_steps"], "seed": SEED}
    about |= {k: v for k, v in model.sampling.items() if k == "guidance_scale"}
    about["seconds"] = round(time.time() - start, 1)
    quality = {
        "model_sha256": model_digest(pipe),
        "images": len(data.images),
        "reference": real.num_images,
        "samples": {**about, **compare(statistics(images, extractor), real)},
    }
    vae = autoencoder(pipe)
    if vae is not None:
        halves = [statistics(data.images[part], extractor) for part in order.chunk(2)]
        quality["halves"] = {"count": [h.num_images for h in halves], **compare(*halves)}
        decoded = torch.cat([reconstruct(vae, batch) for batch in data.images.split(BATCH)])
        quality["reconstructions"] = {
            "count": len(decoded),
            "psnr": psnr(decoded, data.images),
            **compare(statistics(decoded, extractor), real),
        }
    # Of each sample the image whose label or caption it was given.
    truth = order[torch.arange(num_samples) % len(order)]
    if model.condition == "class":
        quality["condition"] = _label_figures(out, data, images, truth)
    elif model.condition == "text":
        quality["clip"] = _clip_figures(out / "mini-clip", data, images, truth)
    if "classifier" in model.stages:
        quality["classifier"] = _classifier_figures(out, data)
    return quality, images


def _groups(out: Path, images: torch.Tensor) -> torch.Tensor:
    """Emoji groups that the metric network sees in uint8 images: int64 [N]."""
    classifier = load_classifier(out / "mini-features")
    batches = [batch.float() / 127.5 - 1 for batch in images.split(BATCH)]
    return torch.cat([classifier(batch).argmax(1) for batch in batches])


def _label_figures(
    out: Path, data: TrainingData, samples: torch.Tensor, truth: torch.Tensor
) -> dict[str, float]:
    """How often the classifier finds the group of the label, in samples and in held-out images."""
    test = held_out(data)
    in_samples = _groups(out, samples) == data.labels[truth]
    in_images = _groups(out, data.images[test]) == data.labels[test]
    return {
        "samples": in_samples.float().mean().item(),
        "held_out": in_images.float().mean().item(),
    }


def _clip_figures(
    folder: Path, data: TrainingData, samples: torch.Tensor, truth: torch.Tensor
) -> dict[str, float]:
    """Retrieval on held-out images, and CLIP scores.

    The scores are those of samples with their own prompts, of samples with others' prompts, and of
    real images.
    """
    name = f"local-dir:{folder}"
    net, _, tokenize = load_clip(name, None)
    test = held_out(data)
    tested = [caption for caption, is_test in zip(data.captions, test, strict=True) if is_test]
    captions = [data.captions[i] for i in truth]
    others = captions[1:] + captions[:1]

    def score(images: torch.Tensor, texts: list[str]) -> float:
        return clip_score(images, texts, model=name, pretrained=None)

    return {
        **retrieval(net, data.images[test], tokenize(tested)),
        "score": score(samples, captions),
        "score_of_others": score(samples, others),
        "score_of_images": score(data.images[truth], captions),
    }


def _classifier_figures(out: Path, data: TrainingData) -> dict[str, float]:
    """Accuracy of the metric network on held-out images."""
    test = held_out(data)
    predicted = _groups(out, data.images[test])
    truth = data.labels[test]
    recalls = [(predicted[truth == k] == k).float().mean().item() for k in truth.unique()]
    return {
        "held_out": len(truth),
        "accuracy": (predicted == truth).float().mean().item(),
        "largest_class": torch.bincount(truth).max().item() / len(truth),
        "balanced_accuracy": sum(recalls) / len(recalls),
    }
