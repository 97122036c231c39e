"""Files and folders: checks before long work, and writing that a reader never sees half done."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from questlib.errors import ConfigError


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it, before any long work.

    Raises:
        ConfigError: the folder cannot be made, or no file can be made in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"folder {folder}: cannot be written ({error.strerror})") from error


def check_new(out: Path) -> None:
    """Check, before any long work, that a folder `out` can be made, or is there and empty.

    Raises:
        ConfigError: something is there already, or the place cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; nothing is overwritten")
    check_writable(out.parent)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends.

    A reader of `path` sees the old file (or folder) or the new one, never half of it. When the
    block raises, `path` stays as it was and what was written is removed. The new file has the
    permissions that the umask gives, also where a library has written it for its owner alone, as
    safetensors does.

    Example:
        >>> with atomic_path("log.json") as temporary:
        ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f"{path.name}.{owner}.tmp")
    try:
        yield temporary
        _give_umask(temporary)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _give_umask(path: Path) -> None:
    """Give a file, or a folder and all in it, the permissions of one that was just made.

    A file that its owner may execute stays so.
    """
    umask = os.umask(0o077)  # the only way to read it; what is made meanwhile is private
    os.umask(umask)
    for entry in (path, *path.rglob("*")):
        if entry.is_symlink():
            continue
        executable = entry.is_dir() or entry.stat().st_mode & stat.S_IXUSR
        entry.chmod((0o777 if executable else 0o666) & ~umask)
