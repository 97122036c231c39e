"""Compiles the kernels once for this machine's processor, into a cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from questlib.errors import QuestError, StorageError
from questlib.files import atomic_path

FOLDER = Path(__file__).parent
CACHE_VARIABLE = "QUEST_KERNELS"  # the cache folder, where it is not the user's own
COMPILER_VARIABLE = "CXX"
PROCESSOR_VARIABLE = "QUEST_KERNELS_ARCH"  # what to compile for, where it is not this processor
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
    # Rounding is that of single operations, as torch's: codes must be the same.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# Vectors as wide as the processor has them; compilers prefer half of that.
X86_FLAGS = ("-mprefer-vector-width=512",)
SECONDS = 300  # after which a compiler counts as hung


class NoCompilerError(QuestError):
    """No compiler was found, or it failed; the message says which."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: $QUEST_KERNELS, or questlib/kernels in the user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "questlib" / "kernels"


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is installed.

    Raises:
        NoCompilerError: there is none.
    """
    names = (os.environ[COMPILER_VARIABLE],) if COMPILER_VARIABLE in os.environ else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise NoCompilerError(f"no C++ compiler: expected one of {', '.join(names)} on the PATH")


def processor() -> str:
    """What decides the machine code: architecture, and the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {' '.join(sorted(flags.partition(':')[2].split()))}"


def compiled() -> Path:
    """The kernels as a shared library, compiled now or before.

    The file is named by source, compiler, flags and processor, so that a folder which several
    machines share serves each of them. Two processes that want it compile it once.

    Raises:
        NoCompilerError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    compiler = find_compiler()
    units = sorted(FOLDER.glob("*.cpp"))
    texts = [path.read_text() for path in (*units, *sorted(FOLDER.glob("*.h")))]
    wide = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()
    flags = (*FLAGS, *wide, f"-march={os.environ.get(PROCESSOR_VARIABLE) or 'native'}")
    version = _run([compiler, "--version"]).splitlines()[0]
    parts = (*texts, compiler, version, *flags, processor())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    library = cache_folder() / f"kernels-{key}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{library}.lock"):
            if not library.is_file():
                with atomic_path(library) as temporary:
                    _run([compiler, *flags, *map(str, units), "-o", str(temporary)])
    except (OSError, StorageError) as error:
        raise NoCompilerError(
            f"cannot be kept in {library.parent} ({error}); "
            f"set ${CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return library


def _run(command: list[str]) -> str:
    """A command's output. NoCompilerError with its message when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{command[0]}: {error}") from error
    if done.returncode:
        message = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise NoCompilerError(f"{command[0]} failed: {message[0]}")
    return done.stdout or " "
