"""Damage of files: seeded changes of bytes, of JSON values and of the tensors in a file."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]


# ---- bytes ----


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Some bytes in a row become random, zero or 255."""
    start = rng.randrange(len(data))
    size = min(rng.choice([1, 2, 8, 64]), len(data) - start)
    kind = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size])
    return data[:start] + kind + data[start + size :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def delete(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice([1, 8, 64]) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice([1, 8, 64])) + data[start:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """A part of the file stands in place of another part."""
    size = min(rng.choice([4, 32, 256]), len(data))
    source = rng.randrange(len(data) - size + 1)
    target = rng.randrange(len(data) - size + 1)
    return data[:target] + data[source : source + size] + data[target + size :]


BYTES: list[Mutator] = [flip_bit, overwrite, truncate, delete, insert, repeat]


# ---- JSON ----

ODD = [
    None, True, False, 0, 1, -1, 2, 3, 255, 2**31, -(2**63), 10**400, 0.5, 1e-30, 1e30,
    math.nan, math.inf, "", "x", "1", [], [0], {}, {"a": 1},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with each of its keys or indices."""
    if isinstance(value, dict):
        own = [(value, key) for key in value]
        return own + [place for part in value.values() for place in places(part)]
    if isinstance(value, list):
        own = [(value, i) for i in range(len(value))]
        return own + [place for part in value for place in places(part)]
    return []


def change_value(rng: random.Random, value: Any) -> str:
    """A value of JSON, changed in place at one spot, as text."""
    container, key = rng.choice(places(value))
    what = rng.choice(["odd", "near", "delete", "rename", "add", "deep", "swap"])
    if what == "odd":
        container[key] = rng.choice(ODD)
    elif what == "near":
        container[key] = nearby(rng, container[key])
    elif what == "delete":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif what == "add" and isinstance(container, dict):
        container["more"] = rng.choice(ODD)
    elif what == "deep":
        container[key] = "DEEP"
        return json.dumps(value).replace('"DEEP"', "[" * 5000 + "]" * 5000)
    else:
        other, name = rng.choice(places(value))
        container[key], other[name] = other[name], container[key]
        return json.dumps(value, default=str, check_circular=False) if is_tree(value) else "{}"
    return json.dumps(value)


def is_tree(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether no container is inside of itself."""
    if id(value) in above:
        return False
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(is_tree(part, (*above, id(value))) for part in parts)


def nearby(rng: random.Random, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 7])
    if isinstance(value, float):
        return value * rng.choice([0.5, 1.0001, -1.0]) + 1e-6
    if isinstance(value, str):
        return value[:-1] or "y"
    return value


def change_json(rng: random.Random, data: bytes) -> bytes:
    return change_value(rng, json.loads(data)).encode()


# ---- safetensors ----

TYPES = ["BOOL", "U8", "I8", "I16", "I64", "F16", "BF16", "F32", "F64", "C64"]
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_file(header: str, body: bytes) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + body


def change_header(rng: random.Random, data: bytes) -> bytes:
    """Any entry of the header."""
    header, body = split_file(data)
    return join_file(change_value(rng, header), body)


def change_tensor(rng: random.Random, data: bytes) -> bytes:
    """A tensor's name, type, shape, or one of its values; the metadata stay."""
    header, body = split_file(data)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    about = header[name]
    what = rng.choice(["value", "value", "value", "type", "shape", "swap", "drop", "rename"])
    if what == "value":
        start, end = about["data_offsets"]
        size = SIZES.get(about["dtype"], 1)
        if end == start:
            return join_file(json.dumps(header), body[:-1])
        at = start + size * rng.randrange((end - start) // size)
        body = body[:at] + odd_bytes(rng, about["dtype"], size, body[at : at + size])
        body += data[len(data) - len(split_file(data)[1]) + at + size :]
    elif what == "type":
        about["dtype"] = rng.choice(TYPES)
    elif what == "shape":
        about["shape"] = about["shape"][::-1] if rng.random() < 0.5 else [*about["shape"], 1]
    elif what == "swap":
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif what == "drop":
        del header[name]
    else:
        header[f"{name}_"] = header.pop(name)
    return join_file(json.dumps(header), body)


def odd_bytes(rng: random.Random, kind: str, size: int, before: bytes) -> bytes:
    """The bytes of a value that is unlikely there, or of one near to it."""
    if kind == "F32":
        (value,) = struct.unpack("<f", before)
        odd = [math.nan, math.inf, -math.inf, 0.0, -value, value * 1.01, value + 1, 1e30, -1.0]
        return struct.pack("<f", rng.choice(odd))
    return bytes((byte + rng.choice([1, 7, 128])) % 256 for byte in before[:size])


SAFETENSORS: list[Mutator] = [change_header, change_tensor, change_tensor, change_tensor]


def mutate(rng: random.Random, name: str, data: bytes) -> bytes:
    """A damaged file. Its name says what can be in it."""
    own = {"json": [change_json] * 4, "safetensors": SAFETENSORS}.get(name.rpartition(".")[2], [])
    return rng.choice([*BYTES, *own])(rng, data)
