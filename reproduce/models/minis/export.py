"""Write a trained mini model as package data, measure it, and make its model card: the end of reproduce.models.minis.training.

`python -m reproduce.models.minis.export --model NAME --work DIR --out DIR` repeats the measuring and the card on the exported files
alone; DIR of --work holds the data archive. Every number in the card comes from the training logs or from quality.json.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import save_file
from torch import nn

from questlib.diffusion.digests import model_digest
from questlib.errors import ConfigError, QuestError
from reproduce.evaluation.clip_score import clip_score, load_clip
from reproduce.evaluation.drawing import sample
from reproduce.evaluation.features import (
    MiniFeatures,
    Statistics,
    load_classifier,
    load_extractor,
    statistics,
)
from reproduce.evaluation.metrics import compare, psnr
from reproduce.evaluation.reference import load_reference, open_reference, save_reference
from reproduce.models.classifier import GroupClassifier
from reproduce.models.loading import load_pipeline
from reproduce.models.minis.architectures import NUM_SAMPLES, PRESETS, Stage
from reproduce.models.minis.card import GRID, write_card
from reproduce.models.minis.data import DATASETS, TrainingData, fetch
from reproduce.models.minis.text import Clip, retrieval, save_clip
from reproduce.models.minis.training import REFERENCE_HELP, encode

REFERENCE = (
    "mini-ldm4"  # all emoji models are compared with the one reference.safetensors of this model
)
REFERENCE_IMAGES = 10_000  # the first ones, of a data set that is measured with Inception, unless statistics of it are given
MAX_LOG_LINES = 200
SEED = 0


def export(
    name: str,
    data: TrainingData,
    vae: VQModel | AutoencoderKL | None,
    parts: nn.ModuleDict,
    work_dir: Path,
    out_dir: Path,
    *,
    classifier: GroupClassifier | None = None,
    clip: Clip | None = None,
    num_samples: int = NUM_SAMPLES,
    reference: Path | None = None,
) -> None:
    """fp16 weights in diffusers layout, metric networks, reference statistics, training logs; then `measure` and the card."""
    preset, model_dir = PRESETS[name], out_dir / name
    components = dict(parts)
    if vae is not None:
        components[
            "vqvae" if "vqvae" in inspect.signature(preset.pipeline).parameters else "vae"
        ] = vae
    half = {k: copy.deepcopy(m).half() for k, m in components.items()}  # the caller keeps float32
    if clip is not None:
        half["tokenizer"] = clip.tokenizer
        save_clip(clip.model, clip.tokenizer, out_dir / "mini-clip")
    preset.pipeline(scheduler=preset.scheduler(), **half).save_pretrained(model_dir)
    if classifier is not None:
        features_dir = out_dir / "mini-features"
        features_dir.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.half() for k, v in classifier.state_dict().items()},
            features_dir / "classifier.safetensors",
        )
        config = {
            "num_classes": classifier.head.out_features,
            "width": classifier.stages[0][0].out_channels,
        }
        (features_dir / "config.json").write_text(json.dumps(config) + "\n")
    (model_dir / "logs").mkdir(exist_ok=True)
    trained = {
        "autoencoder": vae,
        "classifier": classifier,
        "clip": clip and clip.model,
        "unet": parts,
    }
    training = {
        "stages": {
            stage: _stage(s, trained[stage], work_dir / f"{stage}.pt")
            for stage, s in preset.stages.items()
        },
        "machine": machine(),
    }
    for stage in preset.stages:
        _copy_log(work_dir / f"{stage}.jsonl", model_dir / "logs" / f"{stage}.jsonl")
    (model_dir / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    if preset.condition == "text":
        (model_dir / "captions.json").write_text(_as_coco(data.captions) + "\n")
    finish(name, data, out_dir, num_samples, reference)


def _as_coco(captions: Sequence[str]) -> str:
    """The captions in the layout of COCO's annotations, which reproduce.evaluation.clip_score reads, one a line."""
    lines = (
        json.dumps({"id": i, "image_id": i, "caption": caption})
        for i, caption in enumerate(captions)
    )
    return '{"annotations": [\n' + ",\n".join(lines) + "\n]}"


def check(name: str, out_dir: Path, reference: Path | None = None) -> None:
    """QuestError, before hours of training, unless `out_dir` and `reference` hold what the model will be measured with."""
    preset = PRESETS[name]
    if reference is not None and DATASETS[preset.data].features != "mini":
        open_reference(reference, "inception")
    if "classifier" in preset.stages or DATASETS[preset.data].features != "mini":
        return
    for needed in (
        out_dir / "mini-features" / "classifier.safetensors",
        out_dir / REFERENCE / "reference.safetensors",
    ):
        if not needed.is_file():
            raise ConfigError(
                f"{name} is measured with the features and the reference of {REFERENCE}: no file {needed}"
            )


def finish(
    name: str,
    data: TrainingData,
    out_dir: Path,
    num_samples: int = NUM_SAMPLES,
    reference: Path | None = None,
) -> dict:
    """Reference statistics, quality.json and the card of the exported model in `out_dir`; returns the quality figures.

    reference: of a model that is measured with Inception, what `python -m reproduce.evaluation reference` wrote.
    """
    model_dir, emoji = out_dir / name, out_dir / REFERENCE / "reference.safetensors"
    if DATASETS[PRESETS[name].data].features == "mini":
        extractor = MiniFeatures(
            "quest-mini", ["pooled", "spatial"], str(out_dir / "mini-features")
        ).eval()
        if name == REFERENCE:
            save_reference(statistics(data.images, extractor), emoji, "mini")
        real = load_reference(emoji, "mini")
    else:
        extractor = load_extractor("inception")
        real = load_reference(
            data.images[:REFERENCE_IMAGES] if reference is None else reference, "inception"
        )
    quality, samples = measure(name, data, real, extractor, out_dir, num_samples)
    (model_dir / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    pick = _order(data)  # beside a sample the image whose label or caption it was given
    if PRESETS[name].condition is None:
        pick = torch.linspace(
            0, len(data.images) - 1, GRID * GRID
        ).long()  # over all groups, which are in order
    write_card(model_dir, data.images[pick[: GRID * GRID]], samples)
    for path in out_dir.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which a wheel would keep
    return quality


def _order(data: TrainingData) -> torch.Tensor:
    return torch.randperm(len(data.images), generator=torch.Generator().manual_seed(SEED))


@torch.no_grad()
def measure(
    name: str,
    data: TrainingData,
    real: Statistics,
    extractor: nn.Module,
    out_dir: Path,
    num_samples: int,
) -> tuple[dict, torch.Tensor]:
    """Quality of the stored model: samples, autoencoder and metric networks against the data, and the data against itself.

    Labels and prompts of the samples are those of the data, in an order drawn from SEED: as frequent as they are there.
    """
    preset, pipe, order = PRESETS[name], load_pipeline(out_dir / name), _order(data)
    given = {}
    if preset.condition == "class":
        given["labels"] = data.classes[order].tolist()
    elif preset.condition == "text":
        given["prompts"] = [data.captions[i] for i in order]
    start = time.time()
    images = sample(pipe, num_samples, seed=SEED, **preset.sampling, **given).images
    about = {"count": num_samples, "steps": preset.sampling["num_inference_steps"], "seed": SEED}
    about |= {k: v for k, v in preset.sampling.items() if k == "guidance_scale"}
    quality = {
        "model_sha256": model_digest(pipe),
        "images": len(data.images),
        "reference": real.count,
        "samples": {
            **about,
            "seconds": round(time.time() - start, 1),
            **compare(statistics(images, extractor), real),
        },
    }
    if preset.autoencoder is not None:
        halves = [statistics(data.images[part], extractor) for part in order.chunk(2)]
        quality["halves"] = {"count": [h.count for h in halves], **compare(*halves)}
        vae = getattr(pipe, "vqvae", None) or pipe.vae
        decoded = torch.cat([_reconstruct(vae, batch) for batch in data.images.split(100)])
        compared = compare(statistics(decoded, extractor), real)
        quality["reconstructions"] = {
            "count": len(decoded),
            "psnr": psnr(decoded, data.images),
            **compared,
        }
    held_out = torch.arange(len(data.images)) % 10 == 9
    truth = order[
        torch.arange(num_samples) % len(order)
    ]  # of each sample the image whose label or caption it was given
    if preset.condition == "class":
        groups = [
            _groups(out_dir, x) == data.labels[i]
            for x, i in ((images, truth), (data.images[held_out], held_out))
        ]
        quality["condition"] = dict(
            zip(("samples", "held_out"), (g.float().mean().item() for g in groups), strict=True)
        )
    elif preset.condition == "text":
        quality["clip"] = _clip_figures(out_dir / "mini-clip", data, held_out, images, truth)
    if "classifier" in preset.stages:
        predicted, truth = _groups(out_dir, data.images[held_out]), data.labels[held_out]
        recalls = [(predicted[truth == k] == k).float().mean().item() for k in truth.unique()]
        quality["classifier"] = {
            "held_out": len(truth),
            "accuracy": (predicted == truth).float().mean().item(),
            "largest_class": torch.bincount(truth).max().item() / len(truth),
            "balanced_accuracy": sum(recalls) / len(recalls),
        }
    return quality, images


def _groups(out_dir: Path, images: torch.Tensor) -> torch.Tensor:
    """Emoji groups that the metric network sees in uint8 images: int64 [N]."""
    classifier = load_classifier(out_dir / "mini-features")
    return torch.cat([classifier(b.float() / 127.5 - 1).argmax(1) for b in images.split(100)])


def _clip_figures(
    folder: Path,
    data: TrainingData,
    held_out: torch.Tensor,
    samples: torch.Tensor,
    truth: torch.Tensor,
) -> dict[str, float]:
    """Retrieval on held-out images, and the CLIP score of samples with their prompts, with others' prompts, of real images."""
    model = f"local-dir:{folder}"
    net, _, tokenize = load_clip(model, None)
    captions = [data.captions[i] for i in truth]
    return {
        **retrieval(
            net,
            data.images[held_out],
            tokenize([c for c, h in zip(data.captions, held_out, strict=True) if h]),
        ),
        "score": clip_score(samples, captions, model=model, pretrained=None),
        "score_of_others": clip_score(
            samples, captions[1:] + captions[:1], model=model, pretrained=None
        ),
        "score_of_images": clip_score(data.images[truth], captions, model=model, pretrained=None),
    }


def machine() -> dict[str, str | int]:
    """Processor, threads and versions of the machine that runs this."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _reconstruct(vae: VQModel | AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    x = vae.decode(encode(vae, images)).sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _stage(stage: Stage, model: nn.Module, state_file: Path) -> dict:
    """Steps and seconds from the stage's last checkpoint; batch size and learning rate from its preset."""
    state = torch.load(state_file, weights_only=True, map_location="cpu")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state["step"],
        "seconds": round(state["seconds"], 1),
        "batch": stage.batch,
        "learning_rate": stage.lr,
    }


def _copy_log(source: Path, target: Path) -> None:
    """Every k-th line and the last, at most MAX_LOG_LINES + 1. A resumed run repeats steps: the later line of a step holds."""
    if not source.is_file():  # a run of fewer than 100 steps (tests) writes no line
        target.write_text("")
        return
    lines = {json.loads(line)["step"]: line for line in source.read_text().splitlines()}
    kept = [lines[s] for s in sorted(lines)]
    every = -(-len(kept) // MAX_LOG_LINES)
    target.write_text(
        "".join(line + "\n" for i, line in enumerate(kept) if i % every == 0 or i == len(kept) - 1)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="measure an exported mini model again and rewrite its card"
    )
    parser.add_argument("--model", choices=PRESETS, default=REFERENCE)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reproduce/models/minis/weights"),
        help="the folder that training wrote",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/train"),
        help="where the data archive is, or is fetched to",
    )
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="of the card's figures")
    parser.add_argument("--reference", type=Path, help=REFERENCE_HELP)
    args = parser.parse_args()
    try:
        if not (args.out / args.model / "training.json").is_file():
            raise ConfigError(
                f"{args.out}: no exported models; train them with python -m reproduce.models.minis.training"
            )
        load_classifier(args.out / "mini-features")  # fail before the data is fetched
        quality = finish(
            args.model,
            fetch(PRESETS[args.model].data, args.work),
            args.out,
            args.samples,
            args.reference,
        )
    except QuestError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    main()
