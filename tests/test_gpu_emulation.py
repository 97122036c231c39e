"""The Triton kernels as compiled for NVIDIA GPUs, executed on the CPU (`gpu_emulation/`).

Results are the int64 oracle's. The launches are those that the engine makes, with Triton's own
specializations; the machine code has int8 tensor-core instructions and wide loads, and nothing is
spilled. In processes of their own: the kernels must be imported without the interpreter.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "gpu_emulation"
sys.path.insert(0, str(FOLDER))
from emulator import Emulated  # noqa: E402
from jobs import FORMATS, jobs_of  # noqa: E402
from ptx import PtxError  # noqa: E402

from questlib.integer.triton.tile_table import table_of  # noqa: E402
from questlib.integer.triton.tiles import Gpu, serves  # noqa: E402

ARCHITECTURES = (80, 89, 90)


def emulate(arch: int, *choice: str, cache: Path, program: str = "worker.py") -> list[dict]:
    """The rows that a program prints."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(cache)
    }
    run = subprocess.run(
        [sys.executable, FOLDER / program, str(arch), *choice],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    wrong = [f"{row['job']}: {fault}" for row in rows for fault in row["wrong"]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel(arch, tmp_path):
    rows = emulate(arch, "quick", cache=tmp_path)
    check(rows)
    kernels = {kernel["kernel"] for row in rows for kernel in row["kernels"]}
    assert kernels == {
        "gemm",
        "quantize",
        "quantize_rows",
        "moments",
        "group_affine",
        "attention",
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_that_do_not_fit_are_refused(arch, tmp_path):
    """Whoever adds a tile to tiles.json is told by the checks that the slow jobs make."""
    rows = emulate(arch, "refused", cache=tmp_path)
    registers, shared = ("\n".join(row["wrong"]) for row in rows)
    assert "bytes of stack" in registers and "spills" in registers
    assert "out of resource: shared memory" in shared


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", FORMATS)
def test_slow_jobs_take_every_tile_that_can_be_chosen(arch, kind):
    """Whole and split, of layers whose outputs are a multiple of 16 and of others."""
    pytest.importorskip("triton")
    from driver import DEVICES

    packed = kind != "int8"
    gpu = Gpu(DEVICES[arch].processors, DEVICES[arch].shared, table_of(divmod(arch, 10)))
    jobs = jobs_of(kind, gpu)
    for outputs, window in itertools.product((144, 140), ("Linear", "Conv2d")):
        longest = 64 if kind == "shifted" else 128
        wanted = {
            c
            for c in (c._replace(split=n) for c in gpu.table.tiles for n in (1, 2))
            if c.bk <= longest and serves(c, outputs, packed, gpu)
        }
        names = [job for job in jobs if f"{window} ({outputs}" in job.name]
        assert wanted and {job.tile for job in names} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["packed", "shifted", "int8", "shapes"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_and_shape(arch, choice, tmp_path):
    check(emulate(arch, choice, cache=tmp_path))


def test_kernels_of_a_unet_are_compiled_beforehand(tmp_path):
    """In two shares, which have nothing in common; a step needs no others."""
    (found,) = emulate(90, cache=tmp_path, program="shared_compilation.py")
    assert found["late"] == 0 and sum(found["shares"]) >= found["kernels"] > 20
    assert min(found["shares"]) > 0.4 * sum(found["shares"])
    assert found["tuned"] > 2 * found["estimated"] and found["both"] == found["estimated"]


# ---- the emulator itself ----

HEAD = """
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u32 k_param_1
)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b32 %r1, [k_param_1];
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
"""


def run(body: str, out: torch.Tensor, number: int = 0, grid=(1, 1, 1)) -> torch.Tensor:
    """Run a kernel of one warp; %rd3 is the address of a lane's own int32 of out."""
    kernel = Emulated(f"{HEAD}{body}\n\tret;\n}}\n")
    kernel.launch(grid, 1024, [("out", out), ("number", number)])
    return out


def ints(n: int = 32) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32)


def test_lanes_predicates_and_loops():
    body = """
    mov.b32 %r3, 0;
$again:
    add.s32 %r3, %r3, %r2;
    add.s32 %r1, %r1, -1;
    setp.gt.s32 %p1, %r1, 0;
    @%p1 bra $again;
    setp.lt.s32 %p2, %r2, 7;
    @!%p2 st.global.b32 [%rd3], %r3;"""
    found = run(body, -ints(), 3)
    assert torch.equal(found, torch.where(ints() < 7, -ints(), 3 * ints()))


def test_blocks_may_part_and_threads_of_a_block_may_not():
    parting = """
    mov.u32 %r3, %ctaid.x;
    setp.eq.s32 %p1, %r3, 1;
    @%p1 bra $end;
    atom.global.add.s32 %r4, [%rd3], 1;
$end:"""
    assert torch.equal(
        run(parting, torch.zeros(32, dtype=torch.int32), grid=(3, 1, 1)), ints() * 0 + 2
    )
    # What a lane finds: the lanes before it have added.
    body = """
    atom.global.gpu.acq_rel.add.u32 %r4, [%rd1+8], 1;
    st.global.b32 [%rd3], %r4;"""
    assert torch.equal(run(body, ints()), ints() + 2)
    with pytest.raises(PtxError, match="threads of one block part"):
        run(parting.replace("%ctaid", "%tid"), ints())


@pytest.mark.parametrize(
    ("access", "says"),
    [
        ("ld.global.b32 %r3, [%rd3+4];", "outside of out of 128 bytes"),
        ("ld.global.b32 %r3, [%rd3+-2];", "misaligned"),
        ("st.shared.b32 [%r2+1024], %r2;", "misaligned"),
        ("st.shared.b8 [%r2+1000], %r2;", "beyond shared memory"),
        ("frob.b32 %r3, %r2;", "unknown instruction: frob"),
        ("cp.async.ca.shared.global [%r2], [%rd3], 4; cp.async.commit_group;", "waited for"),
    ],
)
def test_what_a_kernel_must_not_do(access, says):
    with pytest.raises(PtxError, match=says):
        run(access, ints())


def test_copies_arrive_when_they_are_waited_for():
    body = """
    shl.b32 %r3, %r2, 2;
    cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
    ld.shared.b32 %r4, [%r3];
    cp.async.wait_group 0x0;
    ld.shared.b32 %r5, [%r3];
    sub.s32 %r6, %r5, %r4;
    st.global.b32 [%rd3], %r6;"""
    unwritten = int(np.uint32(0xA5A5A5A5).view(np.int32))
    assert torch.equal(run(body, ints()).long(), (ints().long() - unwritten) % 2**32)


def test_a_product_on_tensor_cores():
    """A [16, 32] from a lane's own registers, B [32, 8] likewise, as the PTX manual lays them."""
    loads = "\n".join(f"    ld.global.b32 %r{10 + i}, [%rd3+{128 * i}];" for i in range(6))
    body = f"""{loads}
    mov.b32 %r20, 5;
    mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32
      {{ %r30, %r31, %r32, %r33 }}, {{ %r10, %r11, %r12, %r13 }}, {{ %r14, %r15 }},
      {{ %r20, %r20, %r20, %r20 }};
""" + "\n".join(f"    st.global.b32 [%rd3+{128 * i}], %r{30 + i};" for i in range(4))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-128, 128, (6, 32, 4), generator=generator).to(torch.int8)
    a, b = torch.zeros(16, 32, dtype=torch.int64), torch.zeros(32, 8, dtype=torch.int64)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 4
        for byte in range(4):
            for i in range(4):
                a[row + i % 2 * 8, column + byte + i // 2 * 16] = words[i, lane, byte]
            for i in range(2):
                b[column + byte + i * 16, row] = words[4 + i, lane, byte]
    found = run(body, words.view(torch.int32).reshape(6, 32).clone())
    expected = a @ b + 5
    for lane in range(32):
        for i in range(4):
            assert found[i, lane] == expected[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2]
