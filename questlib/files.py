"""Files and folders: checks before long work, and writing that a reader never sees half done."""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import shutil
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError

from questlib.errors import ConfigError, StorageError

# What a place that cannot be written answers.
STORAGE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}
KEPT = "what was there before is kept"

# The end of the name of a file that a process is writing.
TEMPORARY = re.compile(r"\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-\d+\.tmp$")
ABANDONED = 24 * 3600  # seconds


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


def storage_reason(error: BaseException | None) -> str | None:
    """Why the system could not write, where that is what an error is about; else None.

    safetensors tells the system's number in its text; torch raises an error of its own while it
    handles the system's.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else None
    if isinstance(error, RuntimeError):
        return storage_reason(error.__context__)
    return os.strerror(number) if number in STORAGE else None


@contextmanager
def atomic_path(path: str | Path, kept: str = KEPT) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends.

    A reader of `path` sees the old file (or folder) or the new one, never half of it. When the
    block raises, `path` stays as it was and what was written is removed. What a process that was
    killed has left in the folder is removed by the next one that writes there. The new file has the
    permissions that the umask gives, also where a library has written it for its owner alone, as
    safetensors does. A symbolic link at `path` is replaced; what it points to stays as it is.

    Args:
        path: the file or folder.
        kept: what a message says of a place that cannot be written.

    Raises:
        StorageError: the place cannot be written.

    Example:
        >>> with atomic_path("log.json") as temporary:
        ...     temporary.write_text("{}", encoding="utf-8")
    """
    path = Path(path)
    owner = f"{_machine()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f"{path.name}.{owner}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # a link that stands there is not written through
        _remove_abandoned(path.parent.absolute())
        yield temporary
        _give_umask(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        raise StorageError(f"cannot write {path}: {reason}; {kept}") from error
    finally:
        _remove(temporary)


@functools.cache
def _machine() -> str:
    """Eight digits for this machine: a process number means something only there."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


@functools.cache  # once a process: a folder of many thousand files takes long to list
def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that are gone were writing in a folder.

    Whether a process of another machine is gone cannot be known: its files go after a day.
    """
    for left in folder.glob("*.tmp"):
        found = TEMPORARY.search(left.name)
        if found is None:
            continue
        with suppress(OSError):
            gone = found["machine"] == _machine() and not psutil.pid_exists(int(found["process"]))
            if gone or time.time() - left.lstat().st_mtime > ABANDONED:
                _remove(left)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
