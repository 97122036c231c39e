"""What the compiled code of a launch must be: wide loads, tensor cores, nothing spilled."""

from __future__ import annotations

import re

from driver import Binary, Driver, Launch, tool

TENSOR_CORES = {
    80: r"mma\.sync\.aligned\.m16n8k32\S+\.s8\.s8",
    89: r"mma\.sync\.aligned\.m16n8k32\S+\.s8\.s8",
    90: r"wgmma\.mma_async\S+\.s8\.s8",
}
PRODUCTS = ("gemm", "attention")


def faults(launch: Launch, driver: Driver) -> list[str]:
    """What is wrong with a launch's code.

    That its shared memory fits the device was checked by the launch itself.
    """
    binary = launch.binary
    found = []
    usage = binary.usage
    # The exact division of a row's range is a function: bytes of its call.
    call = 8 if binary.constants.get("TOKEN") else 0
    # ptxas may put two constants of a loop on the stack to stay within 128 or 96 registers, so that
    # more blocks share a multiprocessor. Another tile would cost more.
    kept = 16 if usage["registers"] <= 128 else 0
    if usage["stack"] > max(call, kept):
        found.append(f"spills: {usage['registers']} registers and {usage['stack']} bytes of stack")
    bytewise = binary.count(r"ld\.global(?:\.\w+)*\.[bus]8\b")
    if bytewise:
        found.append(f"{bytewise} loads of single bytes")
    if binary.name in PRODUCTS and not binary.count(TENSOR_CORES[driver.arch]):
        found.append("no int8 products on tensor cores")
    if binary.name == "gemm":
        found += _copy_faults(launch)
    if binary.name == "quantize":
        found += _rounding_faults(binary)
    return [f"{binary.name} {tile_of(binary)}: {fault}" for fault in found]


def _copy_faults(launch: Launch) -> list[str]:
    """Operands are copied to shared memory asynchronously, by 16 bytes where there are as many."""
    copies = re.findall(r"cp\.async\.c[ag]\S*\s[^;]*?, (0x\w+|\d+)[,;]", launch.binary.ptx)
    widths = {int(size, 0) for size in copies}
    sizes = launch.binary.constants
    of_a_thread = [sizes[x] * sizes["BK"] // (32 * launch.warps) for x in ("BM", "BN")]
    wanted = {min(16, size) for size in of_a_thread}
    return [] if widths == wanted else [f"copies of {widths} bytes, expected {wanted}"]


def _rounding_faults(binary: Binary) -> list[str]:
    """Values are rounded by an addition, which must be there as written.

    It must be neither fused with the product before it nor optimized away. Conversions from float
    are slow, and none is needed.
    """
    found = []
    rounded = binary.count(r"add\.f32[^;]*0f4B400000")
    unrounded = binary.count(r"add\.f32[^;]*0fCB400000")
    if not rounded >= unrounded > 0:
        found.append(f"{rounded} additions that round, {unrounded} that take it back")
    conversions = len(re.findall(r"\bF2I\b", tool("-sass", binary.cubin)))
    # The coordinates of a row are divided by way of float.
    if conversions > 4:
        found.append(f"{conversions} conversions from float")
    return found


def tile_of(binary: Binary) -> str:
    """The kernel's sizes, for messages."""
    sizes = {k: v for k, v in binary.constants.items() if k in ("BM", "BN", "BK", "BQ", "BD")}
    return "x".join(str(size) for size in sizes.values())


def row_of(launch: Launch) -> dict:
    """A launch as a row of the table of tiles."""
    binary = launch.binary
    return dict(
        kernel=binary.name,
        tile=tile_of(binary),
        warps=launch.warps,
        blocks=launch.grid[0] * launch.grid[1] * launch.grid[2],
        **binary.usage,
    )
