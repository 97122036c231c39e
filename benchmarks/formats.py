"""What does each activation format cost, layer by layer?

    python benchmarks/formats.py [--model mini-ldm4] [--bits W4A4]    # about 3 minutes

The relative squared error of every layer's output, W16A4 and W4A4. Each format's grids are searched
on calibration trajectories. Errors are those on the layer's own full-precision inputs in other
trajectories, |y_hat - y|^2 / |y|^2 over all steps, so that no error of an earlier layer enters.

Formats: one scale a `tensor`; free per `channel` (the paper's, no integer form); `carrier` (channel
scales that run in integers); `token` (each token's range).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from common import RESULTS, parser_of, write_json
from torch import nn

import questlib
from questlib.__main__ import parse_bits
from questlib.capture import hooks
from questlib.config import QuantConfig
from questlib.config_groups import Granularity
from questlib.errors import ConfigError
from questlib.quantization.model import quant_layers, set_mode
from reproduce.models.loading import load_pipeline
from reproduce.provenance import provenance

RESULT = RESULTS / "formats.json"
STEPS = 20
SAMPLES = 64


@torch.no_grad()
def layer_errors(
    unet: torch.nn.Module, teacher: torch.nn.Module, calib: questlib.Calibration, batch: int = 8
) -> dict[str, float]:
    """|y_hat - y|^2 / |y|^2 of each quantized layer.

    Each gets what the full-precision model's layer receives on `calib`.
    """
    layers = quant_layers(unet)
    error = dict.fromkeys(layers, 0.0)
    power = dict.fromkeys(layers, 0.0)

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
            error[name] += (layers[name](args[0]) - out).square().sum().item()
            power[name] += out.square().sum().item()

        return hook

    with hooks(teacher, {name: compare(name) for name in layers}):
        for x, t in zip(calib.x, calib.t, strict=True):
            unet.quest_steps.select(t)
            teacher(x[:batch], t)
    return {n: error[n] / power[n] for n in layers}


def study(model: str, bits: tuple[int, int]) -> dict[str, Any]:
    """The errors of one model in each format."""
    pipe = load_pipeline(model)
    seen = questlib.calibrate(pipe, SAMPLES, STEPS, seed=0)
    unseen = questlib.calibrate(pipe, SAMPLES, STEPS, seed=1)
    layers: dict[str, dict[str, Any]] = {}
    for granularity in get_args(Granularity):
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
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="mini-ldm4")
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    try:
        bits = parse_bits(args.bits)
    except ConfigError as error:
        parser.error(str(error))
    result = study(args.model, bits)
    command = f"python benchmarks/formats.py --model {args.model} --bits {args.bits}"
    write_json(args.out, {"command": command, **result, "provenance": provenance()})


if __name__ == "__main__":
    main()
