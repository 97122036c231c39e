"""The model card of an exported mini model, from its training logs and quality.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from questlib.models.data import LICENCE, NPM_PACKAGE

GRID = 8  # rows and columns of each half of samples.png
TITLES = {
    "autoencoder": "VQ autoencoder, f=4",
    "classifier": "group classifier (metric features)",
    "unet": "UNet (eps-prediction)",
}


def write_card(model_dir: Path, real: torch.Tensor, samples: torch.Tensor) -> None:
    """README.md with loss.png and samples.png beside it; real, samples: uint8 [N, 3, H, W]."""
    training = json.loads((model_dir / "training.json").read_text())
    quality = json.loads((model_dir / "quality.json").read_text())
    logs = {name: _read_log(model_dir / "logs" / f"{name}.jsonl") for name in training["stages"]}
    _plot_losses(logs, model_dir / "loss.png")
    pick = torch.linspace(0, len(real) - 1, GRID * GRID).long()  # over all groups, which are in order
    _plot_grid(real[pick], samples[: GRID * GRID], model_dir / "samples.png")
    (model_dir / "README.md").write_text(_text(model_dir, training, quality, logs))


def _text(model_dir: Path, training: dict, quality: dict, logs: dict[str, list[dict]]) -> str:
    unet = json.loads((model_dir / "unet" / "config.json").read_text())
    vae = json.loads((model_dir / "vqvae" / "config.json").read_text())
    machine, s, h, r, c = training["machine"], *(quality[k] for k in ("samples", "halves", "reconstructions", "classifier"))
    stages = "\n".join(
        f"| {TITLES[name]} | {v['parameters']:,} | {v['steps']:,} | {v['batch']} | {v['learning_rate']:g} "
        f"| {v['seconds']:,.0f} | {_last_loss(logs[name])} |"
        for name, v in training["stages"].items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {model_dir.name}

A small unconditional latent diffusion model of {vae["sample_size"]}x{vae["sample_size"]} emoji, the stand-in for \
the paper's LDM-4 on LSUN-Bedrooms. It ships with questlib, which trained it (`python -m questlib.models.train`).
This card is generated (`python -m questlib.models.export`) from `training.json`, `logs/` and `quality.json`; no number is typed.

## Architecture
- UNet: diffusers `UNet2DModel`, channels {tuple(unet["block_out_channels"])}, {unet["layers_per_block"]} residual block(s) \
a level, down {tuple(unet["down_block_types"])}, up {tuple(unet["up_block_types"])}, latents \
{unet["in_channels"]}x{unet["sample_size"]}x{unet["sample_size"]}.
- Autoencoder: diffusers `VQModel`, channels {tuple(vae["block_out_channels"])}, {vae["num_vq_embeddings"]:,} codes, \
scaling factor {vae["scaling_factor"]}.
- Weights stored in fp16, used in float32. sha256 of the UNet's weights: `{quality["model_sha256"]}`.

## Data and licence
{quality["images"]:,} images, `{NPM_PACKAGE}`, composited on white. {LICENCE}
The weights are under the licence of this repository.

## Training
On {machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, torch {machine["torch"]}, bf16 autocast.
EMA weights are kept.

| stage | parameters | steps | batch | learning rate | seconds | last logged loss |
|---|---|---|---|---|---|---|
{stages}

![losses](loss.png)

## Samples
Left: real images, evenly picked. Right: the first {GRID * GRID} samples of seed {s["seed"]}, {s["steps"]} DDIM steps.

![real and sampled images](samples.png)

## Quality
Features: the shipped classifier of nine emoji groups (`mini-features`), accuracy {c["accuracy"]:.3f} on {c["held_out"]} \
held-out images, {c["balanced_accuracy"]:.3f} as the mean over groups (the most frequent group alone: {c["largest_class"]:.3f}).
Every tenth image is held out, so skin-tone variations of one emoji stand on both sides. These numbers do not compare with
Inception FID. FID is biased by the number of images, given in the second column.

| compared | images | FID | sFID | KID | precision | recall |
|---|---|---|---|---|---|---|
| samples, {s["steps"]} DDIM steps, against the data | {s["count"]:,} / {quality["images"]:,} | {_row(s)} |
| autoencoder's reconstructions (PSNR {r["psnr"]:.1f} dB) against the data | {r["count"]:,} / {quality["images"]:,} | {_row(r)} |
| one random half of the data against the other | {h["count"][0]:,} / {h["count"][1]:,} | {_row(h)} |

## Use
    pipe = questlib.models.loading.load_pipeline("{model_dir.name}")
    images = questlib.sampling.sample(pipe, 16).images
"""


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
        for axis, (name, log) in zip(figure.subplots(1, len(logs)), logs.items(), strict=True):
            axis.plot([e["step"] for e in log], [e["loss"] for e in log], linewidth=1)
            axis.set(title=TITLES[name], xlabel="step", ylabel="loss", yscale="log" if log else "linear")
        figure.savefig(path)


def _plot_grid(real: torch.Tensor, samples: torch.Tensor, path: Path) -> None:
    """Real images left, samples right; 256 colours keep the file small."""
    halves = [_tile(real), np.full((GRID * real.shape[2], 12, 3), 90, np.uint8), _tile(samples)]
    Image.fromarray(np.concatenate(halves, 1)).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _tile(images: torch.Tensor) -> np.ndarray:
    n, c, h, w = images.shape
    full = torch.full((GRID * GRID, c, h, w), 255, dtype=torch.uint8)
    full[:n] = images
    return full.view(GRID, GRID, c, h, w).permute(0, 3, 1, 4, 2).reshape(GRID * h, GRID * w, c).numpy()  # -> [H, W, 3]
