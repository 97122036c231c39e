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
import held_out
from torch import nn

import questlib
from questlib.calibration import Calibration
from reproduce.choices import Choices
from reproduce.datasets import DATASETS
from reproduce.models.loading import load_pipeline
from reproduce.plan import make_plan
from reproduce.provenance import provenance

THEIRS = {"before_db": 9.9, "after_db": 10.9, "tla_iters": 240, "cma_iters": 320}


def measure(
    teacher: nn.Module, config: questlib.QuantConfig, calib: Calibration, others: Calibration
) -> dict[str, Any]:
    """One preset: quantized, then finetuned."""
    unet = questlib.quantize(teacher, config, calib, progress=True)
    before = -held_out.error_db(unet, others)
    log = questlib.finetune(unet, teacher, calib, config, progress=True)
    return {
        "preset": config.preset_name,
        "tla_iters": config.finetuning.tla_iters,
        "cma_iters": config.finetuning.cma_iters,
        "before_db": before,
        "after_db": -held_out.error_db(unet, others),
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
    calib, others = held_out.calibrations(pipe, setting.calib_samples, **how)
    runs = []
    for preset in options.presets:
        row = next(r for r in plan.rows if r.preset == preset and r.bits == "W4A4")
        found = measure(pipe.unet, plan.config(row, 0), calib, others)
        runs.append(found)
        print(f"{preset}: {found['before_db']:.1f} -> {found['after_db']:.1f} dB", flush=True)
        result = {"model": setting.model, "theirs": THEIRS, "runs": runs}
        common.write_json(common.RESULTS / "release.json", result | {"provenance": provenance()})


if __name__ == "__main__":
    main()
