"""The Triton engine on an NVIDIA GPU: correctness first, then peaks, layers, attention and the whole UNet of SD v1.4.

    python benchmarks/gpu.py                    # about 9 minutes on an H200; writes benchmarks/results/gpu.json as it goes
    python benchmarks/gpu.py --budget 200 --sections correctness,peaks,layers
    python benchmarks/gpu.py --interpret        # no GPU: the correctness section in Triton's interpreter, tiny shapes

Self-contained: needs torch with CUDA and triton; without diffusers all but the UNet runs. Every time is the median of CUDA-graph
replays between events, the L2 cache flushed before each, contenders in the order A B .. B A; `fraction` is the floor (the larger
of operations / measured peak and bytes / measured bandwidth) over the time. Exit code 1 when a kernel is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECTIONS = ("correctness", "peaks", "layers", "attention", "blocks", "unet")
BATCHES = (2, 8, 1)  # 2 first: one picture with classifier-free guidance


class Shape(NamedTuple):
    """A layer with `pixels` outputs for each picture: taps 1 is a linear, taps 3 a 3 x 3 convolution on a square."""

    model: str
    inputs: int
    outputs: int
    pixels: int
    taps: int = 1
    stride: int = 1

    def operations(self, batch: int) -> int:
        return 2 * batch * self.pixels * self.inputs * self.outputs * self.taps**2

    def bytes(self, batch: int, act: float, weight: float, out: float = 2.0) -> float:
        """Each operand once, at `act`, `weight` and `out` bytes an element."""
        read = batch * self.pixels * self.stride**2 * self.inputs * act + self.inputs * self.outputs * self.taps**2 * weight
        return read + batch * self.pixels * self.outputs * out

    def __str__(self) -> str:
        kind = f"conv3x3/{self.stride}" if self.taps == 3 else "linear"
        return f"{self.model} {kind} {self.inputs}->{self.outputs} at {self.pixels}"


SHAPES = [
    Shape("sd14", 320, 320, 4096, 3), Shape("sd14", 960, 320, 4096, 3), Shape("sd14", 640, 640, 1024, 3),
    Shape("sd14", 1920, 640, 1024, 3), Shape("sd14", 1280, 1280, 256, 3), Shape("sd14", 2560, 1280, 256, 3),
    Shape("sd14", 1280, 1280, 64, 3), Shape("sd14", 320, 320, 1024, 3, 2), Shape("sd14", 320, 320, 4096),
    Shape("sd14", 320, 2560, 4096), Shape("sd14", 1280, 320, 4096), Shape("sd14", 640, 5120, 1024),
    Shape("sd14", 2560, 640, 1024), Shape("sd14", 1280, 1280, 256), Shape("sd14", 1280, 10240, 256),
    Shape("sd14", 5120, 1280, 256), Shape("sd14", 768, 1280, 77), Shape("ldm4", 224, 224, 4096, 3),
    Shape("ldm4", 448, 448, 1024, 3), Shape("ldm4", 672, 672, 256, 3), Shape("ldm4", 896, 896, 64, 3),
    Shape("ldm4", 448, 448, 1024), Shape("ldm4", 672, 672, 256),
]  # fmt: skip
ATTENTIONS = [(4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40)]  # queries, keys, channels a head; 8 heads


def floor_seconds(operations: float, moved: float, peak: float, bandwidth: float) -> float:
    return max(operations / peak, moved / bandwidth)


class Report:
    """The JSON result, rewritten after every section and every row, so that a time limit loses nothing."""

    def __init__(self, path: Path, budget: float) -> None:
        self.path, self.end, self.data = path, time.monotonic() + budget, {"skipped": []}

    def enough(self, what: str, seconds: float = 5.0) -> bool:
        """Whether `seconds` are left of the budget; if not, `what` is listed as skipped."""
        if time.monotonic() + seconds <= self.end:
            return True
        self.data["skipped"].append(what)
        self.save()
        return False

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def load_engine() -> tuple:
    """(triton_engine, form, reference); where diffusers is missing, past the package's __init__, which needs it."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("diffusers") is None:
        for name, folder in (("questlib", ROOT / "questlib"), ("questlib.integer", ROOT / "questlib/integer")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder)]
        attention = types.ModuleType("diffusers.models.attention_processor")
        attention.Attention = object  # named by questlib.layers in annotations only
        sys.modules |= {n: types.ModuleType(n) for n in ("diffusers", "diffusers.models")} | {attention.__name__: attention}
    from questlib.integer import form, reference, triton_engine

    return triton_engine, form, reference


# ---- layers with random weights and grids ----
def random_layer(module, w_bits: int, a_bits: int, split: int | None = None, seed: int = 0, shift: bool = False):
    """A quantized layer: (layer, steps). Codes of 4 bits in the carrier format, wider ones with one scale."""
    import torch
    from torch import nn

    from questlib.layers import convert_layer
    from questlib.quantizers import ActQuantizer, WeightQuantizer
    from questlib.timesteps import StepGroups

    g, linear, device = torch.Generator().manual_seed(seed), isinstance(module, nn.Linear), module.weight.device
    channels = module.in_features if linear else module.in_channels
    index = torch.zeros(channels, dtype=torch.int64)
    index[channels if split is None else split :] = 1
    parts, steps = int(index.max()) + 1, StepGroups(torch.arange(2), torch.arange(2))
    act = ActQuantizer("layer.act", a_bits, steps, channels, -1 if linear else 1, index, carrier=a_bits <= 4)
    for group in range(2):
        ratio = None
        if a_bits <= 4:
            block = torch.randint(0, 4, (channels,), generator=torch.Generator().manual_seed(seed)) if shift else 0
            ratio = (torch.randint(5 if shift else 1, 9, (channels,), generator=g) << block).float()
        zero = torch.randint(0, 2**a_bits, (parts,), generator=g)[index].float()
        act.set_group(group, torch.rand(parts, generator=g) * 4 / 2**a_bits + 0.01, zero, ratio)
    act.calibrated.fill_(True)
    wq = WeightQuantizer(module.weight, w_bits, index.to(device), "minmax")
    convert_layer(module.requires_grad_(False), "conv", act.to(device), wq)
    return module, steps


def module_of(shape: Shape):
    from torch import nn

    if shape.taps == 1:
        return nn.Linear(shape.inputs, shape.outputs)
    return nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1)


def input_of(shape: Shape, batch: int, device: str, dtype):
    import torch

    side = round(shape.pixels**0.5) * shape.stride
    size = (batch, shape.inputs, side, side) if shape.taps == 3 else (batch, shape.pixels, shape.inputs)
    x = torch.randn(size, device=device, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if shape.taps == 3 else x


# ---- sections ----
class Job(NamedTuple):
    """One layer to be checked."""

    make: Callable
    size: tuple[int, ...]
    extra: dict
    w_bits: int
    a_bits: int
    kind: str
    seed: int


def jobs(small: bool) -> list[Job]:
    from torch import nn

    cases = [
        (lambda: nn.Linear(75, 70), (3, 37, 75), {}), (lambda: nn.Linear(256, 192), (130, 256), {}),
        (lambda: nn.Linear(64, 64), (20, 64), dict(shift=True)),
        (lambda: nn.Conv2d(150, 20, 3, padding=1), (1, 150, 5, 4), dict(shift=True)),
        (lambda: nn.Conv2d(48, 20, 1), (2, 48, 5, 4), dict(split=30)),
        (lambda: nn.Conv2d(40, 36, 3, padding=1), (2, 40, 7, 6), {}), (lambda: nn.Conv2d(64, 33, 3, 2, 1), (1, 64, 9, 8), {}),
        (lambda: nn.Conv2d(3, 8, (3, 2), (2, 1), (0, 2)), (2, 3, 8, 9), {}),
    ]  # fmt: skip
    if not small:
        cases += [
            (lambda: nn.Linear(640, 1280), (2, 500, 640), {}), (lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 16, 16), {}),
            (lambda: nn.Conv2d(1280, 640, 3, padding=1), (1, 1280, 8, 8), {}), (lambda: nn.Linear(2560, 64), (3, 2560), {}),
        ]  # fmt: skip
    formats = ((4, 4, "packed"), (4, 4, "int8"), (4, 8, "packed"), (4, 8, "int8"), (8, 8, "int8"))
    return [Job(*case, *of, seed) for seed, case in enumerate(cases) for of in formats]


def check(job: Job, engine, form, reference, device: str) -> tuple[int, float, list[str]]:
    """(configurations checked, largest relative error in float32, what is wrong)"""
    import torch

    extra = {k: v for k, v in job.extra.items() if k != "shift" or job.a_bits <= 4}
    layer, steps = random_layer(job.make(), job.w_bits, job.a_bits, seed=job.seed, **extra)
    steps.current = job.seed % 2
    x = torch.randn(job.size) * 2
    _, accs = reference.layer_forward(layer, x)
    expected, expected_half = layer(x), layer(x.half().float())
    name = f"W{job.w_bits}A{job.a_bits} {job.kind} {type(layer).__name__} {tuple(layer.weight.shape)}"
    mine = engine.TritonLayer(form.integer_form(layer, name), steps, job.kind).to(device)
    checked, worst, failures, sent = 0, 0.0, [], x.to(device)

    def error(y, of):
        return ((y.float().cpu() - of).abs().max() / of.abs().max()).item()

    for config in each_tile(engine, mine, device, job.seed):
        try:
            exact = all(torch.equal(a.long().cpu(), b) for a, b in zip(mine.accumulators(sent), accs, strict=True))
            full, half = error(mine(sent), expected), error(mine(sent.half()), expected_half)
        except engine.tiles.triton.runtime.errors.OutOfResources:
            continue  # a tile for larger GPUs; tuning passes it over
        checked, worst = checked + 1, max(worst, full)
        if not exact or not full <= 1e-5 or not half <= 2e-3:
            failures.append(f"{name} {config}: exact {exact}, error {full:.1e}, float16 {half:.1e}")
    engine.check_finite(mine)
    sent.view(-1)[-1] = float("nan")
    mine(sent)
    if not int(mine.flag):
        failures.append(f"{name}: NaN not flagged")
    return checked, worst, failures


def correctness(report: Report, args) -> bool:
    """Accumulators equal to the int64 reference bit for bit, outputs to the simulation: layers of every kind, every tile."""
    device = "cpu" if args.interpret else "cuda"
    todo = jobs(small=args.interpret)[:: 24 if args.quick else 1]
    if device == "cuda" and args.shard is None:  # most of the time goes into compiling: one process a core
        found = [data["correctness"] for data in run_shards("correctness")]
    else:
        i, n = args.shard or (0, 1)
        engine, form, reference = load_engine()
        found = []
        for job in todo[i::n]:
            checked, worst, failures = check(job, engine, form, reference, device)
            found.append(dict(checked=checked, largest_relative_error=worst, failures=failures))
        if i == 0:
            for bits in (4, 8):
                sizes = (2, 70, 77, 20) if args.interpret else (8, 300, 333, 40)
                error = attention_error(engine, form, bits, device, *sizes)
                wrong = [] if error <= 0.01 else [f"attention A{bits}: mean error {error:.1e}"]
                found.append(dict(checked=1, largest_relative_error=0.0, failures=wrong))
    report.data["correctness"] = dict(
        checked=sum(f["checked"] for f in found), largest_relative_error=max(f["largest_relative_error"] for f in found),
        failures=[line for f in found for line in f["failures"]],
    )  # fmt: skip
    return not report.data["correctness"]["failures"]


def run_shards(section: str, n: int | None = None, flags: tuple[str, ...] = ()) -> list[dict]:
    """Run a section in n processes, each its share: kernels compile in parallel, into triton's cache on disk. Their results."""
    n = n or max(1, min(12, (os.cpu_count() or 1) - 2))
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(n)]
        command, one_thread = [sys.executable, __file__, "--sections", section, *flags], os.environ | {"OMP_NUM_THREADS": "1"}
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(open(out.with_suffix(".log"), "w+")) for out in outs]
            running = [
                subprocess.Popen([*command, "--shard", f"{i}/{n}", "--out", str(out)], stdout=log, stderr=log, env=one_thread)
                for i, (out, log) in enumerate(zip(outs, logs, strict=True))
            ]
            codes = [process.wait() for process in running]
            for code, log in zip(codes, logs, strict=True):
                if code not in (0, 1):
                    log.seek(0)
                    raise RuntimeError(f"a process of section {section} ended with code {code}: {log.read()[-2000:]}")
        return [json.loads(out.read_text()) for out in outs]


def each_tile(engine, layer, device: str, seed: int):
    """Tile configurations that serve this layer, one after the other in force; half of them with a split reduction."""
    if device == "cpu":
        yield "interpreted"
        return
    chosen, engine.tiles.CACHE = engine.tiles.CACHE, engine.tiles.ConfigCache()
    try:
        fit = [c for c in engine.tiles.CANDIDATES if layer.weight0.shape[2] % c.bk == 0 and not (layer.ends[0] and c.bk > 64)]
        for i, config in enumerate(fit[seed % 3 :: 3]):  # each is compiled three times: a third of them for each layer
            config = config._replace(split=(1, 3)[(i + seed // 3) % 2])
            engine.tiles.CACHE.choose = functools.partial(fixed, config)
            yield config
    finally:
        engine.tiles.CACHE = chosen


def fixed(config, *_):
    return config


def attention_parts(engine, form, bits: int, heads: int, dim: int, device: str):
    """(TritonAttention, the four ActQuantizers)"""
    import torch

    from questlib.quantizers import ActQuantizer
    from questlib.timesteps import StepGroups

    steps, width = StepGroups(torch.arange(1), torch.zeros(1, dtype=torch.int64)), heads * dim
    acts = [ActQuantizer(x, bits, steps, width, -1, torch.zeros(width, dtype=torch.int64), carrier=bits <= 4) for x in "qkv"]
    acts.append(ActQuantizer("probs", 8, steps, 1, -1, torch.zeros(1, dtype=torch.int64), unsigned=True))
    for act in acts[:3]:
        ratio = torch.randint(1, 9, (width,)).float() if bits <= 4 else None
        act.set_group(0, torch.full((1,), (0.15 if bits <= 4 else 4.0) / 2**bits), torch.full((width,), 2.0 ** (bits - 1)), ratio)
    acts[3].set_group(0, torch.full((1,), 0.1 / 255), torch.zeros(1))
    for act in acts:
        act.calibrated.fill_(True)
    tables = [form.act_grids(a, torch.zeros(len(a.index), dtype=torch.int64), a.name) for a in acts]
    grids = [tuple(of[0] for of in group) for group in zip(*(t for t, _ in tables), strict=True)]
    return engine.TritonAttention(f"attention A{bits}", grids, tables[2][1], steps).to(device), acts


def attention_error(engine, form, bits: int, device: str, heads: int, queries: int, keys: int, dim: int) -> float:
    """Mean error against fake quantization, relative to the largest output. Codes on a rounding edge may differ by one."""
    import torch

    mine, acts = attention_parts(engine, form, bits, heads, dim, device)
    q, k, v = (torch.randn(2, n, heads * dim) for n in (queries, keys, keys))
    fq, fk, fv = (a(x).unflatten(-1, (heads, dim)).transpose(1, 2) for a, x in zip(acts, (q, k, v), strict=False))
    expected = (acts[3]((fq @ fk.mT * dim**-0.5).softmax(-1)) @ fv).transpose(1, 2).flatten(2)
    found = mine.attend(q.to(device), k.to(device), v.to(device), heads, dim**-0.5).cpu()
    return ((found - expected).abs().mean() / expected.abs().max()).item()


# ---- timing ----
class Timer:
    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def graph(self, run: Callable):
        """`run` captured in a CUDA graph: launches cost no time on the host, for any contender."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            run()
        return graph.replay

    def compare(self, runs: dict[str, Callable], repeats: int = 10) -> dict[str, float]:
        """{name: median seconds}, in the order A B .. B A."""
        torch = self.torch
        replays = {name: self.graph(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for names in (list(runs), list(runs)[::-1]):
            for name in names:
                for warm in (True, False):
                    events = []
                    for _ in range(2 if warm else repeats):
                        self.flush.zero_()
                        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        start.record(), replays[name](), end.record()
                        events.append((start, end))
                    torch.cuda.synchronize()
                    if not warm:
                        times[name] += [s.elapsed_time(e) / 1e3 for s, e in events]
        return {name: statistics.median(values) for name, values in times.items()}


def peaks(report: Report, args) -> bool:
    """Measured ceilings: operations a second of int8 and bf16 matrix products on random data, bytes a second of a copy."""
    import torch

    timer, n = Timer(), 8192
    a, b = (torch.randint(-128, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (4 << 30,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    t = timer.compare({"int8": lambda: torch._int_mm(a, b.T), "bf16": lambda: x @ y, "copy": lambda: target.copy_(source)})
    report.data["peaks"] = dict(int8=2 * n**3 / t["int8"], bf16=2 * n**3 / t["bf16"], bandwidth=2 * source.numel() / t["copy"])
    return True


def layer_row(shape: Shape, batch: int, timer: Timer, ceiling: dict[str, float], engine, form) -> dict:
    import torch

    x = input_of(shape, batch, "cuda", torch.float16)
    runs, stored = {}, {}
    for name, w, a, kind, shift in FORMATS:
        layer, steps = random_layer(module_of(shape).to("cuda"), w, a, shift=shift)
        mine = engine.TritonLayer(form.integer_form(layer, str(shape)), steps, kind)
        runs[name] = functools.partial(mine, x)
        runs[f"{name}, quantized before"] = functools.partial(
            mine.multiplied, *mine.quantized(mine.rows(x), 0, 0), 0, 0, x.dtype, mine.bias
        )
        stored[name] = stored[f"{name}, quantized before"] = 0.5 if kind == "packed" else 1.0
    for dtype in (torch.float16, torch.bfloat16):
        plain = module_of(shape).to("cuda", dtype)
        plain = plain.to(memory_format=torch.channels_last) if shape.taps == 3 else plain
        runs[str(dtype).removeprefix("torch.")] = functools.partial(plain, x.to(dtype))
    if shape.taps == 1 and batch * shape.pixels > 16:
        a8 = torch.randint(-127, 128, (batch * shape.pixels, shape.inputs), device="cuda", dtype=torch.int8)
        b8 = torch.randint(-127, 128, (shape.outputs, shape.inputs), device="cuda", dtype=torch.int8)
        runs["torch._int_mm"] = functools.partial(torch._int_mm, a8, b8.T)
    times, fraction = timer.compare(runs), {}
    for name, seconds in times.items():
        integer, before, product = "float" not in name, "before" in name, "_int_mm" in name
        moved = shape.bytes(
            batch, 1.0 if before or product else 2.0, stored.get(name, 1.0 if integer else 2.0), 4.0 if product else 2.0
        )
        peak = ceiling["int8" if integer else "bf16"]
        fraction[name] = floor_seconds(shape.operations(batch), moved, peak, ceiling["bandwidth"]) / seconds
    speedup = {n: times["float16"] / s for n, s in times.items() if n.startswith("W")}
    return dict(shape=str(shape), batch=batch, seconds=times, fraction=fraction, speedup_over_float16=speedup)


FORMATS = (
    ("W4A4 packed", 4, 4, "packed", False), ("W4A4 packed, block shifts", 4, 4, "packed", True),
    ("W4A4 int8", 4, 4, "int8", False), ("W8A8", 8, 8, "int8", False),
)  # fmt: skip


def compile_layers(i: int, n: int) -> None:
    """Run every tile that tuning would try, once, for this process's share of the shapes: afterwards they come from the cache."""
    import torch

    engine, form, _ = load_engine()
    engine.tiles.ConfigCache.load, engine.tiles.ConfigCache.save = (lambda self: setattr(self, "path", Path()),) * 2
    engine.tiles.ConfigCache.seconds = lambda self, config, run: run_once(engine, config, run)
    for shape, (_, w, a, kind, shift) in list(itertools.product(SHAPES, FORMATS))[i::n]:
        layer, steps = random_layer(module_of(shape).to("cuda"), w, a, shift=shift)
        mine = engine.TritonLayer(form.integer_form(layer, str(shape)), steps, kind)
        for batch in BATCHES:
            mine(input_of(shape, batch, "cuda", torch.float16))


def run_once(engine, config, run: Callable) -> float:
    try:
        run(config)
    except engine.tiles.triton.runtime.errors.OutOfResources:
        pass  # tuning will find the same
    return 0.0


def layers(report: Report, args) -> bool:
    """Ours (FORMATS; with and without quantization) against cuDNN / cuBLAS and torch._int_mm."""
    if args.shard is not None:
        compile_layers(*args.shard)
        return True
    run_shards("layers")
    engine, form, _ = load_engine()
    timer, rows = Timer(), report.data.setdefault("layers", [])
    for batch in BATCHES:
        for shape in SHAPES:
            if report.enough(f"{shape}, batch {batch}"):
                rows.append(layer_row(shape, batch, timer, report.data["peaks"], engine, form))
                show(rows[-1])
                report.save()
    return True


def block_row(shape: Shape, batch: int, timer: Timer, engine, form) -> dict:
    """GroupNorm, SiLU and a convolution, as in a ResNet block: where quantization is fused into what stands before it."""
    import torch
    from torch import nn

    x, norm = input_of(shape, batch, "cuda", torch.float16), nn.GroupNorm(32, shape.inputs).to("cuda", torch.float16)
    plain = nn.Sequential(norm, nn.SiLU(), module_of(shape).to("cuda", torch.float16)).to(memory_format=torch.channels_last)
    runs = {"float16": functools.partial(plain, x), "float16 compiled": functools.partial(torch.compile(plain), x)}

    def fused(mine):
        affine = torch.ops.questlib.group_norm_affine(x, norm.weight, norm.bias, 32, norm.eps)
        return mine(x, norm=affine, silu=True)

    for name, w, a, kind, shift in FORMATS:
        layer, steps = random_layer(module_of(shape).to("cuda"), w, a, shift=shift)
        mine = engine.TritonLayer(form.integer_form(layer, str(shape)), steps, kind)
        runs[name] = functools.partial(fused, mine)
    runs["W8A8, not fused"] = functools.partial(nn.Sequential(norm, nn.SiLU(), mine), x)
    return dict(shape=f"norm, SiLU, {shape}", batch=batch, seconds=timer.compare(runs))


def blocks(report: Report, args) -> bool:
    engine, form, _ = load_engine()
    timer, rows = Timer(), report.data.setdefault("blocks", [])
    for shape in [s for s in SHAPES if s.taps == 3 and s.stride == 1 and s.model == "sd14"]:
        if report.enough(f"norm, SiLU, {shape}", 15):
            rows.append(block_row(shape, 2, timer, engine, form))
            show(rows[-1])
            report.save()
    return True


def attention_row(queries: int, keys: int, dim: int, batch: int, timer: Timer, engine, form, heads: int = 8) -> dict:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(batch, n, heads * dim, device="cuda", dtype=torch.float16) for n in (queries, keys, keys))
    runs = {}
    for bits in (4, 8):
        mine, _ = attention_parts(engine, form, bits, heads, dim, "cuda")
        runs[f"A{bits}"] = functools.partial(mine.attend, q, k, v, heads, dim**-0.5)
    runs["float16"] = functools.partial(
        scaled_dot_product_attention, *(x.unflatten(-1, (heads, dim)).transpose(1, 2) for x in (q, k, v))
    )
    return dict(shape=f"attention {queries}x{keys}x{dim}", batch=batch, seconds=timer.compare(runs))


def attention(report: Report, args) -> bool:
    """The fused quantized attention against torch's fused attention in float16."""
    engine, form, _ = load_engine()
    timer, rows = Timer(), report.data.setdefault("attention", [])
    for batch in BATCHES:
        for sizes in ATTENTIONS:
            if report.enough(f"attention {sizes}, batch {batch}"):
                rows.append(attention_row(*sizes, batch, timer, engine, form))
                show(rows[-1])
                report.save()
    return True


def show(row: dict) -> None:
    times = "  ".join(f"{n} {s * 1e6:.1f}" for n, s in row["seconds"].items())
    print(f"{row['shape']} batch {row['batch']} (us): {times}", flush=True)


def random_unet(name: str, bits: int = 32, device: str = "cuda", **size):
    """SD v1.4's UNet, random weights, quantized with grids that were never calibrated: for speed and memory only."""
    import torch
    from diffusers import UNet2DConditionModel

    from questlib import QuantConfig
    from questlib.model import act_quantizers, insert

    size = dict(sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280)) | size
    with torch.device(device):
        unet = UNet2DConditionModel(attention_head_dim=8, **size)
    if name == "float":
        return unet.eval().requires_grad_(False)
    config = QuantConfig.preset(name, bits, bits, weight_range="minmax", step_groups=2)
    unet = insert(unet, config, torch.arange(0, 1000, 20)).to(device)
    for act in act_quantizers(unet):
        top = 2**act.bits - 1
        zero = torch.zeros_like(act.zero_point[0]) if act.unsigned else torch.full_like(act.zero_point[0], (top + 1) // 2)
        for group in range(act.scale.shape[0]):
            act.set_group(group, torch.full_like(act.scale[0], 6.0 / top), zero, carrier_ratio(act))
        act.calibrated.fill_(True)
    return unet


def carrier_ratio(act):
    """Multipliers 1..8, and where there is room one block of 64 shifted by 1 (never in q and k: their product has none)."""
    import torch

    if not act.carrier:
        return None
    ratio = torch.randint(1, 9, act.ratio.shape[1:], device=act.ratio.device).float()
    if len(ratio) > 64 and not act.name.endswith((".q", ".k")):
        ratio[:64] = 16.0
    return ratio


def unet(report: Report, args) -> bool:
    """One step of SD v1.4's UNet: float16 eager and compiled, and ours at W4A4 and W8A8; time and peak memory."""
    import torch

    if importlib.util.find_spec("diffusers") is None:
        report.data["skipped"].append("unet: diffusers is not installed")
        return True
    try:
        from questlib.integer import convert
    except ImportError as error:
        report.data["skipped"].append(f"unet: questlib.integer.convert is missing ({error})")
        return True
    timer, rows, half = Timer(), report.data.setdefault("unet", []), torch.float16

    def plain():
        return random_unet("float").to(dtype=half, memory_format=torch.channels_last)

    def ours(bits: int):
        return convert(random_unet("quest", bits), engine="triton", dtype=half, inplace=True)

    contenders = {
        "float16 eager": (plain, 20), "W4A4": (functools.partial(ours, 4), 60), "W8A8": (functools.partial(ours, 8), 60),
        "float16 compiled": (lambda: torch.compile(plain(), mode=args.compile_mode), 90),
    }  # fmt: skip
    for name, (make, seconds) in contenders.items():
        if report.enough(f"unet {name}", seconds):
            model = make()
            for batch in BATCHES:
                if report.enough(f"unet {name}, batch {batch}", seconds / 3):
                    rows.append(dict(model=name, **unet_row(model, name, batch, timer)))
                    print(f"unet {name} batch {batch}: {rows[-1]['seconds'] * 1e3:.2f} ms", flush=True)
                    report.save()
            del model
            torch.cuda.empty_cache()
    return True


def unet_row(model, name: str, batch: int, timer: Timer) -> dict:
    import torch

    x = torch.randn(batch, 4, 64, 64, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    t, text = torch.tensor(500, device="cuda"), torch.randn(batch, 77, 768, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        for _ in range(2):  # tunes, compiles, fills the tables of the time path, sets the step group
            model(x, t, text)
    if hasattr(model, "quest_hook"):
        model.quest_hook.remove()  # it reads the timestep on the host, which a graph cannot hold
    torch.cuda.reset_peak_memory_stats()
    seconds = timer.compare({name: functools.partial(model, x, t, text)})[name]
    weights = sum(v.numel() * v.element_size() for v in (*model.parameters(), *model.buffers()))
    peak = torch.cuda.max_memory_allocated() - timer.flush.numel()
    return dict(batch=batch, seconds=seconds, peak_bytes=peak, weight_bytes=weights)


def machine() -> dict:
    """GPU, driver, clocks and versions: part of every result."""
    import torch
    import triton

    found = dict(
        torch=torch.__version__, triton=triton.__version__, python=sys.version.split()[0], when=time.strftime("%Y-%m-%d %H:%M")
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
        found |= dict(gpu=p.name, processors=p.multi_processor_count, memory=p.total_memory, driver_and_clocks=smi)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds; what does not fit is listed as skipped")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated; peaks are always measured before layers")
    parser.add_argument("--interpret", action="store_true", help="the correctness section alone, on CPU, in Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="fewer cases of correctness")
    parser.add_argument(
        "--compile-mode", help="of torch.compile; max-autotune-no-cudagraphs takes minutes (default: torch's own)"
    )
    parser.add_argument("--shard", type=lambda text: tuple(map(int, text.split("/"))), help=argparse.SUPPRESS)  # run_shards' own
    args = parser.parse_args(argv)
    wanted = ["correctness"] if args.interpret else args.sections.split(",")
    if unknown := [s for s in wanted if s not in SECTIONS]:
        parser.error(f"--sections: expected some of {', '.join(SECTIONS)}, found {', '.join(unknown)}")
    if "layers" in wanted and "peaks" not in wanted and args.shard is None:
        wanted.insert(0, "peaks")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.manual_seed(0)
    report = Report(args.out, args.budget)
    report.data["machine"] = machine()
    if not args.interpret and not torch.cuda.is_available():
        print("expected an NVIDIA GPU, found none; --interpret checks the kernels without one", file=sys.stderr)
        return 2
    for name in SECTIONS:
        if name in wanted and report.enough(name):
            start = time.monotonic()
            good = globals()[name](report, args)
            report.data.setdefault("section seconds", {})[name] = round(time.monotonic() - start, 1)
            report.save()
            print(f"{name}: {'ok' if good else 'WRONG'} ({report.data['section seconds'][name]} s)", flush=True)
            if not good:
                print("\n".join(report.data[name]["failures"]), file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
