"""The model card of an exported mini model, from its training logs and quality.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from reproduce.models.minis.architectures import DROP, PRESETS, Preset
from reproduce.models.minis.data import DATASETS

GRID = 8  # rows and columns of each half of samples.png
KIND = {None: "unconditional", "class": "class-conditional", "text": "text-to-image"}
TAG = {
    None: "unconditional-image-generation",
    "class": "unconditional-image-generation",
    "text": "text-to-image",
}
SUBJECT = {"emoji": "emoji", "cifar10": "CIFAR-10 images"}
GIVEN = {"class": "same classes", "text": "same captions"}
USE = {
    None: "",
    "class": ", labels=[0, 1], guidance_scale=3.0",
    "text": ', prompts=["red heart"], guidance_scale=3.0',
}
SAMPLER = {"DDIMScheduler": "DDIM", "PNDMScheduler": "PLMS"}


def write_card(model_dir: Path, real: torch.Tensor, samples: torch.Tensor) -> None:
    """README.md with loss.png and samples.png beside it; real: uint8 [GRID^2, 3, H, W] at most, samples: uint8 [N, 3, H, W]."""
    training = json.loads((model_dir / "training.json").read_text())
    quality = json.loads((model_dir / "quality.json").read_text())
    logs = {name: _read_log(model_dir / "logs" / f"{name}.jsonl") for name in training["stages"]}
    stages = PRESETS[model_dir.name].stages
    _plot_losses({stages[name].title: log for name, log in logs.items()}, model_dir / "loss.png")
    _plot_grid(real, samples[: GRID * GRID], model_dir / "samples.png")
    (model_dir / "README.md").write_text(_text(model_dir, training, quality, logs))


def _text(model_dir: Path, training: dict, quality: dict, logs: dict[str, list[dict]]) -> str:
    name, preset = model_dir.name, PRESETS[model_dir.name]
    source, machine, s = DATASETS[preset.data], training["machine"], quality["samples"]
    unet = _config(model_dir, "unet")
    size = unet["sample_size"] if preset.autoencoder is None else DATASETS[preset.data].size
    option = "" if name == "mini-ldm4" else f" --model {name}"
    stages = "\n".join(
        f"| {preset.stages[k].title} | {v['parameters']:,} | {v['steps']:,} | {v['batch']} | {v['learning_rate']:g} "
        f"| {v['seconds']:,.0f} | {_last_loss(logs[k])} |"
        for k, v in training["stages"].items()
    )
    precision = (
        "bf16 autocast"
        if all(st.bf16 for st in preset.stages.values())
        else "bf16 autocast where it is faster"
    )
    compared = quality.get("reference", quality["images"])  # cards older than the entry: all images
    guided = f", guidance scale {s['guidance_scale']:g}" if "guidance_scale" in s else ""
    left = (
        "real images, evenly picked"
        if preset.condition is None
        else f"the real images of the {GIVEN[preset.condition]}"
    )
    sampler = SAMPLER[_config(model_dir, "scheduler")["_class_name"]]
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: {TAG[preset.condition]}
---
# {name}

A small {KIND[preset.condition]} {"" if preset.autoencoder is None else "latent "}diffusion model of {size}x{size} \
{SUBJECT[preset.data]}, the stand-in for the paper's {preset.stands_for}. It ships with questlib, which trained it \
(`python -m reproduce.models.minis.training{option}`).
This card is generated (`python -m reproduce.models.minis.export{option}`) from `training.json`, `logs/` and `quality.json`; \
no number is typed.

## Architecture
- UNet: diffusers `{unet["_class_name"]}`, channels {tuple(unet["block_out_channels"])}, {unet["layers_per_block"]} residual \
block(s) a level, down {tuple(unet["down_block_types"])}, up {tuple(unet["up_block_types"])}, \
{"pixels" if preset.autoencoder is None else "latents"} {unet["in_channels"]}x{unet["sample_size"]}x{unet["sample_size"]}.
{_parts(model_dir, preset)}- Weights stored in fp16, used in float32. sha256 of the UNet's weights: `{quality["model_sha256"]}`.

## Data and licence
{quality["images"]:,} images, `{source.package}`{", composited on white" if preset.data == "emoji" else ""}. {source.licence}
The weights are under the licence of this repository.

## Training
On {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, torch {machine["torch"]}, {precision}.
EMA weights are kept.

| stage | parameters | steps | batch | learning rate | seconds | last logged loss |
|---|---|---|---|---|---|---|
{stages}

![losses](loss.png)

## Samples
Left: {left}. Right: the first {GRID * GRID} samples of seed {s["seed"]}, {s["steps"]} {sampler} steps{guided}.

![real and sampled images](samples.png)

## Quality
{_features(source.features, quality)}

| compared | images | FID | sFID | KID | precision | recall |
|---|---|---|---|---|---|---|
| samples, {s["steps"]} {sampler} steps, against the data | {s["count"]:,} / {compared:,} | {_row(s)} |
{_other_rows(quality)}{_condition(quality)}
## Use
    pipe = reproduce.models.loading.load_pipeline("{name}")
    images = questlib.diffusion.sampling.sample(pipe, 16{USE[preset.condition]}).images
"""


def _config(model_dir: Path, part: str) -> dict:
    return json.loads(
        (
            model_dir / part / f"{'scheduler_config' if part == 'scheduler' else 'config'}.json"
        ).read_text()
    )


def _parts(model_dir: Path, preset: Preset) -> str:
    """A line for each part beside the UNet."""
    lines = []
    for folder in ("vqvae", "vae"):
        if (model_dir / folder).is_dir():
            vae = _config(model_dir, folder)
            codes = (
                f"{vae['num_vq_embeddings']:,} codes"
                if "num_vq_embeddings" in vae
                else f"{vae['latent_channels']} latents"
            )
            shared = (
                f" It is that of {preset.autoencoder}."
                if isinstance(preset.autoencoder, str)
                else ""
            )
            lines.append(
                f"- Autoencoder: diffusers `{vae['_class_name']}`, channels {tuple(vae['block_out_channels'])}, {codes}, "
                f"scaling factor {vae['scaling_factor']}.{shared}\n"
            )
    if preset.condition == "class":
        embedder = _config(model_dir, "class_embedder")
        lines.append(
            f"- Context: a vector of {embedder['embed_dim']} for each of {embedder['num_classes']} classes (emoji subgroups; the "
            f"small ones of a group are one class) and one for no class, given in {DROP:.0%} of the training.\n"
        )
    elif preset.condition == "text":
        text = _config(model_dir, "text_encoder")
        lines.append(
            f"- Context: `CLIPTextModel`, trained with the UNet, {text['num_hidden_layers']} layers of width "
            f"{text['hidden_size']}, {text['vocab_size']:,} tokens, prompts of {text['max_position_embeddings']} at most. "
            f"Prompts are the emoji's names and skin tones; {DROP:.0%} are empty in training.\n"
        )
    return "".join(lines)


def _features(features: str, quality: dict) -> str:
    if features == "inception":
        first = (
            f" The data: its first {quality['reference']:,} images."
            if quality["reference"] < quality["images"]
            else ""
        )
        return f"Features: Inception-v3.{first} FID is biased by the number of images, given in the second column."
    if c := quality.get("classifier"):
        first = f"""Features: the shipped classifier of nine emoji groups (`mini-features`), accuracy {c["accuracy"]:.3f} on \
{c["held_out"]} held-out images, {c["balanced_accuracy"]:.3f} as the mean over groups (the most frequent group alone: \
{c["largest_class"]:.3f}).
Every tenth image is held out, so skin-tone variations of one emoji stand on both sides."""
    else:
        first = "Features: the shipped classifier of nine emoji groups (`mini-features`), see the card of mini-ldm4."
    return f"""{first} These numbers do not compare with
Inception FID. FID is biased by the number of images, given in the second column."""


def _other_rows(quality: dict) -> str:
    rows = ""
    if r := quality.get("reconstructions"):
        what = f"autoencoder's reconstructions (PSNR {r['psnr']:.1f} dB) against the data"
        rows += f"| {what} | {r['count']:,} / {quality['images']:,} | {_row(r)} |\n"
    if h := quality.get("halves"):
        rows += f"| one random half of the data against the other | {h['count'][0]:,} / {h['count'][1]:,} | {_row(h)} |\n"
    return rows


def _condition(quality: dict) -> str:
    """How well samples follow their label or prompt."""
    if c := quality.get("condition"):
        return f"""
The classifier finds the group of the label in {c["samples"]:.1%} of the samples, and in {c["held_out"]:.1%} of the \
held-out images.
"""
    if c := quality.get("clip"):
        return f"""
CLIP score by `mini-clip` (open_clip, `local-dir:` of its folder): {c["score"]:.2f} of samples with their prompts, \
{c["score_of_others"]:.2f} with another sample's prompt, {c["score_of_images"]:.2f} of the real images with their captions.
mini-clip finds the caption of a held-out image among {c["captions"]} in {c["top1"]:.1%}, among its first five in \
{c["top5"]:.1%}; every tenth image is held out, other skin tones of it are not.
"""
    return ""


def _row(q: dict) -> str:
    return f"{q['fid']:.3f} | {q['sfid']:.3f} | {q['kid']:.5f} | {q['precision']:.3f} | {q['recall']:.3f}"


def _read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _last_loss(log: list[dict]) -> str:
    return f"{log[-1]['loss']:.4f}" if log else "not logged"


def _plot_losses(logs: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(9, 2.4), dpi=90, layout="constrained")
        for axis, (title, log) in zip(
            figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True
        ):
            axis.plot([e["step"] for e in log], [e["loss"] for e in log], linewidth=1)
            axis.set(title=title, xlabel="step", ylabel="loss", yscale="log" if log else "linear")
        figure.savefig(path)


def _plot_grid(real: torch.Tensor, samples: torch.Tensor, path: Path) -> None:
    """Real images left, samples right; 256 colours keep the file small."""
    halves = [_tile(real), np.full((GRID * real.shape[2], 12, 3), 90, np.uint8), _tile(samples)]
    Image.fromarray(np.concatenate(halves, 1)).quantize(256, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def _tile(images: torch.Tensor) -> np.ndarray:
    n, c, h, w = images.shape
    full = torch.full((GRID * GRID, c, h, w), 255, dtype=torch.uint8)
    full[:n] = images
    return (
        full.view(GRID, GRID, c, h, w).permute(0, 3, 1, 4, 2).reshape(GRID * h, GRID * w, c).numpy()
    )  # -> [H, W, 3]
