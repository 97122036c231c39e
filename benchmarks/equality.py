"""Is the integer engine equal to its simulation? Layer by layer, and over whole sampling runs.

    python benchmarks/equality.py CHECKPOINT [CHECKPOINT ...] [--samples 1000]

CHECKPOINT: folders written by `questlib.save_pretrained` for mini-ldm4. For each:
- every layer's input in a simulated run, given to both: the largest relative difference of the
  outputs;
- whole runs from the same noise: the CPU engine against the reference engine (the same integers in
  float64), which must be equal bit for bit; and against fake quantization in float32. Fake
  quantization is not equal to itself under another order of summation, since one code that flips
  changes all that follows: its difference to itself in float64 is the floor for any engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import RESULTS, parser_of, write_json

import questlib
from questlib.capture import hooks
from questlib.diffusion.drawing import Samples
from questlib.integer.conversion import convert
from questlib.integer.modules import IntegerLayer
from questlib.quantization.model import quant_layers
from reproduce.evaluation import metrics
from reproduce.evaluation.drawing import sample
from reproduce.models.loading import load_pipeline
from reproduce.provenance import provenance

RESULT = RESULTS / "equality.json"
MODEL = "mini-ldm4"
SEED = 1000


class InFloat64(torch.nn.Module):
    """A UNet in float64, with float32 outside: the same simulation under other rounding errors."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet.double()
        self.config = unet.config

    device = property(lambda self: self.unet.device)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.unet(x.double(), t).sample.float())


@torch.no_grad()
def layer_differences(
    fake: torch.nn.Module, integer: torch.nn.Module, batch: int = 4
) -> dict[str, float]:
    """The largest |integer - fake| / max |fake| of each layer's output, on the same inputs.

    Over all calibrated timesteps.
    """
    worst: dict[str, float] = {}
    layers = {m.name: m for m in integer.modules() if isinstance(m, IntegerLayer)}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
            layers[name].steps.select_group(fake.quest_steps.current)
            difference = ((layers[name](args[0]) - out).abs().max() / out.abs().max()).item()
            worst[name] = max(worst.get(name, 0.0), difference)

        return hook

    shape = (batch, fake.config.in_channels, fake.config.sample_size, fake.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with hooks(fake, {name: compare(name) for name in quant_layers(fake)}):
        for t in fake.quest_steps.timesteps:
            fake(x, t)
    return worst


def difference(a: Samples, b: Samples) -> dict[str, Any]:
    """How far two runs from the same noise lie apart."""
    n = min(len(a.images), len(b.images))
    images = a.images[:n]
    latents = a.latents[:n]
    same = torch.equal(images, b.images[:n]) and torch.equal(latents, b.latents[:n])
    return {
        "samples": n,
        "bit_identical": same,
        "psnr_db": None if same else metrics.psnr(images, b.images[:n]),
        "latent_snr_db": None if same else metrics.latent_snr_db(latents, b.latents[:n]),
    }


def study(folder: Path, samples: int, few: int) -> dict[str, Any]:
    """One checkpoint.

    Args:
        folder: of the checkpoint.
        samples: number of samples of each fast run.
        few: number of samples of each slow run.
    """
    pipe = load_pipeline(MODEL)
    fake = questlib.from_pretrained(folder)
    cpu = convert(fake, "cpu")
    reference = convert(fake, "reference")
    layers = layer_differences(fake, cpu)
    config = fake.quest_config

    def draw(unet: torch.nn.Module | None, n: int) -> Samples:
        return sample(
            pipe,
            n,
            unet=unet,
            num_inference_steps=len(fake.quest_steps.timesteps),
            seed=SEED,
            batch_size=min(100, few),
        )

    full = draw(None, samples)
    simulated = draw(fake, samples)
    integer = draw(cpu, samples)
    exact = draw(reference, few)
    again = draw(InFloat64(questlib.from_pretrained(folder)), few)
    report = questlib.engine_report(cpu)
    return {
        "preset": config.preset_name,
        "bits": f"W{config.weight_bits}A{config.act_bits}",
        "engines": report.engines(),
        "formats": report.formats(),
        "layers": len(layers),
        "max_layer_difference": max(layers.values()),
        "worst_layer": max(layers, key=layers.__getitem__),
        "cpu_against_reference": difference(exact, integer),
        "cpu_against_fake": difference(integer, simulated),
        "fake_float64_against_fake": difference(again, simulated),
        "metrics": {
            name: metrics.evaluate(s.images, reference=MODEL, paired=full.images)
            for name, s in (("fake", simulated), ("cpu", integer))
        },
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument(
        "--few", type=int, default=100, help="samples of the slow runs: reference, float64"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results = []
    for folder in args.checkpoints:
        results.append(study(folder, args.samples, args.few))
        about = {
            "command": "python benchmarks/equality.py CHECKPOINTS",
            "model": MODEL,
            "provenance": provenance(),
        }
        write_json(args.out, about | {"results": results})
        print(json.dumps({k: v for k, v in results[-1].items() if k != "metrics"}, indent=1))


if __name__ == "__main__":
    main()
