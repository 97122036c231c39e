"""Files and folders: checks before long work, and writing that a reader never sees half done."""

from __future__ import annotations

import tempfile
from pathlib import Path

from questlib.errors import ConfigError


def check_writable(folder: Path) -> None:
    """Make `folder`; ConfigError unless a file can be made in it: found out before any long work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"folder {folder}: cannot be written ({error.strerror})") from error


def check_new(out: Path) -> None:
    """ConfigError unless a folder `out` can be made, or is there and empty: before any long work."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; nothing is overwritten")
    check_writable(out.parent)
