"""One UNet step on this CPU: floating point, eager and compiled, against the integer engine. Time, memory, bytes on disk.

    python benchmarks/cpu_unet.py [--models mini-ldm4,sd14] [--variants fp32,bf16,...] [--repeats 3]

`sd14` is a full-size Stable Diffusion v1.4 UNet with random weights, batch 2 (classifier-free guidance), 64x64 latents; speed
does not depend on the values. `mini-ldm4` is the embedded model, batch 100. Each variant runs in processes of its own, once in
the given order and once in reverse (A B B A), so that a machine that warms up or is disturbed favours none; medians over both.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel

import questlib
from questlib.config import QuantConfig
from questlib.integer.synthetic import random_grids
from questlib.quantization.preparation import prepare
from reproduce.models.loading import load_pipeline
from reproduce.provenance import PeakMemory, provenance

RESULT = Path(__file__).parent / "results" / "cpu_unet.json"
SD14 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # CompVis/stable-diffusion-v1-4, unet/config.json
MODELS = {"mini-ldm4": 100, "sd14": 2}  # batch
FLOAT = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp32-compiled": torch.float32,
    "bf16-compiled": torch.bfloat16,
}
INTEGER = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w4a4-bf16": (4, 4),
}  # -bf16: norms and residuals in bf16
TIMESTEPS = torch.arange(1, 1000, 50)


def float_unet(model: str) -> torch.nn.Module:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD14) if model == "sd14" else load_pipeline(model).unet
    return unet.eval().requires_grad_(False)


def make_checkpoint(model: str, bits: tuple[int, int], folder: Path) -> int:
    config = QuantConfig.preset("quest", *bits, weight_range="minmax", adaround=False)
    unet = prepare(float_unet(model), config, TIMESTEPS)
    random_grids(unet)
    return questlib.save_pretrained(unet, folder)


def worker(model: str, variant: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Load one variant and time its steps; in a process of its own."""
    start = time.perf_counter()
    dtype = FLOAT.get(variant, torch.bfloat16 if variant.endswith("bf16") else torch.float32)
    if variant in FLOAT:
        unet = float_unet(model).to(dtype=dtype)
        unet = torch.compile(unet) if variant.endswith("compiled") else unet
    else:
        unet = questlib.from_pretrained(folder, engine="cpu", dtype=dtype)
    loaded = time.perf_counter() - start
    shape = (
        MODELS[model],
        unet.config.in_channels,
        unet.config.sample_size,
        unet.config.sample_size,
    )
    x, args = torch.randn(shape, dtype=dtype), {}
    if model == "sd14":
        args["encoder_hidden_states"] = torch.randn(shape[0], 77, 768, dtype=dtype)
    with torch.inference_mode():
        start = time.perf_counter()
        unet(x, 1, **args)  # compiles, fills caches
        first, seconds = time.perf_counter() - start, []
        for _ in range(repeats):
            start = time.perf_counter()
            unet(x, 1, **args)
            seconds.append(time.perf_counter() - start)
        gc.collect()
        with PeakMemory() as memory:  # its watching thread would slow the steps that are timed
            resident = psutil.Process().memory_info().rss
            unet(x, 1, **args)
    engines = (
        {} if variant in FLOAT else questlib.engine_report(unet)["engine"].value_counts().to_dict()
    )
    return {
        "load_s": loaded,
        "first_s": first,
        "step_s": seconds,
        "resident_bytes": resident,
        "peak_bytes": resident + memory.bytes,
        "threads": torch.get_num_threads(),
        "engines": engines,
    }


def run(model: str, variants: list[str], repeats: int, folder: Path) -> dict[str, Any]:
    parameters = sum(p.numel() for p in float_unet(model).parameters())
    sizes = {
        bits: make_checkpoint(model, bits, folder / f"{model}-{bits}")
        for bits in {INTEGER[v] for v in variants if v in INTEGER}
    }
    gc.collect()
    rows: dict[str, Any] = {v: [] for v in variants}
    for variant in [*variants, *reversed(variants)]:
        command = [
            sys.executable,
            __file__,
            "--worker",
            model,
            variant,
            str(folder / f"{model}-{INTEGER.get(variant)}"),
            str(repeats),
        ]
        print(f"{model} {variant} ...", end=" ", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{model} {variant} failed:\n{done.stderr[-2000:]}")
        rows[variant].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{statistics.median(rows[variant][-1]['step_s']):.3f} s", file=sys.stderr)
    result = {}
    for variant, runs in rows.items():
        step = statistics.median(s for r in runs for s in r["step_s"])
        disk = (
            sizes[INTEGER[variant]]
            if variant in INTEGER
            else parameters * (2 if FLOAT[variant] == torch.bfloat16 else 4)
        )
        result[variant] = {
            "step_s": step,
            "resident_bytes": min(r["resident_bytes"] for r in runs),
            "peak_bytes": max(r["peak_bytes"] for r in runs),
            "disk_bytes": disk,
            "disk_of_fp32": disk / (4 * parameters),
            "runs": runs,
        }
    for row in result.values():
        row |= {f"times_{v}": result[v]["step_s"] / row["step_s"] for v in FLOAT if v in result}
    return {"batch": MODELS[model], "parameters": parameters, "variants": result}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--variants", default=",".join([*FLOAT, *INTEGER]))
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
    models, variants = args.models.split(","), args.variants.split(",")
    unknown = sorted(set(models) - set(MODELS)) + sorted(set(variants) - set(FLOAT) - set(INTEGER))
    if unknown:
        parser.error(
            f"models are {', '.join(MODELS)}, variants {', '.join([*FLOAT, *INTEGER])}; found {', '.join(unknown)}"
        )
    found = json.loads(args.out.read_text())["models"] if args.out.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="quest-") as folder:
        for model in models:
            found[model] = run(model, variants, args.repeats, Path(folder)) | {
                "provenance": provenance()
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(
                json.dumps({"command": "python benchmarks/cpu_unet.py", "models": found}, indent=1)
                + "\n"
            )


if __name__ == "__main__":
    main()
