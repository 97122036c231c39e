"""Loads, stores, copies and atomics, and what the threads of a warp exchange."""

from __future__ import annotations

import re

import numpy as np
from blocks import WARP, Blocks, Copy, Step, active_of, guard_of, reader
from ptx import BITS, Instruction, Program, PtxError, dtype_of, vector


class Address:
    """`[register + offset]` or `[register]`."""

    def __init__(self, program: Program, operand: str, kind: str) -> None:
        found = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
        self.base = reader(program, found[1], kind)
        bits = BITS[kind]
        self.offset = dtype_of(kind).type(int(found[2] or "0", 0) & ((1 << bits) - 1))

    def of(self, blocks: Blocks) -> np.ndarray:
        """[lanes], in the width of the address space"""
        return np.broadcast_to(blocks.read(self.base) + self.offset, (blocks.lanes,))


def shared_offsets(blocks: Blocks, addresses: np.ndarray, size: int, lanes=slice(None)):
    """Where a block's addresses lie in `blocks.shared`.

    Args:
        addresses: uint32 [L].
        size: of what is accessed, in bytes.
        lanes: those that the addresses are of.
    """
    if (addresses % np.uint32(size)).any():
        raise PtxError(f"misaligned access to shared memory of {size} bytes")
    if len(addresses) and int(addresses.max()) + size > blocks.size:
        raise PtxError(f"access beyond shared memory of {blocks.size}: {int(addresses.max())}")
    return addresses.astype(np.int64) + blocks.shared_base[lanes]


def load(program: Program, instruction: Instruction) -> Step:
    """ld.param, ld.global, ld.shared"""
    space = instruction.modifiers[0]
    kind = instruction.kind
    if space == "param":
        name = instruction.operands[1].strip("[]")
        value = dtype_of(f"b{BITS[kind]}")
        target = instruction.operands[0]

        def take(blocks: Blocks) -> None:
            raw = np.array(blocks.parameters[name], np.uint64).astype(value)
            blocks.write(target, raw, None)

        return take
    guard = guard_of(program, instruction)
    targets = vector(instruction.operands[0])
    size = BITS[kind] // 8
    dtype = dtype_of(kind if kind[0] == "s" else f"b{BITS[kind]}")
    address = _address(program, instruction.operands[1], space)

    def run(blocks: Blocks) -> None:
        active = active_of(blocks, guard, instruction.negated)
        lanes = slice(None) if active is None or active.all() else active.nonzero()[0]
        at = address.of(blocks)[lanes]
        if space == "global":
            found = blocks.memory.load(at, size * len(targets))
        else:
            offsets = shared_offsets(blocks, at, size * len(targets), lanes)
            found = blocks.window.load(offsets, size * len(targets))
        values = found.view(dtype).reshape(len(at), len(targets))
        for i, target in enumerate(targets):
            if isinstance(lanes, slice):
                blocks.write(target, values[:, i].copy(), None)
            else:
                whole = np.zeros(blocks.lanes, dtype)
                whole[lanes] = values[:, i]
                blocks.write(target, whole, active)

    return run


def _address(program: Program, operand: str, space: str) -> Address:
    if space not in ("global", "shared"):
        raise PtxError(f"memory of kind {space} is not emulated")
    return Address(program, operand, "b64" if space == "global" else "b32")


def packed(values: list[np.ndarray]) -> np.ndarray:
    """Values of each lane one behind the other: void [L]."""
    both = np.stack(values, 1)
    return both.view(f"V{both.shape[1] * both.itemsize}")[:, 0]


def store(program: Program, instruction: Instruction) -> Step:
    """st.global, st.shared"""
    space = instruction.modifiers[0]
    guard = guard_of(program, instruction)
    kind = f"b{BITS[instruction.kind]}"
    sources = [reader(program, x, kind) for x in vector(instruction.operands[1])]
    address = _address(program, instruction.operands[0], space)

    def run(blocks: Blocks) -> None:
        active = active_of(blocks, guard, instruction.negated)
        lanes = slice(None) if active is None or active.all() else active.nonzero()[0]
        whole = [np.broadcast_to(blocks.read(x), (blocks.lanes,)) for x in sources]
        values = packed([x[lanes] for x in whole])
        at = address.of(blocks)[lanes]
        if space == "global":
            blocks.memory.store(at, values)
        else:
            blocks.window.store(shared_offsets(blocks, at, values.itemsize, lanes), values)

    return run


def atomic_add(program: Program, instruction: Instruction) -> Step:
    """red.global.add and atom.global.add"""
    operands = instruction.operands
    old = None
    if instruction.opcode == "atom":
        old, *operands = operands
    if instruction.kind not in ("s32", "u32") or "add" not in instruction.modifiers:
        raise PtxError("only the addition of 32-bit integers is emulated")
    guard = guard_of(program, instruction)
    sources = [reader(program, x, "s32") for x in vector(operands[1])]
    address = Address(program, operands[0], "b64")

    def run(blocks: Blocks) -> None:
        active = active_of(blocks, guard, instruction.negated)
        lanes = slice(None) if active is None else active
        at = address.of(blocks)[lanes]
        for i, source in enumerate(sources):
            values = np.broadcast_to(blocks.read(source), (blocks.lanes,))[lanes]
            found = blocks.memory.add_int32(at + np.uint64(4 * i), values)
            if old is not None:
                whole = np.zeros(blocks.lanes, np.int32)
                whole[lanes] = found
                blocks.write(vector(old)[i], whole, active)

    return run


def copy_async(program: Program, instruction: Instruction) -> Step:
    """cp.async: what is copied is there only when it has been waited for."""
    if "commit_group" in instruction.modifiers:

        def commit(blocks: Blocks) -> None:
            blocks.groups = [*blocks.groups, blocks.begun]
            blocks.begun = []

        return commit
    if "wait_group" in instruction.modifiers:
        left = int(instruction.operands[0], 0)
        return lambda blocks: _arrive(blocks, left)
    guard = guard_of(program, instruction)
    target = Address(program, instruction.operands[0], "b32")
    source = Address(program, instruction.operands[1], "b64")
    total = int(instruction.operands[2], 0)
    size = reader(program, (*instruction.operands, str(total))[3], "b32")

    def begin(blocks: Blocks) -> None:
        active = active_of(blocks, guard, instruction.negated)
        sizes = np.broadcast_to(blocks.read(size), (blocks.lanes,))
        if (sizes % total).any():
            raise PtxError(f"cp.async of a part of {total} bytes is not emulated")
        active = blocks.all if active is None else active
        one = Copy(active, target.of(blocks), source.of(blocks), sizes, total)
        blocks.begun = [*blocks.begun, one]

    return begin


def _arrive(blocks: Blocks, left: int) -> None:
    """All groups of copies but the last `left` arrive."""
    count = max(0, len(blocks.groups) - left)
    for one in (one for group in blocks.groups[:count] for one in group):
        values = np.zeros(blocks.lanes, f"V{one.total}")
        full = (one.active & (one.size > 0)).nonzero()[0]
        values[full] = blocks.memory.load(one.source[full], one.total)
        lanes = one.active.nonzero()[0]
        offsets = shared_offsets(blocks, one.target[lanes], one.total, lanes)
        blocks.window.store(offsets, values[lanes])
    blocks.groups = blocks.groups[count:]


def matrices(program: Program, instruction: Instruction) -> Step:
    """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits between a warp and shared memory.

    Lane 8 i + r has the address of row r of matrix i. Lane 4 r + c holds two elements of row r of
    each matrix, or of column r with `.trans`.
    """
    loading = instruction.opcode == "ldmatrix"
    registers, place = instruction.operands if loading else instruction.operands[::-1]
    names = vector(registers)
    transposed = "trans" in instruction.modifiers
    sources = [] if loading else [reader(program, x, "b32") for x in names]
    address = Address(program, place, "b32")
    if instruction.predicate is not None:
        raise PtxError("a predicate on matrices is not emulated")

    def swapped(values: np.ndarray) -> np.ndarray:
        """uint32 [W, 8, 4] -> uint16 [W, 8, 8] transposed -> uint32 [W, 8, 4]"""
        halves = np.ascontiguousarray(values).view(np.uint16)
        return np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.uint32)

    def run(blocks: Blocks) -> None:
        at = address.of(blocks).reshape(-1, WARP)[:, : 8 * len(names)]
        lanes = np.arange(blocks.lanes).reshape(-1, WARP)[:, : 8 * len(names)].reshape(-1)
        offsets = shared_offsets(blocks, at.reshape(-1), 16, lanes).reshape(-1, len(names), 8)
        for i, name in enumerate(names):
            rows = offsets[:, i].reshape(-1)
            if loading:
                found = blocks.window.load(rows, 16).view(np.uint32).reshape(-1, 8, 4)
                blocks.write(name, (swapped(found) if transposed else found).reshape(-1), None)
            else:
                values = blocks.read(sources[i]).reshape(-1, 8, 4)
                values = np.ascontiguousarray(swapped(values) if transposed else values)
                blocks.window.store(rows, values.reshape(-1, 4).view("V16")[:, 0])

    return run


def shuffle(program: Program, instruction: Instruction) -> Step:
    """shfl.sync: a value of another lane of the warp"""
    mode = instruction.modifiers[1]
    target = instruction.operands[0].split("|")[0]
    source, other = (reader(program, x, "b32") for x in instruction.operands[1:3])
    if mode not in ("bfly", "idx"):
        raise PtxError(f"shfl.{mode} is not emulated")

    def run(blocks: Blocks) -> None:
        lane = np.arange(blocks.lanes, dtype=np.uint32)
        by = blocks.read(other)
        within = lane % WARP ^ by if mode == "bfly" else by % WARP
        values = np.broadcast_to(blocks.read(source), (blocks.lanes,))
        blocks.write(target, values[lane - lane % WARP + within], None)

    return run


def reduce_warp(program: Program, instruction: Instruction) -> Step:
    """redux.sync: the sum or extreme of a warp's values, in all its lanes"""
    of = {"add": np.add, "min": np.minimum, "max": np.maximum}[instruction.modifiers[1]]
    source = reader(program, instruction.operands[1], instruction.kind)

    def run(blocks: Blocks) -> None:
        values = np.broadcast_to(blocks.read(source), (blocks.lanes,)).reshape(-1, WARP)
        total = of.reduce(values, axis=1, dtype=values.dtype)
        blocks.write(instruction.operands[0], np.repeat(total, WARP), None)

    return run


def repack(program: Program, instruction: Instruction) -> Step:
    """mov between a register and the parts of `{a, b}`"""
    target, source = instruction.operands
    guard = guard_of(program, instruction)
    bits = BITS[instruction.kind]
    parts = vector(target if target.startswith("{") else source)
    own = np.dtype(f"u{bits // 8 // len(parts)}")
    whole = np.dtype(f"u{bits // 8}")
    if target.startswith("{"):
        value = reader(program, source, instruction.kind)

        def unpack(blocks: Blocks) -> None:
            active = active_of(blocks, guard, instruction.negated)
            pieces = np.ascontiguousarray(np.broadcast_to(blocks.read(value), (blocks.lanes,)))
            pieces = pieces.view(own).reshape(-1, len(parts))
            for i, part in enumerate(parts):
                blocks.write(part, pieces[:, i].copy(), active)

        return unpack
    readers = [reader(program, part, f"b{own.itemsize * 8}") for part in parts]

    def pack(blocks: Blocks) -> None:
        active = active_of(blocks, guard, instruction.negated)
        pieces = [np.broadcast_to(blocks.read(x), (blocks.lanes,)) for x in readers]
        blocks.write(target, np.stack(pieces, 1).view(whole)[:, 0], active)

    return pack


def elect(program: Program, instruction: Instruction) -> Step:
    """elect.sync: one lane of each warp"""
    target = instruction.operands[0].split("|")[1]
    return lambda blocks: blocks.write(target, blocks.special["%laneid"] == 0, None)


def nothing(program: Program, instruction: Instruction) -> Step:
    """Barriers and fences: threads run in step anyway."""
    guard = guard_of(program, instruction)

    def run(blocks: Blocks) -> None:
        active = active_of(blocks, guard, instruction.negated)
        if active is not None and not np.all(active):
            raise PtxError("a barrier that not all threads reach")

    return run
