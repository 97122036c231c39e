"""One UNet step on this CPU: floating point, OpenVINO, torchao, and the integer engine.

    python benchmarks/cpu_unet.py [--models mini-ldm4,sd14] [--variants fp32,bf16,...] [--repeats 3]

Time, memory, and bytes on disk. Floating point is eager and compiled. The variants of OpenVINO and
torchao need `pip install -e '.[benchmarks]'`.

`sd14` is a full-size Stable Diffusion v1.4 UNet with random weights, batch 2 (classifier-free
guidance), 64x64 latents; speed does not depend on the values. `mini-ldm4` is the embedded model,
batch 100.

Each variant runs in processes of its own, once in the given order and once in reverse (A B B A), so
that a machine that warms up or is disturbed favours none. Values are medians over both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino_unet
import psutil
import torch
import torchao_unet
from common import RESULTS, parser_of, read_models, run_worker, write_json
from diffusers import UNet2DConditionModel

import questlib
from questlib.config import QuantConfig
from questlib.integer.synthetic import random_grids
from questlib.kernels.library import SWITCH
from questlib.quantization.preparation import prepare
from reproduce.models.loading import load_pipeline
from reproduce.provenance import PeakMemory, provenance

RESULT = RESULTS / "cpu_unet.json"
# CompVis/stable-diffusion-v1-4, unet/config.json
SD14 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
MODELS = {"mini-ldm4": 100, "sd14": 2}  # batch
FLOAT = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp32-compiled": torch.float32,
    "bf16-compiled": torch.bfloat16,
}
# bits; -fused: fuse=True; -bf16: norms and residuals in bf16; -torch: without the compiled kernels
INTEGER = {
    "w8a8": (8, 8),
    "w8a8-torch": (8, 8),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w4a4-torch": (4, 4),
    "w4a4-bf16": (4, 4),
    "w8a8-fused": (8, 8),
    "w4a4-fused": (4, 4),
    "w8a8-fused-bf16": (8, 8),
    "w4a4-fused-bf16": (4, 4),
}
TIMESTEPS = torch.arange(1, 1000, 50)


def float_unet(model: str) -> torch.nn.Module:
    """The full-precision UNet."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD14) if model == "sd14" else load_pipeline(model).unet
    return unet.eval().requires_grad_(False)


def make_checkpoint(model: str, bits: tuple[int, int], folder: Path) -> int:
    """Write a checkpoint with grids that were never calibrated; returns its size in bytes."""
    config = QuantConfig.preset("quest", *bits, weight_range="minmax", adaround=False)
    unet = prepare(float_unet(model), config, TIMESTEPS)
    random_grids(unet)
    return questlib.save_pretrained(unet, folder)


def inputs_of(model: str, config: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """A call of the UNet: sample [B, C, H, W], timestep [1], and text [B, 77, 768] for `sd14`."""
    size = config.sample_size
    sample = torch.randn(MODELS[model], config.in_channels, size, size, dtype=dtype)
    text = [torch.randn(len(sample), 77, 768, dtype=dtype)] if model == "sd14" else []
    return [sample, torch.ones(1), *text]


def load(model: str, variant: str, folder: Path) -> tuple[Callable[[], object], dict[str, Any]]:
    """One variant: a function that runs a step, and the engines of its layers."""
    if variant in openvino_unet.VARIANTS:
        config = float_unet(model).config
        run = openvino_unet.load(variant, folder, torch.get_num_threads())
        inputs = inputs_of(model, config, torch.float32)
        return (lambda: run(inputs)), {}
    if variant in torchao_unet.VARIANTS:
        unet = float_unet(model)
        inputs = inputs_of(model, unet.config, torch.float32)
        run = torchao_unet.load(variant, unet, inputs)
        return (lambda: run(inputs)), {}
    if variant in FLOAT:
        dtype = FLOAT[variant]
        unet = float_unet(model).to(dtype=dtype)
        unet = torch.compile(unet) if variant.endswith("compiled") else unet
        engines = {}
    else:
        dtype = torch.bfloat16 if variant.endswith("bf16") else torch.float32
        fuse = "fused" in variant
        unet = questlib.from_pretrained(folder, engine="cpu", dtype=dtype, fuse=fuse)
        engines = questlib.engine_report(unet).engines()
    sample, _, *text = inputs_of(model, unet.config, dtype)
    return (lambda: unet(sample, 1, *text)), engines


def worker(model: str, variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Load one variant and time its steps; in a process of its own."""
    start = time.perf_counter()
    run, engines = load(model, variant, folder)
    loaded = time.perf_counter() - start

    def step() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    with torch.inference_mode():
        first = step()  # compiles, fills caches
        seconds = [step() for _ in range(repeats)]
        gc.collect()
        # A step of its own: the thread that watches memory would slow the steps that are timed.
        with PeakMemory() as memory:
            resident = psutil.Process().memory_info().rss
            step()
    return {
        "load_s": loaded,
        "first_s": first,
        "step_s": seconds,
        "resident_bytes": resident,
        "peak_bytes": resident + memory.bytes,
        "threads": torch.get_num_threads(),
        "engines": engines,
    }


def measure(model: str, variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    """`worker` in a process of its own."""
    print(f"{model} {variant} ...", end=" ", file=sys.stderr, flush=True)
    environment = {k: v for k, v in os.environ.items() if k != SWITCH}
    if variant.endswith("-torch"):
        environment[SWITCH] = "1"
    row = run_worker(__file__, model, variant, str(folder), str(repeats), env=environment)
    print(f"{statistics.median(row['step_s']):.3f} s", file=sys.stderr)
    return row


def run(model: str, variants: list[str], repeats: int, folder: Path) -> dict[str, Any]:
    """All variants of one model."""
    parameters = sum(p.numel() for p in float_unet(model).parameters())
    sizes: dict[Any, int] = {
        bits: make_checkpoint(model, bits, folder / f"{model}-{bits}")
        for bits in {INTEGER[v] for v in variants if v in INTEGER}
    }
    models = folder / f"{model}-openvino"
    if others := [v for v in variants if v in openvino_unet.VARIANTS]:
        unet = float_unet(model)
        inputs = inputs_of(model, unet.config, torch.float32)
        written = openvino_unet.write_models(unet, inputs, models, others)
        sizes |= {v: written[openvino_unet.VARIANTS[v][0]] for v in others}
        del unet
    if compiled := [v for v in variants if v in torchao_unet.VARIANTS]:
        sizes |= dict.fromkeys(compiled, torchao_unet.size_of(float_unet(model)))
    gc.collect()
    rows: dict[str, list[dict[str, Any]]] = {v: [] for v in variants}
    for variant in [*variants, *reversed(variants)]:
        place = models if variant in others else folder / f"{model}-{INTEGER.get(variant)}"
        rows[variant].append(measure(model, variant, place, repeats))
    result: dict[str, dict[str, Any]] = {}
    for variant, runs in rows.items():
        if variant in FLOAT:
            disk = parameters * FLOAT[variant].itemsize
        else:
            disk = sizes[INTEGER.get(variant, variant)]
        result[variant] = {
            "step_s": statistics.median(s for r in runs for s in r["step_s"]),
            "resident_bytes": min(r["resident_bytes"] for r in runs),
            "peak_bytes": max(r["peak_bytes"] for r in runs),
            "disk_bytes": disk,
            "disk_of_fp32": disk / (4 * parameters),
            "runs": runs,
        }
    for row in result.values():
        row |= {f"times_{v}": result[v]["step_s"] / row["step_s"] for v in FLOAT if v in result}
    for variant in [v for v in result if f"{v}-torch" in result]:
        step, without = (result[v]["step_s"] for v in (variant, f"{variant}-torch"))
        print(
            f"{model} {variant}: {step:.3f} s with kernels, {without:.3f} s without, "
            f"{without / step:.2f} times as fast",
            file=sys.stderr,
        )
    return {"batch": MODELS[model], "parameters": parameters, "variants": result}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    others = (openvino_unet, torchao_unet)
    known = [*FLOAT, *(v for package in others for v in package.VARIANTS), *INTEGER]
    missing = [v for package in others if not package.is_there() for v in package.VARIANTS]
    parser.add_argument("--variants", default=",".join(v for v in known if v not in missing))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--worker",
        nargs=4,
        metavar=("MODEL", "VARIANT", "FOLDER", "REPEATS"),
        help=argparse.SUPPRESS,
    )
    args = parser.parse_args()
    if args.worker:
        model, variant, folder, repeats = args.worker
        print(json.dumps(worker(model, variant, Path(folder), int(repeats))))
        return
    models = args.models.split(",")
    variants = args.variants.split(",")
    unknown = sorted(set(models) - set(MODELS)) + sorted(set(variants) - set(known))
    if unknown:
        parser.error(
            f"models are {', '.join(MODELS)}, variants {', '.join(known)}; "
            f"found {', '.join(unknown)}"
        )
    if absent := sorted(set(variants) & set(missing)):
        parser.error(
            f"{', '.join(absent)}: expected openvino, nncf and torchao; "
            "pip install -e '.[benchmarks]'"
        )
    found = read_models(args.out)
    with tempfile.TemporaryDirectory(prefix="quest-") as folder:
        for model in models:
            row = run(model, variants, args.repeats, Path(folder))
            found[model] = row | {"provenance": provenance()}
            write_json(args.out, {"command": "python benchmarks/cpu_unet.py", "models": found})


if __name__ == "__main__":
    main()
