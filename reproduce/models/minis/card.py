"""The model card of an exported mini model, from its training logs and quality.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from reproduce.models.embedded import CLASSES
from reproduce.models.minis.architectures import DROP, MINI_MODELS
from reproduce.models.minis.data import ARCHIVES

TEMPLATE = Path(__file__).with_name("card.md.jinja")  # package data
GRID = 8  # rows and columns of each half of samples.png

KIND = {None: "unconditional", "class": "class-conditional", "text": "text-to-image"}
TAG = {
    None: "unconditional-image-generation",
    "class": "unconditional-image-generation",
    "text": "text-to-image",
}
SUBJECT = {"emoji": "emoji", "cifar10": "CIFAR-10 images"}
LEFT = {
    None: "real images, evenly picked",
    "class": "the real images of the same classes",
    "text": "the real images of the same captions",
}
USE = {
    None: "",
    "class": ", labels=[0, 1], guidance_scale=3.0",
    "text": ', prompts=["red heart"], guidance_scale=3.0',
}
EMBEDDER = {"class": "class_embedder", "text": "text_encoder"}
SAMPLER = {"DDIMScheduler": "DDIM", "PNDMScheduler": "PLMS"}


def write_card(folder: Path, real: torch.Tensor, samples: torch.Tensor) -> None:
    """Write README.md of an exported model, with loss.png and samples.png beside it.

    Args:
        real: uint8 [GRID^2, 3, H, W] at most.
        samples: uint8 [N, 3, H, W].
    """
    stages = MINI_MODELS[folder.name].stages
    logs = {stage.title: _read_log(folder, key) for key, stage in stages.items()}
    _plot_losses(logs, folder / "loss.png")
    _plot_grid(real, samples[: GRID * GRID], folder / "samples.png")
    (folder / "README.md").write_text(card_text(folder), encoding="utf-8")


def card_text(folder: Path) -> str:
    """What README.md of an exported model says."""
    name = folder.name
    model = MINI_MODELS[name]
    dataset = ARCHIVES[model.data]
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    denoiser = _config(folder, model.part)
    about = ModelCardData(
        license="apache-2.0", library_name="diffusers", pipeline_tag=TAG[model.condition]
    )
    card = ModelCard.from_template(
        about,
        template_path=str(TEMPLATE),
        name=name,
        model=model,
        dataset=dataset,
        quality=quality,
        samples=quality["samples"],
        # Cards older than the entry: compared with all images.
        compared=quality.get("reference", quality["images"]),
        machine=training["machine"],
        stages=[_stage(folder, key, training["stages"][key]) for key in training["stages"]],
        some_float32=not all(stage.bf16 for stage in model.stages.values()),
        denoiser=denoiser,
        vae=_config(folder, "vqvae") or _config(folder, "vae"),
        embedder=_config(folder, EMBEDDER[model.condition]) if model.condition else {},
        classes=_classes(folder) if model.condition == "class" else 0,
        shared_with=model.autoencoder if isinstance(model.autoencoder, str) else None,
        size=denoiser["sample_size"] if model.autoencoder is None else dataset.size,
        kind=KIND[model.condition],
        subject=SUBJECT[model.data],
        drop=DROP,
        left=LEFT[model.condition],
        pictured=GRID * GRID,
        sampler=SAMPLER[_config(folder, "scheduler")["_class_name"]],
        use=USE[model.condition],
    )
    return f"{card}\n"


def _config(folder: Path, part: str) -> dict[str, Any]:
    """A part's config, its lists as tuples; empty where the model has no such part."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    path = folder / part / name
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def _classes(folder: Path) -> int:
    """Number of classes of an exported model."""
    return len(json.loads((folder / CLASSES).read_text()))


def _stage(folder: Path, key: str, trained: dict[str, Any]) -> dict[str, Any]:
    """A line of the card's table: what training.json says of a stage, its title and last loss."""
    log = _read_log(folder, key)
    title = MINI_MODELS[folder.name].stages[key].title
    return {**trained, "title": title, "last_loss": log[-1]["loss"] if log else None}


def _read_log(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = (folder / "logs" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _plot_losses(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(9, 2.4), dpi=90, layout="constrained")
        axes = figure.subplots(1, len(logs), squeeze=False)[0]
        for axis, (title, log) in zip(axes, logs.items(), strict=True):
            axis.plot([e["step"] for e in log], [e["loss"] for e in log], linewidth=1)
            axis.set(title=title, xlabel="step", ylabel="loss", yscale="log" if log else "linear")
        figure.savefig(path)


def _plot_grid(real: torch.Tensor, samples: torch.Tensor, path: Path) -> None:
    """Real images left, samples right; 256 colours keep the file small."""
    gap = np.full((GRID * real.shape[2], 12, 3), 90, np.uint8)
    picture = Image.fromarray(np.concatenate([_tile(real), gap, _tile(samples)], 1))
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _tile(images: torch.Tensor) -> np.ndarray:
    """uint8 [n, 3, h, w] -> a square of GRID rows, uint8 [GRID * h, GRID * w, 3]."""
    n, c, h, w = images.shape
    full = torch.full((GRID * GRID, c, h, w), 255, dtype=torch.uint8)
    full[:n] = images
    rows = full.view(GRID, GRID, c, h, w).permute(0, 3, 1, 4, 2)  # [GRID, h, GRID, w, c]
    return rows.reshape(GRID * h, GRID * w, c).numpy()
