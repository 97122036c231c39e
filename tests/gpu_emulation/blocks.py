"""Blocks of threads that run a program in step, as vectors of numpy.

All threads of all blocks of a launch take each instruction together. Blocks that take different
branches part there, and go on one group after the other; threads of one block must take the same
branch, as they do in Triton's code. Shared memory is each block's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from memory import Memory, Window
from ptx import BITS, FLOATS, Instruction, Program, PtxError, dtype_of

WARP = 32
# What lies in registers and shared memory that nobody has written.
POISON = 0xA5


class Reader(NamedTuple):
    """An operand that is read: a register, or a value that is known beforehand."""

    register: str | None
    value: np.ndarray | None
    dtype: np.dtype
    narrow: bool  # the register is wider than what is read of it


class Copy(NamedTuple):
    """An asynchronous copy from global to shared memory, on its way."""

    active: np.ndarray
    target: np.ndarray
    source: np.ndarray
    size: np.ndarray  # bytes that are copied; the others are filled with zeros
    total: int


Step = Callable[["Blocks"], None]


class Blocks:
    """Blocks at one place of the program.

    Attributes:
        program: what they run.
        memory: the tensors.
        count: number of blocks.
        lanes: number of threads, all blocks together.
        registers: register -> its value in each lane, unsigned or bool.
        special: %tid.x and the like.
        shared: uint8 [count * size], one block behind the other.
        shared_base: int64 [lanes]: where a lane's block begins there.
        all: bool [lanes], all True.
    """

    def __init__(
        self,
        program: Program,
        parameters: dict[str, int],
        memory: Memory,
        shared: int,
        at: np.ndarray,
        grid: Sequence[int],
    ) -> None:
        """at: int [count, 3], the places of the blocks in the grid."""
        self.program = program
        self.parameters = parameters
        self.memory = memory
        self.size = -(-shared // 16) * 16
        self.grid = grid
        self.at = at
        self.pc = 0
        self.registers: dict[str, np.ndarray] = {}
        self.shared = np.full(len(at) * self.size, POISON, np.uint8)
        self.begun: list[Copy] = []
        self.groups: list[list[Copy]] = []
        self._place()

    def _place(self) -> None:
        """What follows from the blocks' places."""
        threads = self.program.threads
        self.count = len(self.at)
        self.lanes = self.count * threads
        self.all = np.ones(self.lanes, bool)
        self.shared_base = np.repeat(np.arange(self.count, dtype=np.int64) * self.size, threads)
        self.window = Window(self.shared, "shared memory")
        tid = np.tile(np.arange(threads, dtype=np.uint32), self.count)
        self.special = {"%tid.x": tid, "%laneid": tid % WARP, "%ntid.x": self.filled(threads)}
        for axis, letter in enumerate("xyz"):
            self.special[f"%ctaid.{letter}"] = np.repeat(
                self.at[:, axis].astype(np.uint32), threads
            )
            self.special[f"%nctaid.{letter}"] = self.filled(self.grid[axis])
            if axis:
                self.special[f"%tid.{letter}"] = self.filled(0)
                self.special[f"%ntid.{letter}"] = self.filled(1)

    def filled(self, value: int) -> np.ndarray:
        """uint32 [lanes]"""
        return np.full(self.lanes, value, np.uint32)

    def parted(self, own: np.ndarray) -> Blocks:
        """Those of the blocks that `own` [count] says, as a group of their own."""
        lanes = np.repeat(own, self.program.threads)
        part = copy.copy(self)
        part.at = self.at[own]
        part.registers = {name: value[lanes] for name, value in self.registers.items()}
        part.shared = self.shared.reshape(self.count, -1)[own].reshape(-1)
        part.begun = _parted_copies(self.begun, lanes)
        part.groups = [_parted_copies(group, lanes) for group in self.groups]
        part._place()
        return part

    # ---- operands ----

    def read(self, reader: Reader) -> np.ndarray:
        """[lanes], or a scalar."""
        if reader.register is None:
            return reader.value
        value = self.registers.get(reader.register)
        if value is None:
            value = self.special.get(reader.register)
            if value is None:
                value = self._unwritten(reader.register)
        if reader.narrow:
            value = value.astype(f"u{reader.dtype.itemsize}")
        return value.view(reader.dtype)

    def _unwritten(self, register: str) -> np.ndarray:
        bits = self.program.bits(register)
        if bits == 1:
            value = np.zeros(self.lanes, bool)
        else:
            value = np.frombuffer(bytes([POISON]) * (bits // 8) * self.lanes, f"u{bits // 8}")
        self.registers[register] = value
        return value

    def write(self, register: str, value: np.ndarray, active: np.ndarray | None) -> None:
        """Write a register in the active lanes (None: in all).

        A value that is narrower than the register is extended, by its sign when it is signed.
        """
        if register == "_":
            return
        bits = self.program.bits(register)
        if bits > 1:
            if value.dtype.itemsize * 8 != bits:
                value = value.astype(f"{value.dtype.kind}{bits // 8}")
            value = value.view(f"u{bits // 8}")
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,))
        if active is not None:
            old = self.registers.get(register)
            value = np.where(active, value, self._unwritten(register) if old is None else old)
        self.registers[register] = value

    # ---- the program ----

    def run(self, steps: Sequence[Step | Branch | None]) -> None:
        """Run to the end; steps: the program's instructions as `compiled` gives them."""
        groups = [self]
        while groups:
            blocks = groups.pop()
            while (step := steps[blocks.pc]) is not None:
                if isinstance(step, Branch):
                    blocks.branch(step, groups)
                    continue
                try:
                    step(blocks)
                except (PtxError, ValueError, IndexError) as error:
                    text = blocks.program.instructions[blocks.pc].text
                    raise PtxError(f"{blocks.program.name}: {error}, in: {text[:200]}") from error
                blocks.pc += 1
            if blocks.begun or any(blocks.groups):
                raise PtxError(f"{blocks.program.name}: ends before its copies were waited for")

    def branch(self, branch: Branch, groups: list[Blocks]) -> None:
        """Go on at the branch's target or behind it; other blocks go to `groups`."""
        taken = np.ones(self.count, bool)
        if branch.predicate is not None:
            value = self.read(branch.predicate).reshape(self.count, -1) ^ branch.negated
            taken = value[:, 0]
            if (value != taken[:, None]).any():
                raise PtxError(f"{self.program.name}: threads of one block part at {branch.text}")
        if not taken.any():
            self.pc += 1
            return
        if not taken.all():
            other = self.parted(~taken)
            other.pc += 1
            groups.append(other)
            kept = self.parted(taken)
            self.__dict__.update(kept.__dict__)
        self.pc = branch.target


class Branch(NamedTuple):
    """A jump."""

    predicate: Reader | None
    negated: bool
    target: int
    text: str


def _parted_copies(copies: list[Copy], lanes: np.ndarray) -> list[Copy]:
    return [Copy(*(x[lanes] for x in one[:4]), one.total) for one in copies]


def reader(program: Program, operand: str, kind: str) -> Reader:
    """An operand of a PTX type: register, number, or a symbol of shared memory (at 0)."""
    dtype = dtype_of(kind)
    if operand.startswith("%"):
        if operand.startswith(("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid")):
            return Reader(operand, None, dtype, BITS[kind] < 32)
        bits = program.bits(operand)
        if bits < BITS[kind]:
            raise PtxError(f"{operand} has {bits} bits, read as {kind}")
        return Reader(operand, None, dtype, 1 < BITS[kind] < bits)
    if operand.startswith(("0f", "0F")):
        value = np.uint32(int(operand[2:], 16)).view(np.float32)
    elif kind == "pred":
        value = np.bool_(int(operand, 0))
    elif operand == "global_smem":
        value = np.zeros((), dtype)[()]
    elif kind in FLOATS:
        raise PtxError(f"{operand} is no number of type {kind}")
    else:
        bits = BITS[kind]
        raw = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
        value = np.array(raw, f"u{bits // 8}").view(dtype)[()]
    if kind not in ("pred", *FLOATS) and value.dtype != dtype:
        value = value.view(dtype)
    return Reader(None, value, dtype, False)


def active_of(blocks: Blocks, guard: Reader | None, negated: bool) -> np.ndarray | None:
    """The lanes in which an instruction runs; None: all."""
    return None if guard is None else blocks.read(guard) ^ negated


def guard_of(program: Program, instruction: Instruction) -> Reader | None:
    """The instruction's predicate."""
    if instruction.predicate is None:
        return None
    return reader(program, instruction.predicate, "pred")
