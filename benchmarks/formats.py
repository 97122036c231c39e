"""What does each activation format cost, layer by layer? Relative squared error of every layer's output, W16A4 and W4A4.

    python benchmarks/formats.py [--model mini-ldm4] [--bits W4A4]    # about 3 minutes; writes benchmarks/results/formats.json

Each format's grids are searched on calibration trajectories; errors are those on the layer's own full-precision inputs in other
trajectories, |y_hat - y|^2 / |y|^2 over all steps, so that no error of an earlier layer enters. Formats: one scale a `tensor`;
free per `channel` (the paper's, no integer form); `carrier` (channel scales that run in integers); `token` (each token's range).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import questlib
from questlib.__main__ import parse_bits
from questlib.config import CHOICES, QuantConfig
from questlib.errors import ConfigError
from questlib.quantization.model import quant_layers, set_mode
from reproduce.models.loading import load_pipeline
from reproduce.provenance import provenance

RESULT = Path(__file__).parent / "results" / "formats.json"
STEPS, SAMPLES = 20, 64


@torch.no_grad()
def layer_errors(
    unet: torch.nn.Module, teacher: torch.nn.Module, calib: questlib.Calibration, batch: int = 8
) -> dict[str, float]:
    """|y_hat - y|^2 / |y|^2 of each quantized layer, fed with what the full-precision model's layer receives on `calib`."""
    layers = quant_layers(unet)
    error, power = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def compare(name: str):
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            error[name] += (layers[name](args[0]) - out).square().sum().item()
            power[name] += out.square().sum().item()

        return hook

    handles = [teacher.get_submodule(n).register_forward_hook(compare(n)) for n in layers]
    try:
        for x, t in zip(calib.x, calib.t, strict=True):
            unet.quest_steps.current = unet.quest_steps.lookup(t)
            teacher(x[:batch], t)
    finally:
        for handle in handles:
            handle.remove()
    return {n: error[n] / power[n] for n in layers}


def study(model: str, bits: tuple[int, int]) -> dict[str, Any]:
    pipe = load_pipeline(model)
    seen, unseen = (questlib.calibrate(pipe, SAMPLES, STEPS, seed=s) for s in (0, 1))
    layers: dict[str, dict[str, Any]] = {}
    for granularity in CHOICES["act_granularity"]:
        config = QuantConfig.preset("quest", *bits, act_granularity=granularity, adaround=False)
        unet = questlib.quantize(pipe.unet, config, seen)
        for weights in (False, True):
            set_mode(unet, weights=weights)
            for name, value in layer_errors(unet, pipe.unet, unseen).items():
                row = layers.setdefault(name, {"role": quant_layers(unet)[name].role})
                row[f"{'quantized' if weights else 'full'} weights, {granularity}"] = value
    return {
        "model": model,
        "bits": f"W{bits[0]}A{bits[1]}",
        "steps": STEPS,
        "samples": SAMPLES,
        "layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-ldm4")
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    try:
        bits = parse_bits(args.bits)
    except ConfigError as error:
        parser.error(str(error))
    result = study(args.model, bits)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/formats.py --model {args.model} --bits {args.bits}"
    args.out.write_text(
        json.dumps({"command": command, **result, "provenance": provenance()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
