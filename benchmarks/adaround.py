"""AdaRound's regularizer: how many roundings it decides, and what is left of a block's error.

Every weight of the regularizer is run on an embedded model, with activations in full precision.
Errors are taken on trajectories that were not calibrated on. A block's error is that of its output
in the quantized model, relative to the full-precision block's, in dB; "nearest" is the same block
behind the same quantized blocks, with its weights rounded to nearest.

    python benchmarks/adaround.py --budgets 150:3e-2 1000:1e-3 --weights 0.01 0.1 1 10
"""

from __future__ import annotations

from typing import Any

import common
import held_out
import torch
from torch import nn

import questlib
from questlib.adaround import BlockRecorder, decided_share, reconstruct_weights
from questlib.calibration import Calibration
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import quant_layers, set_mode
from questlib.quantization.preparation import prepare
from reproduce.datasets import DATASETS
from reproduce.models.loading import load_pipeline
from reproduce.provenance import provenance
from reproduce.scales import MINI_LAYERS


def prepared(unet: nn.Module, config: questlib.QuantConfig, t: torch.Tensor) -> nn.Module:
    """A quantized copy, weights to nearest, activations in full precision."""
    student = prepare(unet, config, t)
    set_mode(student, weights=True, acts=False)
    for layer in quant_layers(student).values():
        layer.freeze()
    return student


@torch.no_grad()
def block_errors(
    student: nn.Module, teacher: nn.Module, calib: Calibration, config: questlib.QuantConfig
) -> dict[str, tuple[float, float]]:
    """The held-out error of each block: with weights to nearest, and as it is."""
    original = quant_layers(prepared(teacher, config, calib.t))
    names = {id(layer): name for name, layer in quant_layers(student).items()}
    recorder = BlockRecorder(student, teacher, calib, config)
    found = {}
    for name in recorder.names:
        (data,) = recorder.record(name)
        every = torch.arange(len(data.targets))
        args, kwargs = data.calls.rows(every)
        student.quest_steps.select_group(data.groups)
        learned = held_out.decibel(data.block(*args, **kwargs), data.targets)
        layers = [x for x in data.block.modules() if isinstance(x, QuantLayer)]
        kept = [layer.w_hat for layer in layers]
        for layer in layers:
            layer.w_hat = original[names[id(layer)]].w_hat
        nearest = held_out.decibel(data.block(*args, **kwargs), data.targets)
        for layer, w_hat in zip(layers, kept, strict=True):
            layer.w_hat = w_hat
        found[name] = (nearest, learned)
    return found


def run(
    teacher: nn.Module,
    config: questlib.QuantConfig,
    calib: Calibration,
    others: Calibration,
) -> dict[str, Any]:
    """AdaRound of one configuration, and what it gave."""
    student = prepared(teacher, config, calib.t)
    nearest = held_out.error_db(student, others)
    record = reconstruct_weights(student, teacher, calib, config, progress=True)
    set_mode(student, weights=True, acts=False)
    errors = block_errors(student, teacher, others, config)
    return {
        **config.adaround.model_dump(),
        "decided": decided_share(record),
        "model_nearest_db": nearest,
        "model_db": held_out.error_db(student, others),
        "blocks": {
            name: {"nearest_db": before, "db": after, "decided": record[name][0] / record[name][1]}
            for name, (before, after) in errors.items()
        },
    }


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--model", default="mini-ldm4")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.01, 0.1, 1.0, 3.0, 10.0])
    parser.add_argument("--budgets", nargs="+", default=["150:3e-2"], metavar="ITERS:LR")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--out", default="adaround", help="name of the result file")
    options = parser.parse_args()

    pipe = load_pipeline(options.model)
    how = vars(DATASETS["bedrooms"].setting("mini").sampling)
    calib, others = held_out.calibrations(pipe, 64, **how)
    result: dict[str, Any] = {"model": options.model, "bits": options.bits, "runs": []}
    for budget in options.budgets:
        iters, lr = budget.split(":")
        for batch_size in options.batch_sizes:
            for weight in options.weights:
                config = questlib.QuantConfig.preset(
                    "quest",
                    options.bits,
                    16,
                    adaround_iters=int(iters),
                    adaround_lr=float(lr),
                    adaround_batch_size=batch_size,
                    round_weight=weight,
                    recon_samples=128,
                    **MINI_LAYERS,
                )
                found = run(pipe.unet, config, calib, others)
                result["runs"].append(found)
                blocks = found["blocks"].values()
                mean = sum(b["db"] for b in blocks) / len(blocks)
                print(
                    f"{iters} x {lr}, batch {batch_size}, weight {weight:g}: "
                    f"decided {found['decided']:.1%}, blocks {mean:.2f} dB, "
                    f"model {found['model_nearest_db']:.2f} -> {found['model_db']:.2f} dB",
                    flush=True,
                )
                common.write_json(
                    common.RESULTS / f"{options.out}.json", result | {"provenance": provenance()}
                )


if __name__ == "__main__":
    main()
