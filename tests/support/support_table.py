"""Takes each tiny pipeline through all stages, and writes what came of it.

python tests/support/support_table.py            # prints the table
python tests/support/support_table.py --write    # and writes results/support.json
python tests/support/support_table.py sdxl sd    # these alone; with --write the others stay
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import diffusers
import numpy as np
import torch
import transformers
from tiny_cases import CASES

import questlib
from questlib import QuantConfig, calibrate, convert, finetune, quantize
from questlib.denoisers import PARTS
from questlib.errors import QuestError

WRITTEN = Path(__file__).resolve().parents[2] / "results" / "support.json"

FAST = dict(
    adaround_iters=2,
    act_iters=2,
    tla_iters=2,
    cma_iters=2,
    batch_size=2,
    recon_samples=4,
    calib_batch=4,
)

STAGES = ("calibrate", "exact", "minmax", "quest", "finetune", "save", "integers", "pipeline")
"""What each pipeline goes through: the methods of `Trial`, which say what each must show."""


class Failure(Exception):
    """A stage that did not show what it must."""


def decibels(signal: torch.Tensor, found: torch.Tensor) -> float:
    """SNR in dB of a tensor beside the right one."""
    error = (found.double() - signal.double()).pow(2).mean()
    ratio = signal.double().pow(2).mean() / error.clamp_min(1e-30)
    return 10 * ratio.log10().item()


class Trial:
    """One pipeline on its way through the stages."""

    def __init__(self, name: str, folder: Path) -> None:
        self.pipe, self.call = CASES[name].make()
        self.part = next(part for part in PARTS if hasattr(self.pipe, part))
        self.full = getattr(self.pipe, self.part)
        self.folder = folder
        half = self.full.dtype != torch.float32
        self.same = 30.0 if half else 60.0  # dB from which two results are one

    def _images(self) -> torch.Tensor:
        images = self.pipe(**self.call, generator=torch.Generator().manual_seed(0))[0]
        first = images[0] if isinstance(images, list | tuple) else images
        return torch.as_tensor(np.asarray(first), dtype=torch.float64)

    def _worst(self, unet: Any) -> float:
        """The least SNR of all recorded steps."""
        return min(decibels(batch.eps, batch.run(unet).detach()) for batch in self.steps)

    def _expect(self, value: float, least: float) -> float:
        if not value >= least:  # also where it is not a number
            raise Failure(f"{value:.1f} dB, expected {least} dB or more")
        return round(value, 1)

    def calibrate(self) -> float:
        """Two calls are recorded, and a replay gives what was recorded."""
        self.calib = calibrate(self.pipe, calls=[self.call, self.call])
        self.images = self._images()
        numbers = range(len(self.calib.t))
        self.steps = [self.calib.batch(i, torch.arange(self.calib.width(i))) for i in numbers]
        return self._expect(min(self._worst(self.full), 200.0), self.same)

    def exact(self) -> float:
        """With all quantizers off (W16A16) it gives what full precision gives."""
        unet = quantize(self.full, QuantConfig.preset("minmax", 16, 16), self.calib)
        return self._expect(min(self._worst(unet), 200.0), self.same)

    def minmax(self) -> float:
        """Min-max ranges at W8A8, without training: 6 dB or better at each step."""
        unet = quantize(self.full, QuantConfig.preset("minmax", 8, 8), self.calib)
        return self._expect(self._worst(unet), 6.0)

    def quest(self) -> float:
        """QuEST's ranges and AdaRound at W8A8: 20 dB or better at each step."""
        unet = quantize(self.full, QuantConfig.preset("quest", 8, 8, **FAST), self.calib)
        return self._expect(self._worst(unet), 20.0)

    def finetune(self) -> float:
        """QuEST at W4A4 goes through AdaRound, TLA and CMA: 3 dB or better at each step."""
        config = QuantConfig.preset("quest", 4, 4, **FAST)
        self.unet = quantize(self.full, config, self.calib)
        finetune(self.unet, self.full, self.calib, config)
        self.trained = self._worst(self.unet)
        return self._expect(self.trained, 3.0)

    def save(self) -> str:
        """diffusers saves it and gives it back, bit for bit."""
        setattr(self.pipe, self.part, self.unet)
        if hasattr(self.pipe, "save_pretrained"):
            self.pipe.save_pretrained(self.folder)
            empty = {k: None for k, v in self.pipe.components.items() if v is None}
            loaded = diffusers.DiffusionPipeline.from_pretrained(
                self.folder, torch_dtype=self.full.dtype, **empty
            )
            back = getattr(loaded, self.part)
        else:
            self.unet.save_pretrained(self.folder)
            back = type(self.unet).from_pretrained(self.folder)
        batch = self.steps[0]
        if not torch.equal(batch.run(back), batch.run(self.unet)):
            raise Failure("the loaded model gives something else")
        return "equal"

    def integers(self) -> float:
        """The CPU engine runs every layer.

        It equals the integers' definition (60 dB), and is as near to full precision as the
        simulation (1 dB).
        """
        self.converted = convert(self.unet, "cpu")
        simulated = questlib.engine_report(self.converted).engines().get("fake", 0)
        if simulated:
            raise Failure(f"{simulated} layers stay simulated")
        exact = convert(self.unet, "reference")
        engines = [decibels(b.run(exact), b.run(self.converted)) for b in self.steps]
        self._expect(min(engines), 60.0)
        loss = self.trained - self._worst(self.converted)
        if loss > 1:
            raise Failure(f"{loss:.1f} dB behind the simulation")
        return round(loss, 1)

    def pipeline(self) -> str:
        """The pipeline itself makes images with it, simulated and in integers."""
        for unet in (self.unet, self.converted):
            setattr(self.pipe, self.part, unet)
            images = self._images()
            if images.shape != self.images.shape or not torch.isfinite(images).all():
                raise Failure("images of another size, or not finite")
        return "images"


def try_pipeline(name: str) -> dict[str, Any]:
    """What came of each stage: a figure, or why it did not go on.

    Returns:
        "outcome": "works", "refused" (a typed error before anything long or lost) or "fails";
        "stage" and "reason" where it did not work; the stages' figures.
    """
    found: dict[str, Any] = {"group": CASES[name].group, "name": CASES[name].name}
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(name, Path(folder))
        for stage in STAGES:
            try:
                found[stage] = getattr(trial, stage)()
            except QuestError as error:
                # Nothing is lost where a typed error comes before the long work or the writing.
                outcome = "refused" if stage in ("calibrate", "save") else "fails"
                return found | dict(outcome=outcome, stage=stage, reason=str(error))
            except Exception as error:  # noqa: BLE001  any other is what is looked for
                reason = f"{type(error).__name__}: {error}"
                return found | dict(outcome="fails", stage=stage, reason=reason[:300])
    return found | {"outcome": "works"}


def main() -> None:
    """Try the pipelines, print what came of them, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--write", action="store_true", help=f"write {WRITTEN.name}")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    rows = {}
    for name in args.names or CASES:
        rows[name] = try_pipeline(name)
        about = {k: v for k, v in rows[name].items() if k not in ("group", "name")}
        print(f"{name}: {about}", flush=True)
    works = sum(row["outcome"] == "works" for row in rows.values())
    refused = sum(row["outcome"] == "refused" for row in rows.values())
    print(f"{works} of {len(rows)} work, {refused} are refused with a reason")
    if args.write:
        before = json.loads(WRITTEN.read_text()) if WRITTEN.is_file() else {}
        rows = {name: (before | rows)[name] for name in CASES if name in before | rows}
        WRITTEN.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
