"""Instructions that compute a register from registers, lane by lane.

Integers wrap around as the hardware's do. float32 is rounded after each operation. Special
functions (ex2, rcp, sqrt) are exact here and are good to some units of the last place there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ptx import BITS, FLOATS, Instruction, PtxError, dtype_of


class Operation(NamedTuple):
    """What an instruction computes: output of type `out` from inputs of types `kinds`."""

    function: Callable[..., np.ndarray]
    kinds: list[str]
    out: str


def operation(instruction: Instruction) -> Operation:
    """Raises PtxError: the instruction is not known."""
    of = OPERATIONS.get(instruction.opcode)
    if of is None:
        raise PtxError(f"unknown instruction: {instruction.text[:200]}")
    return of(instruction.modifiers, instruction.kind)


def _all(function: Callable, inputs: int) -> Callable:
    """An operation whose operands have the type of its result."""

    def of(modifiers: tuple[str, ...], kind: str) -> Operation:
        if kind in ("f16", "bf16", "f16x2", "bf16x2", "f64"):
            raise PtxError(f"arithmetic in {kind} is not emulated")
        return Operation(function, [kind] * inputs, kind)

    return of


def _wider(kind: str) -> str:
    return f"{kind[0]}{2 * BITS[kind]}"


def _product(modifiers: tuple[str, ...], kind: str, added: bool) -> Operation:
    """mul and mad: float32, or the low, high or whole product of integers."""
    inputs = [kind] * 2
    if kind in FLOATS or "lo" in modifiers:
        if added:
            return Operation(lambda a, b, c: a * b + c, [*inputs, kind], kind)
        return Operation(np.multiply, inputs, kind)
    out = _wider(kind)
    wide = dtype_of(out)
    if "wide" in modifiers:
        if added:
            return Operation(lambda a, b, c: a.astype(wide) * b + c, [*inputs, out], out)
        return Operation(lambda a, b: a.astype(wide) * b.astype(wide), inputs, out)
    shift = wide.type(BITS[kind])
    own = dtype_of(kind)

    def high(a, b):
        return (a.astype(wide) * b.astype(wide) >> shift).astype(own)

    if added:
        return Operation(lambda a, b, c: high(a, b) + c, [*inputs, kind], kind)
    return Operation(high, inputs, kind)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _divided(remainder: bool) -> Callable:
    def of(modifiers: tuple[str, ...], kind: str) -> Operation:
        if kind in FLOATS:
            return Operation(np.divide, [kind, kind], kind)

        def divide(a, b):
            if not np.all(b):
                raise PtxError("division by zero")
            # Towards zero, unlike numpy's.
            rest = np.fmod(a, b)
            return rest if remainder else (a - rest) // b

        return Operation(divide, [kind, kind], kind)

    return of


def _extreme(number: Callable, propagating: Callable) -> Callable:
    """min and max: of floats the number wins over NaN, unless .NaN says otherwise."""

    def of(modifiers: tuple[str, ...], kind: str) -> Operation:
        return Operation(propagating if "NaN" in modifiers else number, [kind, kind], kind)

    return of


def _shifted(left: bool) -> Callable:
    def of(modifiers: tuple[str, ...], kind: str) -> Operation:
        bits = BITS[kind]
        dtype = dtype_of(kind)

        def shift(a, n):
            # Beyond the width nothing is left but the sign.
            by = np.minimum(n, bits - 1).astype(dtype)
            if kind[0] == "s":
                return a >> by
            return np.where(n < bits, a << by if left else a >> by, dtype.type(0))

        return Operation(shift, [kind, "u32"], kind)

    return of


def _field(modifiers: tuple[str, ...], kind: str) -> Operation:
    """bfe: the bits [at, at + length) of a."""
    bits = BITS[kind]

    def extract(a, at, length):
        value = a.astype(np.int64 if kind[0] == "s" else np.uint64)
        if bits != 32:
            raise PtxError(f"bfe of {kind} is not emulated")
        left = (64 - at.astype(np.int64) - length).astype(value.dtype)
        right = (64 - length.astype(np.int64)).astype(value.dtype)
        return ((value << left) >> right).astype(dtype_of(kind))

    return Operation(extract, [kind, "u32", "u32"], kind)


def _insert(a: np.ndarray, b: np.ndarray, at: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: a as the bits [at, at + length) of b."""
    ones = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32) << at
    return (b & ~ones) | ((a << at) & ones)


def _permuted(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """prmt: each byte is one of the eight of a and b, or that one's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.uint32(0)
    for i in range(4):
        pick = choice >> np.uint32(4 * i)
        byte = both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte).astype(np.uint32)
        out = out | byte << np.uint32(8 * i)
    return out


def _lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: any function of three bits, by its table."""
    out = np.uint32(0)
    for i in range(8):
        if int(table) >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _compared(modifiers: tuple[str, ...], kind: str) -> Operation:
    """setp: `.lt`, or `.ltu` which a NaN satisfies; optionally combined with a predicate."""
    name = modifiers[0]
    real = kind in FLOATS
    if name in ("num", "nan"):

        def compare(a, b):
            return (np.isnan(a) | np.isnan(b)) ^ (name == "num")

    elif real and name.endswith("u"):

        def compare(a, b):
            return COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)

    elif real and name == "ne":

        def compare(a, b):
            return (a < b) | (a > b)

    else:
        compare = COMPARISONS[name]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(modifiers[1])
    if combine is None:
        return Operation(compare, [kind, kind], "pred")
    return Operation(lambda a, b, p: combine(compare(a, b), p), [kind, kind, "pred"], "pred")


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded half to even."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = np.where(np.isnan(x), bits | np.uint32(0x400000), rounded)
    return (kept >> np.uint32(16)).astype(np.uint16)


def _half(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    return bfloat16 if kind.startswith("b") else lambda x: x.astype(np.float16).view(np.uint16)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _converted(modifiers: tuple[str, ...], kind: str) -> Operation:
    """cvt.to.from"""
    to = [x for x in modifiers if x in BITS][0]
    if to in ("f16x2", "bf16x2"):
        half = _half(to)
        return Operation(
            lambda high, low: half(high).astype(np.uint32) << np.uint32(16) | half(low),
            ["f32", "f32"],
            "b32",
        )
    if to in ("f16", "bf16"):
        if kind != "f32":
            raise PtxError(f"cvt from {kind} to {to} is not emulated")
        return Operation(_half(to), [kind], "b16")
    if kind == "bf16":
        return Operation(
            lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32), ["b16"], "f32"
        )
    dtype = dtype_of(to)
    if kind in FLOATS and to not in FLOATS:
        toward = next(ROUNDINGS[x] for x in modifiers if x in ROUNDINGS)
        limits = np.iinfo(dtype)
        # Beyond the range the nearest of it; NaN is 0.
        return Operation(
            lambda x: (
                np.clip(np.nan_to_num(toward(x.astype(np.float64))), limits.min, limits.max)
                .astype(np.int64)
                .astype(dtype)
            ),
            [kind],
            to,
        )
    return Operation(lambda x: x.astype(dtype), [kind], to)


def _exp2(x: np.ndarray) -> np.ndarray:
    """ex2.approx.ftz: subnormal results are zero."""
    y = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(y < np.float32(2.0**-126), np.float32(0), y)


def _fixed(function: Callable, kinds: list[str], out: str) -> Callable:
    return lambda modifiers, kind: Operation(function, kinds, out)


OPERATIONS: dict[str, Callable[[tuple[str, ...], str], Operation]] = {
    "mov": _all(lambda a: a, 1),
    "cvta": _all(lambda a: a, 1),
    "add": _all(np.add, 2),
    "sub": _all(np.subtract, 2),
    "neg": _all(np.negative, 1),
    "abs": _all(np.abs, 1),
    "and": _all(np.bitwise_and, 2),
    "or": _all(np.bitwise_or, 2),
    "xor": _all(np.bitwise_xor, 2),
    "not": _all(np.invert, 1),
    "mul": lambda modifiers, kind: _product(modifiers, kind, False),
    "mad": lambda modifiers, kind: _product(modifiers, kind, True),
    "fma": _fixed(_fma, ["f32"] * 3, "f32"),
    "div": _divided(False),
    "rem": _divided(True),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "shl": _shifted(True),
    "shr": _shifted(False),
    "bfe": _field,
    "bfi": _fixed(_insert, ["b32"] * 4, "b32"),
    "prmt": _fixed(_permuted, ["b32"] * 3, "b32"),
    "lop3": _fixed(_lookup, ["b32"] * 4, "b32"),
    "popc": lambda modifiers, kind: Operation(np.bitwise_count, [kind], "u32"),
    "setp": _compared,
    "selp": lambda modifiers, kind: Operation(
        lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], kind
    ),
    "cvt": _converted,
    "ex2": _fixed(_exp2, ["f32"], "f32"),
    "rcp": _fixed(lambda x: np.float32(1) / x, ["f32"], "f32"),
    "sqrt": _fixed(np.sqrt, ["f32"], "f32"),
    "rsqrt": _fixed(lambda x: np.float32(1) / np.sqrt(x), ["f32"], "f32"),
}
