"""Where the time of one UNet step goes on this CPU, and what the hardware would allow.

    python benchmarks/cpu_breakdown.py [--models mini-ldm4,sd14] [--repeats 3]

Each variant runs in processes of its own, once in the given order and once in reverse (A B B A),
under torch's profiler, which also sees the compiled kernels (`questlib::...`). Every operation
belongs to one kind of work; the seconds of a kind are the median over all steps.

The bound is a roofline. Measured first: int8 and float32 products of large matrices, and copying.
Counted: multiplications of layers and of attention, and the activations that layers read and write
in float32. The bound has the products at the int8 peak, the activations at the speed of copying,
and nothing else: no weights to unpack, no exponentials, no codes to write.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_unet
import torch
from common import RESULTS, parser_of, read_models, run_worker, write_json
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from questlib.integer.cpu.engine import CPU
from questlib.integer.form import integer_form
from questlib.integer.synthetic import random_layer
from reproduce.provenance import provenance

RESULT = RESULTS / "cpu_breakdown.json"
VARIANTS = ("fp32", "w4a4", "w4a4-fused")
OTHER = "other"

# By the beginning of an operation's name; the first that fits counts.
KINDS = {
    "attention": ("questlib::attention", "aten::_scaled_dot_product", "aten::_flash_attention"),
    "products": ("onednn::", "aten::mkldnn", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn::"),
    "quantization": ("questlib::quantize_tokens", "questlib::quantize", "questlib::window_sums"),
    "norms and activations": (
        "questlib::group_affine",
        "aten::native_group_norm",
        "aten::native_layer_norm",
        "aten::silu",
        "aten::gelu",
        "aten::sigmoid",
    ),
    "sums and copies": ("questlib::add_products", "aten::"),
}
# Norm, activation and quantization in one kernel.
FUSED = "questlib::quantize_rows"


def kind_of(operation: str) -> str:
    """The kind of work that an operation belongs to."""
    if operation == FUSED:
        return "norms and activations"
    for kind, names in KINDS.items():
        if operation.startswith(names):
            return kind
    return OTHER


def worker(model: str, variant: str, folder: Path, repeats: int) -> list[dict[str, float]]:
    """Seconds of each of some steps by kind of work; in a process of its own."""
    run, _ = cpu_unet.load(model, variant, folder)
    found = []
    with torch.inference_mode():
        run()
        for _ in range(repeats):
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run()
            seconds: Counter[str] = Counter()
            for event in seen.key_averages():
                seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            found.append({kind: seconds[kind] for kind in (*KINDS, OTHER)})
    return found


class _Attentions(TorchFunctionMode):
    """Counts the multiplications of attention's two products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            query, key = args[0], args[1]  # [B, heads, N, d], [B, heads, M, d]
            self.products += 2 * query.numel() * key.shape[-2]
        return function(*args, **(kwargs or {}))


def work_of(model: str) -> dict[str, int]:
    """Multiplications of layers and of attention, and bytes of activations, of one step."""
    unet = cpu_unet.float_unet(model)
    counted: Counter[str] = Counter()

    def count(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        weights = layer.weight.numel() // layer.weight.shape[0]  # that one output value takes
        counted["products"] += out.numel() * weights
        counted["bytes"] += 4 * (args[0].numel() + out.numel())

    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    sample, step, *text = cpu_unet.inputs_of(model, unet.config, torch.float32)
    with torch.inference_mode(), _Attentions() as attention:
        unet(sample, step, *text)
    return dict(counted) | {"attention": attention.products}


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of several runs."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def int8_rate(module: nn.Linear | nn.Conv2d, x: torch.Tensor) -> float:
    """Multiplications a second of one large layer's product, without what surrounds it."""
    layer, steps = random_layer(module, 8, 8)
    steps.select_group(0)
    run = CPU.make_layer(integer_form(layer, "layer"), steps, {"fuse": False})
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(4):
            out = run(x)
    products = [e for e in seen.events() if e.name.startswith("onednn::")]
    seconds = min(e.self_cpu_time_total / 1e6 for e in products)
    return out.numel() * (module.weight.numel() // module.weight.shape[0]) / seconds


def peaks() -> dict[str, float]:
    """What this machine can do: multiplications a second, and bytes copied a second."""
    size = 4096
    a = torch.randn(size, size)
    image = torch.randn(4, 640, 64, 64).contiguous(memory_format=torch.channels_last)
    from_memory = torch.randn(1 << 26)  # 256 MiB
    to_memory = torch.empty_like(from_memory)
    linear = int8_rate(nn.Linear(size, size, bias=False), a)
    convolution = int8_rate(nn.Conv2d(640, 640, 3, padding=1, bias=False), image)
    return {
        "int8": max(linear, convolution),
        "float32": size**3 / fastest(lambda: a @ a),
        "copy": 2 * from_memory.nbytes / fastest(lambda: to_memory.copy_(from_memory)),
    }


def bound(work: dict[str, int], peak: dict[str, float]) -> dict[str, float]:
    """Seconds that the counted work takes at the machine's peaks."""
    return {
        "products": work["products"] / peak["int8"],
        "attention": work["attention"] / peak["int8"],
        "sums and copies": work["bytes"] / peak["copy"],
    }


def run(model: str, repeats: int, folder: Path, peak: dict[str, float]) -> dict[str, Any]:
    """All variants of one model, and the bound."""
    cpu_unet.make_checkpoint(model, (4, 4), folder / model)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for variant in [*VARIANTS, *reversed(VARIANTS)]:
        steps = run_worker(__file__, model, variant, str(folder / model), str(repeats))
        found[variant] += steps
        seconds = ", ".join(f"{sum(step.values()):.3f}" for step in steps)
        print(f"{model} {variant}: {seconds} s", file=sys.stderr)
    medians = {
        variant: {k: statistics.median(step[k] for step in steps) for k in steps[0]}
        for variant, steps in found.items()
    }
    work = work_of(model)
    return {
        "batch": cpu_unet.MODELS[model],
        "seconds": medians,
        "work": work,
        "peaks": peak,
        "bound": bound(work, peak),
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default=",".join(cpu_unet.MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    names = ("MODEL", "VARIANT", "FOLDER", "REPEATS")
    parser.add_argument("--worker", nargs=4, metavar=names, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        model, variant, folder, repeats = args.worker
        print(json.dumps(worker(model, variant, Path(folder), int(repeats))))
        return
    models = args.models.split(",")
    if unknown := sorted(set(models) - set(cpu_unet.MODELS)):
        parser.error(f"models are {', '.join(cpu_unet.MODELS)}; found {', '.join(unknown)}")
    found = read_models(args.out)
    peak = peaks()
    with tempfile.TemporaryDirectory(prefix="quest-") as folder:
        for model in models:
            found[model] = run(model, args.repeats, Path(folder), peak)
            write_json(args.out, {"command": "python benchmarks/cpu_breakdown.py", "models": found})


if __name__ == "__main__":
    main()
