"""The release's preset step by step: its error before and after finetuning, beside the release's.

The error is that of the predicted noise at every step of trajectories that were not calibrated on,
as a signal-to-noise ratio in dB; more is better. THEIRS was measured by running the official
release with its README's flags for LSUN-Bedrooms at W4A4 on a model of this kind, with the same
calibration and noise (November 2026, one seed). No code of it is used here.

    python benchmarks/release.py --presets quest-release quest-paper quest
"""

from __future__ import annotations

from typing import Any

import common
import torch
from torch import nn

import questlib
from questlib.calibration import Calibration
from reproduce.choices import Choices
from reproduce.datasets import DATASETS
from reproduce.models.loading import load_pipeline
from reproduce.plan import make_plan
from reproduce.provenance import provenance

HELD_OUT_SEED = 1000
THEIRS = {"before_db": 9.9, "after_db": 10.9, "tla_iters": 240, "cma_iters": 320}


@torch.no_grad()
def held_out_db(unet: nn.Module, calib: Calibration) -> float:
    """The signal-to-noise ratio of the predicted noise, over all steps."""
    every = torch.arange(calib.x.shape[1])
    outputs = torch.stack([calib.batch(i, every).run(unet) for i in range(len(calib.t))])
    return 10 * (calib.eps.pow(2).mean() / (outputs - calib.eps).pow(2).mean()).log10().item()


def measure(
    teacher: nn.Module, config: questlib.QuantConfig, calib: Calibration, held_out: Calibration
) -> dict[str, Any]:
    """One preset: quantized, then finetuned."""
    unet = questlib.quantize(teacher, config, calib, progress=True)
    before = held_out_db(unet, held_out)
    log = questlib.finetune(unet, teacher, calib, config, progress=True)
    return {
        "preset": config.preset_name,
        "tla_iters": config.finetuning.tla_iters,
        "cma_iters": config.finetuning.cma_iters,
        "before_db": before,
        "after_db": held_out_db(unet, held_out),
        "decided": unet.quest_log["decided"],
        "finetune_seconds": log["seconds"],
    }


def main() -> None:
    parser = common.parser_of(__doc__)
    parser.add_argument("--presets", nargs="+", default=["quest-release", "quest-paper", "quest"])
    options = parser.parse_args()

    plan = make_plan("table3", Choices(scale="mini"), dry=True)
    setting = DATASETS["bedrooms"].setting("mini")
    pipe = load_pipeline(setting.model)
    how = vars(setting.sampling)
    calib = questlib.calibrate(pipe, setting.calib_samples, seed=0, **how)
    held_out = questlib.calibrate(pipe, 16, seed=HELD_OUT_SEED, **how)
    runs = []
    for preset in options.presets:
        row = next(r for r in plan.rows if r.preset == preset and r.bits == "W4A4")
        found = measure(pipe.unet, plan.config(row, 0), calib, held_out)
        runs.append(found)
        print(f"{preset}: {found['before_db']:.1f} -> {found['after_db']:.1f} dB", flush=True)
        result = {"model": setting.model, "theirs": THEIRS, "runs": runs}
        common.write_json(common.RESULTS / "release.json", result | {"provenance": provenance()})


if __name__ == "__main__":
    main()
