"""A driver for Triton that has no GPU.

Kernels are compiled for a real GPU with the specializations of the real launch; tensors are of the
CPU. Each launch is recorded, and run by the emulator when that is wanted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from emulator import Emulated
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Device(NamedTuple):
    """What a GPU has. CUDA C++ Programming Guide, "Compute Capabilities"."""

    shared: int  # bytes that a block can have
    processors: int


DEVICES = {
    80: Device(163 * 1024, 108),  # A100
    89: Device(99 * 1024, 128),  # RTX 4090
    90: Device(227 * 1024, 132),  # H100, H200
}


class Binary:
    """One compiled kernel."""

    def __init__(self, name: str, ptx: str, cubin: bytes, shared: int, constants: dict) -> None:
        self.name = name
        self.ptx = ptx
        self.cubin = cubin
        self.shared = shared
        self.constants = constants  # the kernel's constexpr arguments by name
        self._emulated: dict[str, Emulated] = {}
        self._usage: dict[str, int] | None = None

    def emulated(self, alter: Callable[[str], str]) -> Emulated:
        """The kernel as the emulator runs it, with its PTX altered."""
        ptx = alter(self.ptx)
        if ptx not in self._emulated:
            self._emulated[ptx] = Emulated(ptx)
        return self._emulated[ptx]

    @property
    def usage(self) -> dict[str, int]:
        """registers and stack (bytes) of a thread; shared bytes of a block"""
        if self._usage is None:
            text = tool("-res-usage", self.cubin)
            found = {x: int(re.search(rf"{x}:(\d+)", text)[1]) for x in ("REG", "STACK")}
            self._usage = dict(registers=found["REG"], stack=found["STACK"], shared=self.shared)
        return self._usage

    def count(self, pattern: str) -> int:
        """How often a pattern stands in the PTX."""
        return len(re.findall(pattern, self.ptx))


def tool(flag: str, cubin: bytes) -> str:
    """What cuobjdump, which comes with Triton, tells of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Launch(NamedTuple):
    """One launch that was made."""

    binary: Binary
    grid: tuple[int, int, int]
    warps: int
    arguments: dict[str, Any]  # all of the kernel's arguments


class Driver:
    """In place of triton's CudaDriver.

    Attributes:
        launches: those since they were last cleared.
        emulated: the kernel that runs; None: all.
        alter: changes the PTX that runs, to see whether that is noticed.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.device = DEVICES[arch]
        self.utils = self
        self.launches: list[Launch] = []
        self.binaries: dict[str, Binary] = {}
        self.emulated: str | None = None
        self.alter: Callable[[str], str] = str
        triton.runtime.driver.set_active(self)

    # ---- what triton asks for: device ----

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return dict(
            max_shared_mem=self.device.shared,
            multiprocessor_count=self.device.processors,
            max_num_regs=65536,
            warpSize=32,
        )

    # ---- what triton asks for: kernels ----

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, most threads)"""
        return len(self.binaries), len(self.binaries), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel."""
        names = source.fn.arg_names
        constants = {key[0] if isinstance(key, tuple) else key for key in source.constants}

        def launch(x, y, z, stream, function, packed, meta, enter, leave, *values) -> None:
            binary = self.binaries.get(metadata.hash)
            if binary is None:
                of = {
                    names[key[0] if isinstance(key, tuple) else key]: value
                    for key, value in source.constants.items()
                }
                asm = _compiled(source.fn, metadata.hash)
                binary = Binary(metadata.name, asm["ptx"], asm["cubin"], metadata.shared, of)
                self.binaries[metadata.hash] = binary
            if not (x < 2**31 and y < 2**16 and z < 2**16):
                raise ValueError(f"{metadata.name}: the grid {x, y, z} is too large")
            arguments = dict(zip(names, values, strict=True))
            self.launches.append(Launch(binary, (x, y, z), metadata.num_warps, arguments))
            if self.emulated in (None, metadata.name):
                passed = [(n, values[i]) for i, n in enumerate(names) if i not in constants]
                binary.emulated(self.alter).launch((x, y, z), metadata.shared, passed)

        return launch


def _compiled(function: Any, key: str) -> dict[str, Any]:
    """The code of a kernel that was just compiled."""
    for caches in function.device_caches.values():
        for kernel in caches[0].values():
            if getattr(kernel, "hash", None) == key:
                return kernel.asm
    raise KeyError(key)


def engine_on(arch: int) -> tuple[Driver, SimpleNamespace]:
    """The Triton engine on a GPU that is not there.

    Returns:
        The driver, and the engine's parts by name. `parts.use(tile)` puts one tile in force.
    """
    driver = Driver(arch)
    from questlib.integer.attention_form import attention_form
    from questlib.integer.form import integer_form
    from questlib.integer.oracle import layer_forward
    from questlib.integer.triton import attention, layers, quantizing, runtime, tiles, together

    assert not runtime.INTERPRET
    # The tensors are of the CPU.
    for module in (layers, attention, together):
        module.check_input = lambda *_: None
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        multi_processor_count=driver.device.processors,
        shared_memory_per_block_optin=driver.device.shared,
        major=arch // 10,
        minor=arch % 10,
    )

    def use(tile: Any) -> None:
        tiles.CACHE.choose = lambda key, candidates, run: tile or candidates()[0]

    use(None)
    return driver, SimpleNamespace(
        TritonAttention=attention.TritonAttention,
        Codes=layers.Codes,
        TritonLayer=layers.TritonLayer,
        attention_form=attention_form,
        can_share=together.can_share,
        driver=driver,
        group_norm_affine=quantizing.group_norm_affine,
        integer_form=integer_form,
        layer_forward=layer_forward,
        quantized_together=together.quantized_together,
        gpu=tiles.Gpu.of(torch.device("cpu")),
        use=use,
    )
