"""Write a trained mini model as package data, measure it, and make its model card.

Every number of the card comes from the training logs or from quality.json.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from questlib.errors import ConfigError
from questlib.files import atomic_path
from reproduce import provenance
from reproduce.evaluation.features import MiniFeatures, load_extractor
from reproduce.evaluation.image_statistics import statistics
from reproduce.evaluation.reference import load_reference, open_reference, save_reference
from reproduce.models.classifier import GroupClassifier
from reproduce.models.embedded import CLASSES
from reproduce.models.minis.architectures import MINI_MODELS, NUM_SAMPLES, MiniModel, Stage
from reproduce.models.minis.card import GRID, write_card
from reproduce.models.minis.data import ARCHIVES, TrainingData
from reproduce.models.minis.quality import measure, shuffled
from reproduce.models.minis.text import save_clip
from reproduce.models.minis.training import Trained

# All emoji models are compared with the one reference.safetensors of this model.
REFERENCE = "mini-ldm4"

# What a model that is measured with Inception is compared with, unless statistics are given: the
# first images of its data.
REFERENCE_IMAGES = 10_000

MAX_LOG_LINES = 200


def check(name: str, out: Path, reference: Path | None = None) -> None:
    """Check, before hours of training, that what the model will be measured with is there.

    Args:
        out: folder of the exported models.
        reference: see `finish`.

    Raises:
        QuestError: it is not.
    """
    model = MINI_MODELS[name]
    is_mini = ARCHIVES[model.data].features == "mini"
    if reference is not None and not is_mini:
        open_reference(reference, "inception")
    if "classifier" in model.stages or not is_mini:
        return
    for needed in (
        out / "mini-features" / "classifier.safetensors",
        out / REFERENCE / "reference.safetensors",
    ):
        if not needed.is_file():
            raise ConfigError(
                f"{name} is measured with the features and the reference of {REFERENCE}: "
                f"no file {needed}"
            )


def export(
    name: str,
    data: TrainingData,
    trained: Trained,
    work: Path,
    out: Path,
    *,
    num_samples: int = NUM_SAMPLES,
    reference: Path | None = None,
) -> dict[str, Any]:
    """Write OUT/NAME, a diffusers folder in fp16, its logs and metric networks; then `finish`.

    Args:
        work: checkpoints and logs of the training.
        num_samples: of the card's figures.
        reference: see `finish`.
    """
    model = MINI_MODELS[name]
    folder = out / name
    _save_pipeline(model, trained, folder)
    if trained.clip is not None:
        save_clip(trained.clip.model, trained.clip.tokenizer, out / "mini-clip")
    if trained.classifier is not None:
        _save_classifier(trained.classifier, out / "mini-features")
    modules = {
        "autoencoder": trained.vae,
        "classifier": trained.classifier,
        "clip": trained.clip and trained.clip.model,
        model.part: trained.parts,
    }
    (folder / "logs").mkdir(exist_ok=True)
    stages = {}
    for key, stage in model.stages.items():
        stages[key] = _about_stage(stage, modules[key], work / f"{key}.pt")
        _copy_log(work / f"{key}.jsonl", folder / "logs" / f"{key}.jsonl")
    versions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    training = {"stages": stages, "machine": {**provenance.machine(), **versions}}
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
    if model.condition == "text":
        (folder / "captions.json").write_text(_as_coco(data.captions) + "\n", encoding="utf-8")
    if model.condition == "class":
        (folder / CLASSES).write_text(
            json.dumps(list(data.class_names), indent=1) + "\n", encoding="utf-8"
        )
    return finish(name, data, out, num_samples, reference)


def finish(
    name: str,
    data: TrainingData,
    out: Path,
    num_samples: int = NUM_SAMPLES,
    reference: Path | None = None,
) -> dict[str, Any]:
    """Reference statistics, quality.json and the card of the exported model OUT/NAME.

    Args:
        reference: of a model that is measured with Inception, what `python -m reproduce reference`
            wrote; None: the statistics are taken of its first images.

    Returns:
        What quality.json holds.
    """
    folder = out / name
    stored = out / REFERENCE / "reference.safetensors"
    if ARCHIVES[MINI_MODELS[name].data].features == "mini":
        layers = ["pooled", "spatial"]
        extractor: nn.Module = MiniFeatures("quest-mini", layers, str(out / "mini-features"))
        extractor.eval()
        if name == REFERENCE:
            save_reference(statistics(data.images, extractor), stored, "mini")
        real = load_reference(stored, "mini")
    else:
        extractor = load_extractor("inception")
        source = data.images[:REFERENCE_IMAGES] if reference is None else reference
        real = load_reference(source, "inception")
    quality, samples = measure(name, data, real, extractor, out, num_samples)
    (folder / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", encoding="utf-8")
    write_card(folder, data.images[_pictured(name, data)], samples)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which a wheel would keep
    return quality


def _pictured(name: str, data: TrainingData) -> torch.Tensor:
    """Indices of the real images in the card's picture."""
    if MINI_MODELS[name].condition is None:
        # Over all groups, which are in order.
        return torch.linspace(0, len(data.images) - 1, GRID * GRID).long()
    # Beside each sample the image whose label or caption it was given.
    return shuffled(data)[: GRID * GRID]


def _save_pipeline(model: MiniModel, trained: Trained, folder: Path) -> None:
    """fp16 weights; the caller keeps its float32 ones."""
    components: dict[str, nn.Module] = dict(trained.parts)
    if trained.vae is not None:
        takes_vqvae = "vqvae" in inspect.signature(model.pipeline).parameters
        components["vqvae" if takes_vqvae else "vae"] = trained.vae
    half: dict[str, Any] = {k: copy.deepcopy(m).half() for k, m in components.items()}
    if trained.clip is not None:
        half["tokenizer"] = trained.clip.tokenizer
    model.pipeline(scheduler=model.scheduler(), **half).save_pretrained(folder)
    _forget_paths(folder)


def _forget_paths(folder: Path) -> None:
    """Remove from the configs where parts were loaded from: folders of this machine."""
    for path in sorted(folder.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_classifier(classifier: GroupClassifier, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() for k, v in classifier.state_dict().items()}
    with atomic_path(folder / "classifier.safetensors") as temporary:
        save_file(half, temporary)
    config = {
        "num_classes": classifier.head.out_features,
        "width": classifier.stages[0][0].out_channels,
    }
    (folder / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def _as_coco(captions: Sequence[str]) -> str:
    """The captions, one a line, in the layout of COCO's annotations.

    `reproduce.evaluation.clip_score.coco_prompts` reads it.
    """
    entries = [{"id": i, "image_id": i, "caption": c} for i, c in enumerate(captions)]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    return f'{{"annotations": [\n{lines}\n]}}'


def _about_stage(stage: Stage, model: nn.Module, checkpoint: Path) -> dict[str, Any]:
    """Steps and seconds from the last checkpoint; batch size and learning rate from the stage."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state["step"],
        "seconds": round(state["seconds"], 1),
        "batch": stage.batch,
        "learning_rate": stage.lr,
    }


def _copy_log(source: Path, target: Path) -> None:
    """Every k-th line and the last, at most MAX_LOG_LINES + 1.

    A resumed run repeats steps: the later line of a step holds. A run of fewer than 100 steps, as
    in tests, has written no line.
    """
    lines: dict[int, str] = {}
    if source.is_file():
        lines = {
            json.loads(line)["step"]: line
            for line in source.read_text(encoding="utf-8").splitlines()
        }
    kept = [lines[step] for step in sorted(lines)]
    every = max(1, -(-len(kept) // MAX_LOG_LINES))
    last = len(kept) - 1
    thinned = [line + "\n" for i, line in enumerate(kept) if i % every == 0 or i == last]
    target.write_text("".join(thinned), encoding="utf-8")
