"""Runs a kernel's PTX on the CPU, with numpy: what a GPU would do, slowly and with every check.

Checked: each access lies in a tensor of the launch or in the block's shared memory, and is aligned;
asynchronous copies are seen only when they were waited for; threads of a block do not part; all
copies end. What nobody has written reads as 0xA5 bytes. The order of blocks is not the GPU's, and
two threads that write the same place are not noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import arithmetic
import numpy as np
import tensor_cores
import torch
import transfers
from blocks import Blocks, Branch, Step, active_of, guard_of, reader
from memory import Memory
from ptx import BITS, Instruction, Program, PtxError, parse

# Blocks that run together; more would not fit the processor's caches.
LANES = 4096

SPECIAL: dict[str, Callable[[Program, Instruction], Step]] = {
    "ld": transfers.load,
    "st": transfers.store,
    "cp": transfers.copy_async,
    "red": transfers.atomic_add,
    "atom": transfers.atomic_add,
    "ldmatrix": transfers.matrices,
    "stmatrix": transfers.matrices,
    "shfl": transfers.shuffle,
    "redux": transfers.reduce_warp,
    "elect": transfers.elect,
    "bar": transfers.nothing,
    "barrier": transfers.nothing,
    "fence": transfers.nothing,
    "membar": transfers.nothing,
    "mma": tensor_cores.mma,
    "wgmma": tensor_cores.wgmma,
}


class Emulated:
    """A kernel that can be launched.

    Args:
        ptx: as Triton's compiler gives it.

    Raises:
        PtxError: an instruction is not known.
    """

    def __init__(self, ptx: str) -> None:
        self.program = parse(ptx)
        self.steps = [self._step(x) for x in self.program.instructions]

    def _step(self, instruction: Instruction) -> Step | Branch | None:
        """What an instruction does; None ends the program."""
        if instruction.opcode in ("ret", "exit"):
            if instruction.predicate is not None:
                raise PtxError("a conditional end is not emulated")
            return None
        if instruction.opcode == "bra":
            target = self.program.labels[instruction.operands[0]]
            guard = guard_of(self.program, instruction)
            return Branch(guard, instruction.negated, target, instruction.text)
        if instruction.opcode in SPECIAL:
            return SPECIAL[instruction.opcode](self.program, instruction)
        if instruction.opcode == "mov" and "{" in instruction.text:
            return transfers.repack(self.program, instruction)
        return self._computed(instruction)

    def _computed(self, instruction: Instruction) -> Step:
        function, kinds, _ = arithmetic.operation(instruction)
        target, *operands = instruction.operands
        readers = [reader(self.program, x, k) for x, k in zip(operands, kinds, strict=True)]
        guard = guard_of(self.program, instruction)
        negated = instruction.negated

        def run(blocks: Blocks) -> None:
            active = active_of(blocks, guard, negated)
            blocks.write(target, function(*(blocks.read(x) for x in readers)), active)

        return run

    def launch(
        self, grid: Sequence[int], shared: int, arguments: Sequence[tuple[str, object]]
    ) -> None:
        """Run all blocks.

        Args:
            grid: blocks along x, y, z.
            shared: bytes of shared memory a block.
            arguments: names and values of the parameters; tensors are of the CPU.

        Raises:
            PtxError: the kernel does what it must not.
        """
        memory = Memory()
        values = {}
        # Behind the kernel's own parameters stand pointers to scratch memory that it does not use.
        filled = [*arguments, *[("scratch", 0)] * (len(self.program.parameters) - len(arguments))]
        for (kind, parameter), (name, value) in zip(self.program.parameters, filled, strict=True):
            if isinstance(value, torch.Tensor):
                memory.add(name, value)
                value = value.data_ptr()
            elif kind == "f32":
                value = int(np.float32(value).view(np.uint32))
            values[parameter] = int(value) & (1 << BITS[kind]) - 1
        places = np.array(list(itertools.product(*(range(n) for n in grid[::-1]))))[:, ::-1]
        together = max(1, LANES // self.program.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(places), together):
                at = places[first : first + together]
                Blocks(self.program, values, memory, shared, at, grid).run(self.steps)
