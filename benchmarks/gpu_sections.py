"""The sections of benchmarks/gpu.py: each writes what it finds into the report."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from gpu_check import Job, attention_error, check, jobs
from gpu_compile import compile_layers, compile_unets
from gpu_measure import Timer, attention_row, block_row, layer_row, unet_rows
from gpu_report import Report
from gpu_shards import run_shards
from gpu_subjects import ATTENTIONS, BATCHES, FORMS, SHAPES, load_engine, random_unet

FUSED_ERROR = 0.01  # of W8A8: relative mean square between fused and not fused
ATTENTION_ERROR = 0.01  # mean error relative to the largest output


# ---- is it right? ----


def sample(report: Report, args: Namespace) -> None:
    """Some of the correctness section, within a minute: each kind of layer under some tiles."""
    check_in_shards(report, "sample", ("--quick",))


def correctness(report: Report, args: Namespace) -> None:
    """Layers of every kind, under every tile.

    Accumulators must equal the oracle's bit for bit, and outputs the simulation.
    """
    if args.shard is None and not args.interpret:
        check_in_shards(report, "correctness")
        return
    every = 24 if args.interpret else 5
    todo = jobs(small=args.interpret)[:: every if args.quick else 1]
    i, n = args.shard or (0, 1)
    device = "cpu" if args.interpret else "cuda"
    found = [*check_layers(report, todo[i::n], device, f"{i}/{n}")]
    if i == 0:
        found += check_attention((2, 70, 77, 20) if args.interpret else (8, 300, 333, 40), device)
    write_checks(report, "correctness", found)


def check_layers(report: Report, todo: list[Job], device: str, share: str) -> list[dict]:
    """What was found of each layer, as far as the budget goes."""
    engine = load_engine()
    engine.tiles.TUNE = False  # times taken beside other processes are worth nothing
    found = []
    for k, job in enumerate(todo):
        if not report.enough(f"correctness: the last {len(todo) - k} layers of share {share}"):
            break
        checked, worst, failures = check(job, engine, device)
        found.append(dict(checked=checked, largest_relative_error=worst, failures=failures))
    return found


def check_attention(sizes: tuple[int, int, int, int], device: str) -> list[dict]:
    """What was found of attentions of (heads, queries, keys, channels a head)."""
    engine = load_engine()
    found = []
    for bits in (4, 8):
        error = attention_error(engine, bits, device, *sizes)
        good = error <= ATTENTION_ERROR
        wrong = [] if good else [f"attention A{bits}: mean error {error:.1e}"]
        found.append(dict(checked=1, largest_relative_error=0.0, failures=wrong))
    return found


def check_in_shards(report: Report, section: str, flags: tuple[str, ...] = ()) -> None:
    """The correctness section in several processes; what they found stands in `section`."""
    shards = run_shards(report, "correctness", flags=flags)
    found = [data["correctness"] for data in shards.results if "correctness" in data]
    write_checks(report, section, found)
    shards.check()


def write_checks(report: Report, section: str, found: list[dict]) -> None:
    """Write several findings as one."""
    together = dict(
        checked=sum(f["checked"] for f in found),
        largest_relative_error=max((f["largest_relative_error"] for f in found), default=0.0),
        failures=[line for f in found for line in f["failures"]],
    )
    report.data[section] = together
    report.save()
    report.found_wrong(section, *together["failures"])


# ---- how fast is it? ----


def compile_in_shards(report: Report, section: str, flags: tuple[str, ...] = ()) -> None:
    """Compile what a section needs in several processes.

    It can be measured without: where they fail, that is reported, and kernels compile when they
    are needed.
    """
    shards = run_shards(report, section, flags=flags)
    if shards.failures:
        report.failed(f"{section}, compiling", "\n\n".join(shards.failures))


def peaks(report: Report, args: Namespace) -> None:
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


def layers(report: Report, args: Namespace) -> None:
    """Ours (FORMATS; with and without quantization) against cuDNN / cuBLAS and torch._int_mm."""
    if args.shard is not None:
        compile_layers(*args.shard, report.enough)
        return
    if "peaks" not in report.data:
        raise RuntimeError("layers: expected the section peaks before, found none that ended well")
    compile_in_shards(report, "layers")
    engine = load_engine()
    timer = Timer()

    def row(shape: Any, batch: int) -> dict[str, Any]:
        return layer_row(shape, batch, timer, report.data["peaks"], engine)

    add_rows(report, "layers", SHAPES, BATCHES, row)


def blocks(report: Report, args: Namespace) -> None:
    """A norm, a SiLU and a layer: what fusing them into the quantization gains."""
    engine = load_engine()
    timer = Timer()

    def row(shape: Any, batch: int) -> dict[str, Any]:
        return block_row(shape, batch, timer, engine)

    squares = [s for s in SHAPES if s.taps == 3 and s.stride == 1 and s.model == "sd14"]
    add_rows(report, "blocks", squares, (2,), row, 15)


def attention(report: Report, args: Namespace) -> None:
    """The fused quantized attention against torch's fused attention in float16."""
    engine = load_engine()
    timer = Timer()

    def row(sizes: Any, batch: int) -> dict[str, Any]:
        return attention_row(*sizes, batch, timer, engine)

    add_rows(report, "attention", ATTENTIONS, BATCHES, row)


def add_rows(
    report: Report,
    section: str,
    subjects: list[Any],
    batches: tuple[int, ...],
    row: Callable[[Any, int], dict[str, Any]],
    seconds: float = 5.0,
) -> None:
    """Measure (subject, batch) after (subject, batch), as far as the budget goes."""
    for batch in batches:
        for subject in subjects:
            if report.enough(f"{section}: {subject}, batch {batch}", seconds):
                report.add(section, row(subject, batch))


def unet(report: Report, args: Namespace) -> None:
    """One step of SD v1.4's UNet, time and peak memory: float16, and ours at W4A4 and W8A8.

    Fused models are compared with those that are not fused before they are timed. Kernels are
    compiled before they are needed, those of tiles that tuning will time after the first rows.
    """
    if args.shard is not None:
        compile_unets(*args.shard, args.tuned, report.enough)
        return
    import torch

    if importlib.util.find_spec("diffusers") is None:
        report.skip("unet: diffusers is not installed")
        return
    compile_in_shards(report, "unet")
    tiles = load_engine().tiles
    half = torch.float16
    plain = random_unet("float").to(dtype=half, memory_format=torch.channels_last)
    models = {
        "float16 compiled": torch.compile(plain, mode=args.compile_mode, dynamic=False),
        "float16 eager": plain,
    }
    timer = Timer()
    tiles.TUNE = False
    for bits in (4, 8):
        name = f"W{bits}A{bits}"
        own, error = ours(random_unet("quest", bits), half, timer)
        models |= {f"{name}{what}": model for what, model in own.items()}
        compare_fused(report, name, bits, error)
    for tuned in (False, True):
        tiles.TUNE = tuned
        if tuned:
            compile_in_shards(report, "unet", ("--tuned",))
        for batch in BATCHES:
            if report.enough(f"unet: {'tuned' if tuned else 'estimated'} tiles, batch {batch}", 60):
                rows = unet_rows(models, batch, timer)
                report.add("unet", *(row | {"tuned": tuned} for row in rows))


def ours(fake: Any, dtype: Any, timer: Timer) -> tuple[dict[str, Any], float]:
    """A quantized UNet's converted forms by what is said of them, and how far two differ.

    Returns:
        The models, and the mean square of fused - not fused over that of not fused.
    """
    from questlib.integer.conversion import convert

    models = {
        name: convert(fake, "triton", dtype=dtype, **choices) for name, choices in FORMS.items()
    }
    fused, apart = (timer.outputs(models[what], 2).float() for what in ("", ", not fused"))
    error = (fused - apart).square().mean() / apart.square().mean()
    return models, error.item()


def compare_fused(report: Report, name: str, bits: int, error: float) -> None:
    """Write how far a fused UNet is from the one that is not fused.

    A code of 4 bits that flips is a large part of a value: that error is shown alone.
    """
    report.data.setdefault("fused against not fused", {})[name] = error
    report.save()
    said = f"{name}: fused against not fused {error:.1e}"
    print(f"unet: {said}", flush=True)
    if bits > 4 and not error < FUSED_ERROR:
        report.found_wrong("unet", said)


# In their order: a sample of correctness, the headline, then all else.
SECTIONS: dict[str, Callable[[Report, Namespace], None]] = dict(
    sample=sample,
    unet=unet,
    correctness=correctness,
    peaks=peaks,
    layers=layers,
    attention=attention,
    blocks=blocks,
)
