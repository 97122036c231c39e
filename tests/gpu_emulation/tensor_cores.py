"""Matrix products of int8: mma.sync (sm_80 and later) and wgmma (sm_90).

Layouts: PTX ISA manual, "Matrix Fragments for mma.m16n8k32" and "Asynchronous Warpgroup Level
Matrix Multiply-Accumulate". Sums of 32 products are exact in float32, in which numpy is fast.
"""

from __future__ import annotations

import re

import numpy as np
from blocks import Blocks, Reader, Step, reader
from ptx import Instruction, Program, PtxError, vector

GROUP = 128  # threads of a warpgroup


def _words(blocks: Blocks, readers: list[Reader]) -> np.ndarray:
    """Registers of four int8 -> int8 [registers, warps, 8, 4, 4], lane 4 g + q of each warp."""
    lanes = (blocks.lanes,)
    words = np.stack([np.broadcast_to(blocks.read(x), lanes) for x in readers])
    return words.view(np.int8).reshape(len(readers), -1, 8, 4, 4)


def _left(blocks: Blocks, readers: list[Reader]) -> np.ndarray:
    """The left operand's fragments, 4 registers -> float32 [warps, 16, 32]."""
    words = _words(blocks, readers).reshape(2, 2, -1, 8, 4, 4)
    # column half, row half, warp, row, column, byte
    return words.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 32).astype(np.float32)


def mma(program: Program, instruction: Instruction) -> Step:
    """mma.sync.m16n8k32 s8: D [16, 8] = A [16, 32] B [32, 8] + C, of each warp"""
    if "m16n8k32" not in instruction.modifiers or instruction.modifiers[-4:] != (
        "s32",
        "s8",
        "s8",
        "s32",
    ):
        raise PtxError("only m16n8k32 of int8 is emulated")
    targets = vector(instruction.operands[0])
    a, b = (
        [reader(program, x, "b32") for x in vector(operand)]
        for operand in instruction.operands[1:3]
    )
    c = [reader(program, x, "s32") for x in vector(instruction.operands[3])]

    def run(blocks: Blocks) -> None:
        # register, warp, column, row, byte -> warp, column, 32 rows
        right = _words(blocks, b).transpose(1, 2, 0, 3, 4).reshape(-1, 8, 32)
        product = _left(blocks, a) @ right.astype(np.float32).transpose(0, 2, 1)
        product = product.reshape(-1, 2, 8, 4, 2).astype(np.int32)  # warp, half, row, column, 2
        parts = product.transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for target, part, own in zip(targets, parts, c, strict=True):
            blocks.write(target, part + blocks.read(own), None)

    return run


def wgmma(program: Program, instruction: Instruction) -> Step:
    """wgmma.mma_async s8: D [64, n] (+)= A [64, 32] B [n, 32]^T, of each group of four warps

    A comes from registers or, as B does, from shared memory by a descriptor. It is done at once.
    """
    if instruction.modifiers[0] in ("fence", "commit_group", "wait_group"):
        return lambda blocks: None
    if instruction.modifiers[-3:] != ("s32", "s8", "s8"):
        raise PtxError("only products of int8 are emulated")
    shape = next(x for x in instruction.modifiers if re.match(r"m64n\d+k32$", x))
    n = int(shape[4:-3])
    targets = vector(instruction.operands[0])
    sums = [reader(program, x, "s32") for x in targets]
    left, right, keep = instruction.operands[1:4]
    descriptor = reader(program, right, "b64")
    keeps = reader(program, keep, "pred")
    a: list[Reader] | Reader
    if left.startswith("{"):
        a = [reader(program, x, "b32") for x in vector(left)]
    else:
        a = reader(program, left, "b64")

    def run(blocks: Blocks) -> None:
        if isinstance(a, list):
            rows = _left(blocks, a).reshape(-1, 64, 32)
        else:
            rows = _described(blocks, a, 64)
        product = rows @ _described(blocks, descriptor, n).transpose(0, 2, 1)
        # group, warp, half of its rows, row, eight columns, column, 2
        product = product.reshape(-1, 4, 2, 8, n // 8, 4, 2).astype(np.int32)
        parts = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        kept = blocks.read(keeps)
        for target, part, own in zip(targets, parts, sums, strict=True):
            old = blocks.read(own) if kept.all() else np.where(kept, blocks.read(own), 0)
            blocks.write(target, part + old, None)

    return run


def _described(blocks: Blocks, source: Reader, rows: int) -> np.ndarray:
    """A matrix [groups, rows, 32] in shared memory that a descriptor tells; as float32.

    PTX ISA manual, "Matrix Descriptor Format": start, strides between pieces of 8 rows, swizzle.
    """
    of_lane = np.broadcast_to(blocks.read(source), (blocks.lanes,)).reshape(-1, GROUP)
    of = of_lane[:, 0].astype(np.int64)
    if (of_lane != of_lane[:, :1]).any():
        raise PtxError("the descriptors of one warpgroup differ")
    mode = int(of[0]) >> 62 & 3
    if (of >> 62 & 3 != mode).any() or (of >> 49 & 7).any():
        raise PtxError("descriptors with offsets or of several kinds are not emulated")

    def field(at: int) -> np.ndarray:
        return (of >> at & 0x3FFF)[:, None, None] << 4

    row = np.arange(rows)[:, None]
    half = np.arange(2)[None]  # 16 bytes each
    start = field(0) + row // 8 * field(32)
    if mode == 0:
        at = start + row % 8 * 16 + half * field(16)
    else:
        at = start + row % 8 * (256 >> mode) + half * 16
        # Swizzle: 16-byte places are exchanged by the address's higher bits.
        at = at ^ ((at >> 7 & (16 >> mode) - 1) << 4)
    if at.max() + 16 > blocks.size:
        raise PtxError("a descriptor beyond shared memory")
    base = blocks.shared_base[::GROUP][:, None, None]
    found = blocks.window.load((at + base).reshape(-1), 16)
    return found.view(np.int8).reshape(-1, rows, 32).astype(np.float32)
