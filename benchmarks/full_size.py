"""Full-size UNets with random weights through the whole of quantization on this machine.

    python benchmarks/full_size.py [--models sd14,ldm4-imagenet] [--out FILE]

Time and memory of each stage. Each model runs in a process of its own: one batch of guided
calibration, quantize (W4A4, preset quest: ranges, AdaRound with a few iterations a block), a few
finetuning steps of both stages with `save_memory`, checkpoint. It shows that a paper-size model
goes through, and what that takes; iterations are far too few to mean anything for quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import torch
from common import RESULTS, parser_of, read_models, write_json
from cpu_unet import SD14
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel

import questlib
from questlib.config import QuantConfig
from questlib.finetuning.stages import select_stages
from reproduce.provenance import PeakMemory, provenance

RESULT = RESULTS / "full_size.json"
FEW = dict(
    adaround_iters=2,
    recon_samples=1,
    tla_iters=2,
    cma_iters=2,
    batch_size=1,
    calib_batch=2,
    forward_batch=1,
    save_memory=True,
)
# CompVis cin256-v2; attention_head_dim is diffusers' name for the number of heads
LDM4_IMAGENET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (192, 384, 576, 960),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "attention_head_dim": 1,
    "cross_attention_dim": 512,
}


class FullSize(NamedTuple):
    """A full-size model."""

    unet: dict[str, Any]
    scheduler: Any
    context: tuple[int, int]  # tokens, width
    guidance_scale: float


MODELS = {
    "sd14": FullSize(
        SD14,
        PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        (77, 768),
        7.5,
    ),
    "ldm4-imagenet": FullSize(LDM4_IMAGENET, DDIMScheduler(clip_sample=False), (1, 512), 3.0),
}


class RandomContext:
    """Stands in for a class embedder: a random context for each label."""

    config = SimpleNamespace(num_classes=1000)
    null_class = 1000

    def __init__(self, shape: tuple[int, int]) -> None:
        self.table = torch.randn(1001, *shape, generator=torch.Generator().manual_seed(0))

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        return self.table[labels]


def measure(model: str, folder: Path) -> dict[str, Any]:
    """Run one model through all stages; seconds, peak memory of the process, sizes."""
    torch.manual_seed(0)
    settings, scheduler, shape, guidance = MODELS[model]
    seconds: dict[str, float] = {}

    def timed(stage: str, call):
        start = time.perf_counter()
        out = call()
        seconds[stage] = time.perf_counter() - start
        return out

    resident = psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        unet = timed("build", lambda: UNet2DConditionModel(**settings).eval().requires_grad_(False))
        pipe = SimpleNamespace(unet=unet, scheduler=scheduler, class_embedder=RandomContext(shape))
        config = QuantConfig.preset("quest", 4, 4, **FEW)
        calib = timed("calibrate", lambda: questlib.calibrate(pipe, 1, 2, guidance_scale=guidance))
        student = timed("quantize", lambda: questlib.quantize(unet, config, calib, progress=True))
        log = timed(
            "finetune", lambda: questlib.finetune(student, unet, calib, config, progress=True)
        )
        size = timed("save", lambda: questlib.save_pretrained(student, folder))
    full = sum(p.numel() for p in unet.parameters()) * 4
    trained = {
        stage.name: sum(layer.weight.numel() for layer in stage.layers.values())
        for stage in select_stages(student, config)
    }
    return {
        "parameters": full // 4,
        "fp32_bytes": full,
        "checkpoint_bytes": size,
        "peak_bytes": resident + memory.bytes,
        "seconds": seconds | {f"quantize: {k}": v for k, v in student.quest_log["seconds"].items()},
        "trained_weights": trained,
        "loss": log["loss"],
        "calibration_x": list(calib.x.shape),
        "context": list(calib.context.shape),
        "settings": FEW,
        "threads": torch.get_num_threads(),
    }


def run(model: str) -> dict[str, Any]:
    """`measure` in a process of its own: its peak is not hidden by memory that others freed."""
    with tempfile.TemporaryDirectory(prefix="quest-") as folder:
        command = [sys.executable, __file__, "--worker", model, folder]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], Path(args.worker[1]))))
        return
    unknown = sorted(set(args.models.split(",")) - set(MODELS))
    if unknown:
        parser.error(f"models are {', '.join(MODELS)}; found {', '.join(unknown)}")
    found = read_models(args.out)
    for model in args.models.split(","):
        found[model] = run(model) | {"provenance": provenance()}
        write_json(args.out, {"command": "python benchmarks/full_size.py", "models": found})


if __name__ == "__main__":
    main()
