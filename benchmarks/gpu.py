"""The Triton engine on an NVIDIA GPU: is it right, and how fast is it?

    python benchmarks/gpu.py                    # about 9 minutes on an H200
    python benchmarks/gpu.py --budget 200 --sections correctness,peaks,layers
    python benchmarks/gpu.py --interpret        # no GPU: correctness in Triton's interpreter

A sample of correctness comes first (a minute), then the headline: a step of SD v1.4's UNet, first
with tiles by estimate, and with tuned ones when there is time. Then all of correctness, peaks,
layers, attention and blocks. The result, benchmarks/results/gpu.json, is written after each row. An
exception in a section is part of it, and the next section runs. Exit code 3 when a kernel is wrong,
1 when a section failed. Needs torch with CUDA, triton and pydantic; without diffusers all but the
UNet runs.

Every time is the median of CUDA-graph replays between events, the L2 cache flushed before each,
contenders in the order A B .. B A. `fraction` is the floor (the larger of operations / measured
peak and bytes / measured bandwidth) over the time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from common import RESULTS, parser_of, write_json
from gpu_check import attention_error, check, jobs
from gpu_measure import Timer, attention_row, block_row, compile_layers, layer_row, unet_rows
from gpu_subjects import ATTENTIONS, BATCHES, SHAPES, load_engine, random_unet

SECTIONS = ("sample", "unet", "correctness", "peaks", "layers", "attention", "blocks")
WRONG = 3  # exit code: a kernel's result is wrong. Python itself ends with 1 and 2
FUSED_ERROR = 0.01  # of W8A8: relative mean square between fused and not fused


class Report:
    """The JSON result, written after every section and row, so that a time limit loses nothing."""

    def __init__(self, path: Path, budget: float) -> None:
        self.path = path
        self.end = time.monotonic() + budget
        self.data: dict[str, Any] = {"skipped": []}

    def enough(self, what: str, seconds: float = 5.0) -> bool:
        """Whether `seconds` are left of the budget; if not, `what` is listed as skipped."""
        if time.monotonic() + seconds <= self.end:
            return True
        self.data["skipped"].append(what)
        self.save()
        return False

    def save(self) -> None:
        write_json(self.path, self.data)


def sample(report: Report, args) -> bool:
    """Some of the correctness section, within a minute: each kind of layer under some tiles."""
    found = [data["correctness"] for data in run_shards("correctness", flags=("--quick",))]
    report.data["sample"] = together(found)
    return not report.data["sample"]["failures"]


def together(found: list[dict]) -> dict[str, Any]:
    """What several processes have checked, as one."""
    return dict(
        checked=sum(f["checked"] for f in found),
        largest_relative_error=max(f["largest_relative_error"] for f in found),
        failures=[line for f in found for line in f["failures"]],
    )


def correctness(report: Report, args) -> bool:
    """Layers of every kind, under every tile.

    Accumulators must equal the oracle's bit for bit, and outputs the simulation.
    """
    device = "cpu" if args.interpret else "cuda"
    every = 24 if args.interpret else 5
    todo = jobs(small=args.interpret)[:: every if args.quick else 1]
    # Most of the time goes into compiling: one process a core.
    if device == "cuda" and args.shard is None:
        found = [data["correctness"] for data in run_shards("correctness")]
    else:
        i, n = args.shard or (0, 1)
        engine = load_engine()
        engine.tiles.TUNE = False  # times taken beside other processes are worth nothing
        found = []
        for job in todo[i::n]:
            checked, worst, failures = check(job, engine, device)
            found.append(dict(checked=checked, largest_relative_error=worst, failures=failures))
        if i == 0:
            for bits in (4, 8):
                sizes = (2, 70, 77, 20) if args.interpret else (8, 300, 333, 40)
                error = attention_error(engine, bits, device, *sizes)
                wrong = [] if error <= 0.01 else [f"attention A{bits}: mean error {error:.1e}"]
                found.append(dict(checked=1, largest_relative_error=0.0, failures=wrong))
    report.data["correctness"] = together(found or [NOTHING])
    return not report.data["correctness"]["failures"]


NOTHING = dict(checked=0, largest_relative_error=0.0, failures=[])  # a shard without jobs


def run_shards(section: str, n: int | None = None, flags: tuple[str, ...] = ()) -> list[dict]:
    """Run a section in n processes, each its share, and return their results.

    Kernels compile in parallel, into triton's cache on disk.
    """
    n = n or max(1, min(12, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(n)]
        command = [sys.executable, __file__, "--sections", section, *flags]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(open(out.with_suffix(".log"), "w+")) for out in outs]
            running = [
                subprocess.Popen(
                    [*command, "--shard", f"{i}/{n}", "--out", str(out)],
                    stdout=log,
                    stderr=log,
                    env=one_thread,
                )
                for i, (out, log) in enumerate(zip(outs, logs, strict=True))
            ]
            codes = [process.wait() for process in running]
            for code, log in zip(codes, logs, strict=True):
                if code not in (0, WRONG):
                    log.seek(0)
                    raise RuntimeError(
                        f"a process of section {section} ended with code {code}: "
                        f"{log.read()[-2000:]}"
                    )
        return [json.loads(out.read_text()) for out in outs]


def peaks(report: Report, args) -> bool:
    """Measured ceilings.

    Operations a second of int8 and bf16 matrix products of random data, bytes a second of a copy.
    """
    import torch

    timer = Timer()
    n = 8192
    a, b = (torch.randint(-128, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (4 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    t = timer.compare(
        {
            "int8": lambda: torch._int_mm(a, b.T),
            "bf16": lambda: x @ y,
            "copy": lambda: target.copy_(source),
        }
    )
    report.data["peaks"] = dict(
        int8=2 * n**3 / t["int8"],
        bf16=2 * n**3 / t["bf16"],
        bandwidth=2 * source.numel() / t["copy"],
    )
    return True


def layers(report: Report, args) -> bool:
    """Ours (FORMATS; with and without quantization) against cuDNN / cuBLAS and torch._int_mm."""
    if args.shard is not None:
        compile_layers(*args.shard)
        return True
    run_shards("layers")
    engine = load_engine()
    timer = Timer()
    rows = report.data.setdefault("layers", [])
    for batch in BATCHES:
        for shape in SHAPES:
            if report.enough(f"{shape}, batch {batch}"):
                rows.append(layer_row(shape, batch, timer, report.data["peaks"], engine))
                show(rows[-1])
                report.save()
    return True


def blocks(report: Report, args) -> bool:
    """A norm, a SiLU and a layer: what fusing them into the quantization gains."""
    engine = load_engine()
    timer = Timer()
    rows = report.data.setdefault("blocks", [])
    for shape in [s for s in SHAPES if s.taps == 3 and s.stride == 1 and s.model == "sd14"]:
        if report.enough(f"norm, SiLU, {shape}", 15):
            rows.append(block_row(shape, 2, timer, engine))
            show(rows[-1])
            report.save()
    return True


def attention(report: Report, args) -> bool:
    """The fused quantized attention against torch's fused attention in float16."""
    engine = load_engine()
    timer = Timer()
    rows = report.data.setdefault("attention", [])
    for batch in BATCHES:
        for sizes in ATTENTIONS:
            if report.enough(f"attention {sizes}, batch {batch}"):
                rows.append(attention_row(*sizes, batch, timer, engine))
                show(rows[-1])
                report.save()
    return True


def unet(report: Report, args) -> bool:
    """One step of SD v1.4's UNet, time and peak memory: float16, and ours at W4A4 and W8A8.

    Fused models are compared with those that are not fused before they are timed.
    """
    import torch

    if importlib.util.find_spec("diffusers") is None:
        report.data["skipped"].append("unet: diffusers is not installed")
        return True
    tiles = load_engine().tiles
    half = torch.float16
    plain = random_unet("float").to(dtype=half, memory_format=torch.channels_last)
    models = {
        "float16 compiled": torch.compile(plain, mode=args.compile_mode, dynamic=False),
        "float16 eager": plain,
    }
    rows = report.data.setdefault("unet", [])
    timer = Timer()
    good = True
    tiles.TUNE = False
    for bits in (4, 8):
        name = f"W{bits}A{bits}"
        fake = random_unet("quest", bits)
        own, error = ours(fake, half, timer)
        models |= {f"{name}{what}": model for what, model in own.items()}
        report.data.setdefault("fused against not fused", {})[name] = error
        report.save()
        # A code of 4 bits that flips is a large part of a value: that error is shown alone.
        good &= bits == 4 or error < FUSED_ERROR
        print(f"unet {name}: fused against not fused {error:.1e}", flush=True)
    for tuned in (False, True):
        tiles.TUNE = tuned
        for batch in BATCHES:
            what = f"unet, {'tuned' if tuned else 'estimated'} tiles, batch {batch}"
            if report.enough(what, 60):
                rows += [row | {"tuned": tuned} for row in unet_rows(models, batch, timer)]
                report.save()
                for row in rows[-len(models) :]:
                    print(f"{what}: {row['model']} {row['seconds'] * 1e3:.2f} ms", flush=True)
    return good


def ours(fake: Any, dtype: Any, timer: Timer) -> tuple[dict[str, Any], float]:
    """A quantized UNet's converted forms by what is said of them, and how far two differ.

    Returns:
        The models, and the mean square of fused - not fused over that of not fused.
    """
    from questlib.integer.conversion import convert

    models = {
        "": convert(fake, "triton", dtype=dtype, fuse=True),
        ", attention auto": convert(fake, "triton", dtype=dtype, fuse=True, attention="auto"),
        ", not fused": convert(fake, "triton", dtype=dtype),
    }
    fused, apart = (timer.outputs(models[what], 2).float() for what in ("", ", not fused"))
    error = (fused - apart).square().mean() / apart.square().mean()
    return models, error.item()


def show(row: dict) -> None:
    """Print a row's times."""
    times = "  ".join(f"{n} {s * 1e6:.1f}" for n, s in row["seconds"].items())
    print(f"{row['shape']} batch {row['batch']} (us): {times}", flush=True)


def machine() -> dict:
    """GPU, driver, clocks and versions: part of every result."""
    import torch
    import triton

    found = dict(
        torch=torch.__version__,
        triton=triton.__version__,
        python=sys.version.split()[0],
        when=time.strftime("%Y-%m-%d %H:%M"),
    )
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        ]
        try:
            smi = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            smi = f"nvidia-smi: {error}"
        found |= dict(
            gpu=p.name,
            processors=p.multi_processor_count,
            memory=p.total_memory,
            driver_and_clocks=smi,
        )
    return found


RUN = dict(
    sample=sample,
    unet=unet,
    correctness=correctness,
    peaks=peaks,
    layers=layers,
    attention=attention,
    blocks=blocks,
)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds; what does not fit is listed as skipped"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument(
        "--sections",
        default=",".join(SECTIONS),
        help="comma-separated; peaks are always measured before layers",
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="the correctness section alone, on CPU, in Triton's interpreter",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases of correctness")
    parser.add_argument(
        "--compile-mode",
        help="of torch.compile; max-autotune-no-cudagraphs takes minutes (default: torch's own)",
    )
    parser.add_argument(
        "--shard", type=lambda text: tuple(map(int, text.split("/"))), help=argparse.SUPPRESS
    )
    args = parser.parse_args(argv)
    wanted = ["correctness"] if args.interpret else args.sections.split(",")
    unknown = [s for s in args.sections.split(",") if s not in SECTIONS]
    if unknown:
        parser.error(
            f"--sections: expected some of {', '.join(SECTIONS)}, found {', '.join(unknown)}"
        )
    if "layers" in wanted and "peaks" not in wanted and args.shard is None:
        wanted.insert(0, "peaks")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.manual_seed(0)
    report = Report(args.out, args.budget)
    report.data["machine"] = machine()
    if not args.interpret and not torch.cuda.is_available():
        print(
            "expected an NVIDIA GPU, found none; --interpret checks the kernels without one",
            file=sys.stderr,
        )
        return 2
    codes = {run_section(report, name, args) for name in SECTIONS if name in wanted}
    return max(codes)


def run_section(report: Report, name: str, args) -> int:
    """Run one section within the budget; its exit code."""
    if not report.enough(name):
        return 0
    start = time.monotonic()
    skipped = len(report.data["skipped"])
    try:
        code = 0 if RUN[name](report, args) else WRONG
    except Exception:
        # Whatever it is: other sections may still run, and the report says what happened.
        if args.shard is not None:
            raise
        report.data.setdefault("errors", {})[name] = traceback.format_exc()[-4000:]
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        code = 1
    seconds = round(time.monotonic() - start, 1)
    report.data.setdefault("section seconds", {})[name] = seconds
    report.save()
    left_out = report.data["skipped"][skipped:]
    said = {0: "ok", 1: "FAILED", WRONG: "WRONG"}[code]
    print(f"{name}: {said} ({seconds} s){''.join(f'; skipped: {x}' for x in left_out)}", flush=True)
    if code == WRONG:
        print(
            "\n".join(report.data.get(name, {}).get("failures", [])) if name != "unet" else "",
            file=sys.stderr,
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
