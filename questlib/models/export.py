"""Write the trained mini models as package data, measure them, and make their model card: the end of questlib.models.train.

`python -m questlib.models.export --work DIR --out DIR` repeats the measuring and the card on the exported files alone; DIR of
--work holds the data archive. Every number in the card comes from the training logs or from quality.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from safetensors.torch import save_file
from torch import nn

from questlib.errors import ConfigError, QuestError
from questlib.features import MiniFeatures, load_classifier
from questlib.metrics import Statistics, compare, load_reference, psnr, statistics
from questlib.models.card import write_card
from questlib.models.classifier import GroupClassifier
from questlib.models.data import EmojiData, fetch_emoji, load_emoji
from questlib.models.loading import load_pipeline, model_digest
from questlib.sampling import sample

NAME = "mini-ldm4"
STAGES = ("autoencoder", "classifier", "unet")
MAX_LOG_LINES = 200
NUM_SAMPLES, NUM_STEPS, SEED = 2000, 20, 0


def export(
    data: EmojiData,
    vae: VQModel,
    classifier: GroupClassifier,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    work_dir: Path,
    out_dir: Path,
    num_samples: int = NUM_SAMPLES,
) -> None:
    """fp16 weights in diffusers layout, the metric network, reference statistics, training logs; then `measure` and the card."""
    model_dir, features_dir = out_dir / NAME, out_dir / "mini-features"
    half = copy.deepcopy({"vqvae": vae, "unet": unet, "classifier": classifier})  # the caller keeps float32
    for module in half.values():
        module.half()
    LDMPipeline(vqvae=half["vqvae"], unet=half["unet"], scheduler=scheduler).save_pretrained(model_dir)
    features_dir.mkdir(parents=True, exist_ok=True)
    save_file(half["classifier"].state_dict(), features_dir / "classifier.safetensors")
    config = {"num_classes": classifier.head.out_features, "width": classifier.stages[0][0].out_channels}
    (features_dir / "config.json").write_text(json.dumps(config) + "\n")
    (model_dir / "logs").mkdir(exist_ok=True)
    training = {
        "stages": {n: _stage(n, m, work_dir) for n, m in zip(STAGES, (vae, classifier, unet), strict=True)},
        "machine": machine(),
    }
    for name in STAGES:
        _copy_log(work_dir / f"{name}.jsonl", model_dir / "logs" / f"{name}.jsonl")
    (model_dir / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    finish(data, out_dir, num_samples)


def finish(data: EmojiData, out_dir: Path, num_samples: int = NUM_SAMPLES) -> dict:
    """Reference statistics, quality.json and the card of the exported models in `out_dir`; returns the quality figures."""
    model_dir = out_dir / NAME
    extractor = MiniFeatures("quest-mini", ["pooled", "spatial"], str(out_dir / "mini-features")).eval()
    real = statistics(data.images, extractor)
    save_reference(real, model_dir / "reference.safetensors")
    quality, samples = measure(data, real, extractor, out_dir, num_samples)
    (model_dir / "quality.json").write_text(json.dumps(quality, indent=1) + "\n")
    write_card(model_dir, data.images, samples)
    for path in out_dir.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which a wheel would keep
    return quality


def save_reference(real: Statistics, path: Path) -> None:
    """Pooled features in fp16 [N, D] (KID, precision and recall need them all), moments of the spatial features, image count."""
    mean, cov = (torch.from_numpy(m).contiguous() for m in real.spatial_moments)
    tensors = {"pooled": real.pooled.half(), "spatial_mean": mean, "spatial_cov": cov, "count": torch.tensor(real.count)}
    save_file(tensors, path)


@torch.no_grad()
def measure(
    data: EmojiData, real: Statistics, extractor: nn.Module, out_dir: Path, num_samples: int
) -> tuple[dict, torch.Tensor]:
    """Quality of the stored models: samples, autoencoder and classifier against the data, and the data against itself."""
    model_dir = out_dir / NAME
    pipe, start = load_pipeline(model_dir), time.time()
    images = sample(pipe, num_samples, num_inference_steps=NUM_STEPS, seed=SEED).images
    seconds = time.time() - start
    stored = load_reference(model_dir / "reference.safetensors", "mini")
    fake = statistics(images, extractor)
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(SEED))
    halves = [statistics(data.images[part], extractor) for part in order.chunk(2)]
    decoded = torch.cat([_reconstruct(pipe.vqvae, batch) for batch in data.images.split(100)])
    reconstruction = statistics(decoded, extractor)
    held_out = torch.arange(len(data.images)) % 10 == 9
    classifier = load_classifier(out_dir / "mini-features")
    predicted = torch.cat([classifier(b.float() / 127.5 - 1).argmax(1) for b in data.images[held_out].split(100)])
    truth = data.labels[held_out]
    recalls = [(predicted[truth == k] == k).float().mean().item() for k in truth.unique()]
    quality = {
        "model_sha256": model_digest(pipe),
        "images": len(data.images),
        "samples": {
            "count": num_samples, "steps": NUM_STEPS, "seed": SEED, "seconds": round(seconds, 1),
            **compare(fake, stored),
        },
        "halves": {"count": [h.count for h in halves], **compare(*halves)},
        "reconstructions": {"count": len(decoded), "psnr": psnr(decoded, data.images), **compare(reconstruction, stored)},
        "classifier": {
            "held_out": len(truth),
            "accuracy": (predicted == truth).float().mean().item(),
            "largest_class": torch.bincount(truth).max().item() / len(truth),
            "balanced_accuracy": sum(recalls) / len(recalls),
        },
    }  # fmt: skip
    return quality, images


def machine() -> dict[str, str | int]:
    """Processor, threads and versions of the machine that runs this."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count() or 0, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _reconstruct(vae: VQModel, images: torch.Tensor) -> torch.Tensor:
    x = vae.decode(vae.encode(images.float() / 127.5 - 1).latents).sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _stage(name: str, model: nn.Module, work_dir: Path) -> dict:
    """Steps and seconds from the stage's last checkpoint; batch size and learning rate from the training code."""
    from questlib.models.train import BATCH, LR  # late: train imports this module at its end

    state = torch.load(work_dir / f"{name}.pt", weights_only=True, map_location="cpu")
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters, "steps": state["step"], "seconds": round(state["seconds"], 1),
        "batch": BATCH[name], "learning_rate": LR[name],
    }  # fmt: skip


def _copy_log(source: Path, target: Path) -> None:
    """Every k-th line and the last, at most MAX_LOG_LINES + 1. A resumed run repeats steps: the later line of a step holds."""
    if not source.is_file():  # a run of fewer than 100 steps (tests) writes no line
        target.write_text("")
        return
    lines = {json.loads(line)["step"]: line for line in source.read_text().splitlines()}
    kept = [lines[s] for s in sorted(lines)]
    every = -(-len(kept) // MAX_LOG_LINES)
    target.write_text("".join(line + "\n" for i, line in enumerate(kept) if i % every == 0 or i == len(kept) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="measure exported mini models again and rewrite their card")
    parser.add_argument("--out", type=Path, default=Path("questlib/models/mini"), help="the folder that training wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="where the data archive is, or is fetched to")
    args = parser.parse_args()
    try:
        if not (args.out / NAME / "training.json").is_file():
            raise ConfigError(f"{args.out}: no exported models; train them with python -m questlib.models.train")
        load_classifier(args.out / "mini-features")  # fail before the data is fetched
        quality = finish(load_emoji(fetch_emoji(args.work)), args.out)
    except QuestError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    main()
