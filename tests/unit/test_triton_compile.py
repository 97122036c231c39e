"""The Triton kernels' machine code for NVIDIA GPUs, compiled on a machine without one.

It has the right tensor-core instructions and wide loads, and nothing is spilled. In a process of
its own: the kernels must be imported without the interpreter.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "questlib/integer/triton"
MMA = {
    80: (r"mma\.sync\.aligned\.\S+\.s8\.s8", "IMMA"),
    89: (r"mma\.sync\.aligned\.\S+\.s8\.s8", "IMMA"),
    90: (r"wgmma\.mma_async\S+\.s8\.s8", "IGMMA"),
}
# packed, point, bm, bn, bk, warps, stages, extra constants: from tiles.CANDIDATES
CASES = [
    (True, True, 128, 128, 64, 8, 4, {}),
    (True, False, 128, 256, 64, 8, 3, {}),
    (True, False, 128, 128, 64, 8, 4, dict(SHIFTED=True)),
    (False, False, 128, 128, 128, 8, 3, {}),
    (False, True, 64, 64, 64, 4, 4, dict(ATOMIC=True)),
]


def compile_all(arch: int) -> dict[str, dict]:
    """Runs in the subprocess: {case: what the compiler made of it}."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def load(name):  # the file alone: quick
        spec = importlib.util.spec_from_file_location(
            f"questlib.integer.triton.{name}", KERNELS / f"{name}.py"
        )
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    packages = ("questlib", "questlib.integer", "questlib.integer.triton")
    sys.modules |= {name: types.ModuleType(name) for name in packages}
    quantize_kernels = load("quantize_kernels")
    gemm_kernels = load("gemm_kernels")
    attention_kernels = load("attention_kernels")

    def build(kernel, constants, dtypes, warps, stages):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else dtypes.get(n, "i32") for n in names}
        aligned = [
            n
            for n in names
            if n in ("N", "span", "padded", "stride_x", "stride", "keys_padded", "dim")
            or signature[n].startswith("*")
        ]
        source = ASTSource(
            kernel,
            signature,
            constants,
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants},
        )
        made = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options=dict(num_warps=warps, num_stages=stages),
        )
        return made.asm["ptx"], made.asm["cubin"], made.metadata.shared

    def report(ptx, cubin, shared):
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(cubin)
            f.flush()
            sass, usage = (
                subprocess.run(
                    [tool, flag, f.name], capture_output=True, text=True, check=True
                ).stdout
                for flag in ("-sass", "-res-usage")
            )
        mma, opcode = MMA[arch]
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.M)
        return dict(
            registers=int(re.search(r"REG:(\d+)", usage)[1]),
            stack=int(re.search(r"STACK:(\d+)", usage)[1]),
            shared=shared,
            spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            ptx_mma=len(re.findall(mma, ptx)),
            sass_mma=sum(opcode in line for line in lines),
            wide_copies=sum("LDGSTS" in line and "128" in line for line in lines),
            narrow_copies=sum("LDGSTS" in line and "128" not in line for line in lines),
            rounded=len(re.findall(r"add\.f32[^;]*0f4B400000", ptx)),
            unrounded=len(re.findall(r"add\.f32[^;]*0fCB400000", ptx)),
            conversions=sum(line.split()[0].startswith("F2I") for line in lines),
            instructions=len(lines),
        )

    found = {}
    float_tables = dict(
        SCALE="*fp32",
        ROW_SCALE="*fp32",
        BIAS="*fp32",
        RESIDUAL="*fp32",
        CORRECTION="*i32",
        COMPENSATION="*i32",
        SUMS="*i32",
    )
    for packed, point, bm, bn, bk, warps, stages, extra in CASES:
        constants = (
            dict(
                POINT=point,
                PACKED=packed,
                SHIFTED=False,
                ASM=True,
                RAW=False,
                HAS_ROW=point,
                HAS_BIAS=True,
                HAS_RESIDUAL=False,
                HAS_CORRECTION=True,
                HAS_COMPENSATION=packed,
                BM=bm,
                BN=bn,
                BK=bk,
                ATOMIC=False,
                GROUP=8,
            )
            | extra
        )
        dtypes = dict(
            A="*i8",
            W="*u8" if packed else "*i8",
            OUT="*i32" if constants["ATOMIC"] else "*fp16",
            **float_tables,
        )
        name = f"gemm packed={packed} point={point} {bm}x{bn}x{bk} {extra}"
        found[name] = report(*build(gemm_kernels.gemm, constants, dtypes, warps, stages))
    for sums, ordered, token in (
        (True, False, False),
        (True, True, False),
        (False, False, False),
        (True, False, True),
    ):
        block, columns = (8, 256) if sums else (32, 64)
        constants = dict(
            UNIFORM=not sums,
            ORDERED=ordered,
            HAS_SUMS=sums,
            NORM=False,
            SILU=False,
            TOKEN=token,
            MIDDLE=False,
            BR=block,
            BC=columns,
        )
        dtypes = dict(X="*fp16", ORDER="*i32", OUT="*i8", SUMS="*i32", FLAG="*i32", levels="fp32")
        dtypes |= dict.fromkeys(("TABLE", "NORM_SCALE", "NORM_SHIFT", "CLIP", "SCALES"), "*fp32")
        found[f"quantize sums={sums} ordered={ordered} token={token}"] = report(
            *build(quantize_kernels.quantize, constants, dtypes, 4, 2)
        )
    # of 8 bits, with every correction, and of 4 bits
    for codes, dim in ((8, 64), (4, 128)):
        wide = codes == 8
        constants = dict(
            HAS_Q=wide,
            HAS_V=wide,
            P_CONSTANT=128 * wide,
            EVEN=wide,
            ASM=True,
            BQ=64 if dim > 64 else 128,
            BK=64,
            BD=dim,
        )
        dtypes = dict.fromkeys(("Q", "K", "VT"), "*i8") | dict.fromkeys(
            ("KEY_SUM", "V_SUM"), "*i32"
        )
        dtypes |= dict(OUT="*fp16", V_SCALE="*fp32", factor="fp32", p_inverse="fp32", p_high="fp32")
        found[f"attention A{codes} {dim}"] = report(
            *build(attention_kernels.attention, constants, dtypes, 8 if dim <= 64 else 4, 3)
        )
    return found


@pytest.mark.parametrize("arch", MMA)
def test_machine_code(arch, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    run = subprocess.run(
        [sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == len(CASES) + 6
    for case, r in found.items():
        # The exact division of a row's range is a function: bytes of its call.
        call = 8 if "token=True" in case else 0
        assert r["stack"] <= call and r["spills"] <= call / 4 and r["registers"] <= 255, (case, r)
        if case.startswith("gemm"):
            assert r["ptx_mma"] > 0 and r["sass_mma"] > 0, (case, r)
            assert r["wide_copies"] > 0 and r["narrow_copies"] == 0, (case, r)
            most = (100 if arch == 89 else 164) * 1024
            assert r["shared"] <= most or "128x128x128" in case, (case, r)
        elif case.startswith("attention"):
            assert r["ptx_mma"] > 0 and r["sass_mma"] > 0, (case, r)
        else:
            # Only the row's coordinates. Values are rounded by an addition, which must be neither
            # fused with the product before it nor optimized away.
            assert r["conversions"] <= 4, (case, r)
            assert r["rounded"] >= r["unrounded"] > 0, (case, r)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
