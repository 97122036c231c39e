"""The paper's checkpoints as they are published, and a download that resumes and checks.

Nothing here reaches a network at import or in tests.
"""

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
from questlib.files import atomic_path, check_writable

# The base of all errors of the HTTP library that huggingface_hub has: httpx or httpx2.
HTTP_ERROR: type[Exception] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")

# The server's answer when nothing of a file is left to send ("range not satisfiable").
RANGE_NOT_SATISFIABLE = 416

LDM = "https://ommer-lab.com/files/latent-diffusion"


class RemoteFile(NamedTuple):
    """A published checkpoint.

    Args:
        sha256: None where the publisher gives none.
        member: the checkpoint inside a zip; None: the file itself.
    """

    url: str
    sha256: str | None = None
    member: str | None = None


# By the names of the embedded configs.
CHECKPOINTS = {
    "lsun_beds256": RemoteFile(f"{LDM}/lsun_bedrooms.zip", member="model.ckpt"),
    "lsun_churches256": RemoteFile(f"{LDM}/lsun_churches.zip", member="model.ckpt"),
    "cin256-v2": RemoteFile(f"{LDM}/nitro/cin/model.ckpt"),
    "sd-v1-4": RemoteFile(
        "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original/resolve/main/sd-v1-4.ckpt",
        "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    ),
}


def check_sha256(path: Path, sha256: str | None) -> None:
    """Check a file's digest; None: nothing is checked.

    Raises:
        CheckpointError: the file has another digest.
    """
    if sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise CheckpointError(f"{path}: expected sha256 {sha256.lower()}, found {found}")


def download_file(url: str, path: Path, sha256: str | None = None) -> Path:
    """Download to `path` unless it is there.

    What arrives lies in PATH.part, where the next call goes on.

    Raises:
        QuestError: the server fails.
        CheckpointError: another digest. PATH.part is removed then: it cannot become right.
    """
    if path.exists():
        check_sha256(path, sha256)
        return path
    check_writable(path.parent)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("ab") as file:
            http_get(url, file, resume_size=file.tell())
    except (OSError, HTTP_ERROR) as error:
        # A part that is whole already has nothing left to send. Its digest, or its zip, tells.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status != RANGE_NOT_SATISFIABLE or not part.stat().st_size:
            raise QuestError(f"download {url}: {error}; what arrived is kept in {part}") from error
    try:
        check_sha256(part, sha256)
    except CheckpointError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


def download_checkpoint(name: str, folder: Path) -> Path:
    """Download one of `CHECKPOINTS` as FOLDER/NAME.ckpt, unless it is there.

    Raises:
        ConfigError: another name.
        QuestError: the server fails, or the archive cannot be unpacked.
    """
    if name not in CHECKPOINTS:
        raise ConfigError(f"no known source of {name!r}; known: {', '.join(CHECKPOINTS)}")
    remote = CHECKPOINTS[name]
    path = folder / f"{name}.ckpt"
    if remote.member is None:
        return download_file(remote.url, path, remote.sha256)
    if path.exists():
        return path
    archive = download_file(remote.url, folder / f"{name}.zip", remote.sha256)
    try:
        with zipfile.ZipFile(archive) as zipped, zipped.open(remote.member) as member:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 24)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise QuestError(f"{archive}: cannot unpack {remote.member} ({error})") from error
    return path
