"""What is loaded is what was saved: digests in the files, and checks of tensors.

A safetensors file has, in its metadata, a digest of each tensor and one of all that it says. Files
of before have none, and are read by the checks of their tensors alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from questlib.errors import CheckpointError, QuestError
from questlib.files import atomic_path

Tensors = dict[str, torch.Tensor]

DIGESTS = "digests"  # the entry of the metadata
SOME = 5  # names that a message lists

LATEST = 2**31  # no timestep is as late; those of EDM are logarithms and can be negative


# ---- digests ----


def as_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor as a numpy array."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def digest_of(tensor: torch.Tensor) -> str:
    """A digest of a tensor's type, shape and values."""
    tensor = tensor.detach().cpu()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(as_bytes(tensor))
    return digest.hexdigest()


def digest_of_json(value: Any) -> str:
    """A digest of a value that JSON holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_tree(value: Any) -> str:
    """A digest of tensors, numbers, texts and None in nested dicts, lists and tuples."""
    return digest_of_json(_described(value))


def _described(value: Any) -> Any:
    if torch.is_tensor(value):
        return ["tensor", digest_of(value)]
    if isinstance(value, dict):
        return ["dict", [[_described(key), _described(part)] for key, part in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_described(part) for part in value]]
    return value


def with_digests(tensors: Mapping[str, torch.Tensor], about: Any = None) -> dict[str, str]:
    """The metadata of a file that holds these tensors: their digests, and `about`, in one entry.

    safetensors writes several entries in an order of chance; one leaves the file's bytes the same.

    Args:
        tensors: what the file holds; or, of a model in several files, what all of them hold.
        about: what else there is to say, as JSON holds it.

    Example:
        >>> save_file(tensors, path, with_digests(tensors, {"model": "1f3a"}))
    """
    found = {"about": about or {}, "tensors": {name: digest_of(v) for name, v in tensors.items()}}
    return {DIGESTS: json.dumps(found | {"digest": digest_of_json(found)}, sort_keys=True)}


class Known(NamedTuple):
    """What the metadata of a file say."""

    about: dict[str, Any]
    tensors: dict[str, str] | None
    """The digest of each tensor; None in files of before, which have none."""


def parse_metadata(
    where: str | Path, metadata: Mapping[str, str] | None, error: type[QuestError] = CheckpointError
) -> Known:
    """What a file's metadata say. CheckpointError where they are not what was saved."""
    metadata = metadata or {}
    if DIGESTS not in metadata:
        return Known(dict(metadata), None)
    try:
        saved = json.loads(metadata[DIGESTS])
        whole = saved.pop("digest") == digest_of_json(saved)
        known = Known(dict(saved["about"]), dict(saved["tensors"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as damage:
        raise error(f"{where}: its digests are damaged ({damage!r})") from damage
    if not whole:
        raise error(f"{where}: its digests are damaged")
    return known


def check_digests(
    where: str | Path,
    tensors: Mapping[str, torch.Tensor],
    known: Known,
    error: type[QuestError] = CheckpointError,
) -> None:
    """Check that tensors are those that were saved, where the file can tell.

    Raises:
        CheckpointError: some have changed; the message names them.
    """
    if known.tensors is not None:
        saved = known.tensors
        named = {
            "missing": [name for name in saved if name not in tensors],
            "unexpected": [name for name in tensors if name not in saved],
            "not what was saved": [
                name for name, v in tensors.items() if name in saved and saved[name] != digest_of(v)
            ],
        }
        fail_if_any(where, named, error)


def fail_if_any(
    where: str | Path,
    named: Mapping[str, Iterable[str]],
    error: type[QuestError] = CheckpointError,
) -> None:
    """Raise an error that lists what is wrong: a few names of each kind. Nothing if nothing is."""
    lists = {what: sorted(names) for what, names in named.items() if names}
    if lists:
        found = "; ".join(
            f"{what}: {', '.join(names[:SOME])}"
            + (f" and {len(names) - SOME} more" if len(names) > SOME else "")
            for what, names in lists.items()
        )
        raise error(f"{where}: {found}")


# ---- checks of tensors ----


def check_finite(
    where: str | Path,
    tensors: Mapping[str, torch.Tensor],
    error: type[QuestError] = CheckpointError,
) -> None:
    """Check that no value is NaN or infinite. CheckpointError that names the tensors."""
    fail_if_any(where, {"not finite": not_finite(tensors)}, error)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that have NaN or infinity. Those without values here are left out."""
    return [
        name
        for name, value in tensors.items()
        if (value.is_floating_point() or value.is_complex())
        and not value.is_meta
        and not bool(value.isfinite().all())
    ]


def check_like(
    where: str | Path,
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    error: type[QuestError] = CheckpointError,
) -> None:
    """Check that tensors have the names, shapes and types of the expected ones, and are finite.

    Raises:
        CheckpointError: they do not; the message names them.
    """
    named: dict[str, list[str]] = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "wrong shape": [],
        "wrong type": [],
    }
    for name in expected.keys() & tensors.keys():
        found = tensors[name]
        wanted = expected[name]
        if found.shape != wanted.shape:
            shapes = f"{list(found.shape)} (expected {list(wanted.shape)})"
            named["wrong shape"].append(f"{name} {shapes}")
        elif found.dtype != wanted.dtype:
            named["wrong type"].append(f"{name} {found.dtype} (expected {wanted.dtype})")
    fail_if_any(where, named, error)
    check_finite(where, tensors, error)


# ---- files ----


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], about: Any = None) -> None:
    """Write a safetensors file with digests; a reader sees it whole or not at all.

    Args:
        path: the file; one that is there already is replaced.
        tensors: what it holds.
        about: what else there is to say, as JSON holds it.

    Raises:
        StorageError: the place cannot be written.
    """
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(own, temporary, with_digests(own, about))


def read_tensors(
    path: str | Path, error: type[QuestError] = CheckpointError
) -> tuple[Tensors, dict[str, Any]]:
    """All tensors of a safetensors file, and what its metadata say beside the digests.

    Raises:
        CheckpointError: it cannot be read, or does not hold what was saved.
    """
    with opened(path, error) as (file, known):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    check_digests(path, tensors, known, error)
    return tensors, known.about


@contextmanager
def opened(
    path: str | Path, error: type[QuestError] = CheckpointError
) -> Iterator[tuple[Any, Known]]:
    """A safetensors file, and what its metadata say; its tensors are still to be checked.

    Raises:
        CheckpointError: it cannot be read, now or in the block.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file, parse_metadata(path, file.metadata(), error)
    except QuestError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, LookupError) as damage:
        raise error(f"{path} cannot be read ({damage})") from damage
