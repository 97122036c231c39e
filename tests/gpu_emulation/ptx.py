"""PTX as text -> instructions with their operands.

PTX is NVIDIA's virtual instruction set (PTX ISA manual, https://docs.nvidia.com/cuda/parallel-
thread-execution). Read here is what Triton writes: one entry, its registers, inline assembly in
scopes of its own. An instruction is `@predicate opcode.modifiers operand, operand;`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np


class PtxError(Exception):
    """PTX that is wrong, or that the emulator does not know."""


BITS = {"pred": 1} | {
    kind + str(bits): bits
    for bits in (8, 16, 32, 64)
    for kind in "busf"
    if (kind, bits) != ("f", 8)
}
BITS |= {"bf16": 16, "f16x2": 32, "bf16x2": 32}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def dtype_of(kind: str) -> np.dtype:
    """How values of a PTX type are computed with; b and u are both unsigned."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in FLOATS:
        return np.dtype(FLOATS[kind])
    return np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{BITS[kind]}")


class Instruction(NamedTuple):
    """One statement.

    negated, predicate   `@p` or `@!p`; predicate is None without
    opcode               the part before the first dot
    modifiers            those behind it, types among them
    operands             texts; a vector `{a, b}` is one operand
    text                 the whole statement, for messages
    """

    negated: bool
    predicate: str | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def kind(self) -> str:
        """The type behind the opcode's last dot."""
        return self.modifiers[-1]


class Program(NamedTuple):
    """One kernel."""

    name: str
    parameters: list[tuple[str, str]]  # type and name
    threads: int  # a block
    registers: dict[str, int]  # prefix or whole name -> bits
    instructions: list[Instruction]
    labels: dict[str, int]  # -> index of an instruction

    def bits(self, register: str) -> int:
        """The width of a register."""
        if register in self.registers:
            return self.registers[register]
        return self.registers[register.rstrip("0123456789")]


def vector(operand: str) -> list[str]:
    """The registers of `{a, b}`, or the one that stands alone."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def parse(ptx: str) -> Program:
    """The one kernel of a PTX file.

    Raises:
        PtxError: a statement cannot be read.
    """
    start = ptx.index(".visible .entry")
    opening = ptx.index("\n{", start)
    head = ptx[start:opening]
    body = ptx[opening + 2 : ptx.index("\n}", opening)]
    name = re.match(r"\.visible \.entry\s+(\w+)", head)[1]
    parameters = re.findall(rf"\.param\s+\.(\w+)[^,\n]*?({name}_param_\d+)", head)
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", head)[1])
    program = Program(name, parameters, threads, {}, [], {})
    lines = (line.split("//")[0].strip() for line in body.splitlines())
    text = "\n".join(x for x in lines if not x.startswith((".loc", ".file", ".pragma")))
    scopes: list[dict[str, str]] = []
    scope_count = 0
    # A brace that begins a statement opens a scope; other braces hold a vector.
    for piece in re.findall(r"[{}](?=\s)|[^{};]*(?:\{[^{};]*\}[^{};]*)*;", text):
        statement = piece.strip().rstrip(";").strip()
        if statement == "{":
            scope_count += 1
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        else:
            _add(program, statement, scopes, scope_count)
    return program


def _add(program: Program, statement: str, scopes: list[dict[str, str]], count: int) -> None:
    """Add a statement: a declaration, or labels and an instruction."""
    while label := re.match(r"(\$\w+):\s*", statement):
        program.labels[label[1]] = len(program.instructions)
        statement = statement[label.end() :]
    if not statement:
        return
    if statement.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.S).groups()
        for name in (x.strip() for x in names.split(",")):
            own = name.split("<")[0]
            if scopes:
                # The same name means another register in another scope.
                scopes[-1][own] = f"%scope{count}.{own.lstrip('%')}."
                own = scopes[-1][own]
            program.registers[own] = BITS[kind]
        return
    for scope in reversed(scopes):
        for own, unique in scope.items():
            statement = re.sub(rf"(?<![\w.%$]){re.escape(own)}(?![\w.])", unique, statement)
    program.instructions.append(_instruction(statement))


def _instruction(statement: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w.]+)\s+)?([\w.:]+)\s*(.*)$", statement, re.S)
    if found is None or "." == found[3][0]:
        raise PtxError(f"cannot read: {statement[:200]}")
    opcode, *modifiers = re.split(r"\.|::", found[3])
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
    return Instruction(
        found[1] == "!",
        found[2],
        opcode,
        tuple(modifiers),
        tuple(operand.strip() for operand in operands),
        statement,
    )
