"""Where the paper's checkpoints can be had, and a download that resumes and checks. Nothing here runs at import or in tests."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import HfHubHTTPError

from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.files import check_writable

# the base of all errors of the HTTP library that huggingface_hub has: httpx or httpx2
HTTPError = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
NOTHING_LEFT = (
    416  # the server's answer when the part is whole already: its digest, or its zip, tells
)


class Source(NamedTuple):
    """sha256 is None where the publisher gives none; `member` is the checkpoint inside a zip."""

    url: str
    sha256: str | None = None
    member: str | None = None


LDM = "https://ommer-lab.com/files/latent-diffusion"
SOURCES = {  # names as those of the embedded configs
    "lsun_beds256": Source(f"{LDM}/lsun_bedrooms.zip", member="model.ckpt"),
    "lsun_churches256": Source(f"{LDM}/lsun_churches.zip", member="model.ckpt"),
    "cin256-v2": Source(f"{LDM}/nitro/cin/model.ckpt"),
    "sd-v1-4": Source(
        "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original/resolve/main/sd-v1-4.ckpt",
        "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    ),
}


def check_sha256(path: Path, sha256: str | None) -> None:
    """CheckpointError unless the file has this digest; None: not checked."""
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256.lower():
            raise CheckpointError(f"{path}: expected sha256 {sha256.lower()}, found {found}")


def fetch(url: str, path: Path, sha256: str | None = None) -> Path:
    """Download to `path` unless it is there. What arrives lies in PATH.part, where the next call goes on.

    QuestError when the server fails, CheckpointError for another digest (then PATH.part is removed: it cannot become right).
    """
    if path.exists():
        check_sha256(path, sha256)
        return path
    check_writable(path.parent)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("ab") as file:
            http_get(url, file, resume_size=file.tell())
    except (OSError, HTTPError) as error:
        if (
            getattr(getattr(error, "response", None), "status_code", None) != NOTHING_LEFT
            or not part.stat().st_size
        ):
            raise QuestError(f"download {url}: {error}; what arrived is kept in {part}") from error
    try:
        check_sha256(part, sha256)
    except CheckpointError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


def download(name: str, folder: Path) -> Path:
    """The checkpoint of one of `SOURCES` as FOLDER/NAME.ckpt; ConfigError for another name."""
    if name not in SOURCES:
        raise ConfigError(f"no known source of {name!r}; known: {', '.join(SOURCES)}")
    source, path = SOURCES[name], folder / f"{name}.ckpt"
    if source.member is None:
        return fetch(source.url, path, source.sha256)
    if path.exists():
        return path
    archive = fetch(source.url, folder / f"{name}.zip", source.sha256)
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(source.member) as member:
            part = path.with_name(f"{path.name}.part")
            with part.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 24)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise QuestError(f"{archive}: cannot unpack {source.member} ({error})") from error
    os.replace(part, path)
    return path
