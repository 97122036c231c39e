"""One cell of a table, from the model to the result JSON: calibrate, quantize, finetune, save, load, sample, evaluate."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import questlib
from questlib.diffusion import digests
from questlib.distributed import device
from questlib.errors import QuestError
from questlib.integer.engines import CPU_ENGINES
from questlib.versions import versions
from reproduce.evaluation import clip_score, drawing, metrics
from reproduce.evaluation.features import MINI_FEATURES, inception_weights
from reproduce.evaluation.samples import Samples
from reproduce.models import loading
from reproduce.plan import Plan
from reproduce.provenance import PeakMemory, processors, provenance
from reproduce.results import (
    METRICS,
    empty_result,
    kept_result,
    measured_with,
    stored_result,
    summarize,
)
from reproduce.store import Product, Store, write_json
from reproduce.tables.base import Cell

SAMPLING_SEED = 1000  # sampling with seed s draws its noise from 1000 + s
EVALUATE_VERSION = 1  # of the metrics' numbers; raised by hand, as those of questlib.versions
PREVIEW = 8  # images in a cell's picture
FULL_FEATURES: dict[
    tuple[str, str], torch.Tensor
] = {}  # by product and kind: Inception takes longer than small images


@cache
def load(model: str, engine: str = "fake"):
    """(pipeline where the engine can run, digest of its UNet's weights, digest of the rest); once a process."""
    pipe = loading.load_pipeline(model)
    on_gpu = torch.cuda.is_available() and engine not in CPU_ENGINES
    return (
        pipe.to(device() if on_gpu else "cpu"),
        digests.model_digest(pipe),
        digests.parts_digest(pipe),
    )


class SeedRun:
    """The products of one cell and one seed, each made on demand from the ones before it."""

    def __init__(self, cell: Cell, plan: Plan, seed: int) -> None:
        self.cell, self.plan, self.seed, setting = cell, plan, seed, plan.setting(cell)
        self.setting = setting
        self.pipe, self.model_sha256, parts = load(setting.model, plan.engine)
        self.store = Store(plan.work)
        self.config = None if cell.preset is None else plan.config(cell, seed)
        prompts = {}
        if (
            setting.captions is not None
        ):  # the i-th sample is drawn, and scored, with the i-th prompt
            prompts["prompts"] = clip_score.coco_prompts(
                setting.captions, setting.samples_per_seed, seed
            )
        self.how, self.drawn = (
            {
                name: getattr(s, name)
                for name in ("num_inference_steps", "eta", "sampler", "guidance_scale")
            }
            | prompts
            for s in (setting, plan.drawing(cell))
        )  # while calibrating; for the images
        # a CPU's and a GPU's products differ in the last bits and in their seconds
        schedule = self.how | {
            "model": self.model_sha256,
            "parts": parts,
            "device": self.pipe.device.type,
        }
        drawn_by = (
            schedule
            | self.drawn
            | {"seed": SAMPLING_SEED + seed, "num_samples": setting.samples_per_seed}
        )
        drawn_by |= {"batch": setting.sample_batch, "versions": versions("sample")}
        self.fp_samples = self.store.product("sample", drawn_by | {"unet": None})
        if self.config is None:
            self.calibration = self.checkpoint = None
            self.samples = self.fp_samples
            self.full = self.store.product("full-precision", {"model": self.model_sha256})
        else:
            key = schedule | {"seed": seed, "trajectories": setting.calib_samples}
            key |= {"versions": versions("calibrate")}
            self.calibration = self.store.product("calibrate", key)
            key = {"calibration": self.calibration.hash, "config": self.config.to_dict()}
            key |= {
                "versions": versions(
                    "ranges", "adaround", "act_recon", "noise_correction", "finetune"
                )
            }
            key |= {} if plan.table.shares else {"shares": False}
            self.checkpoint = self.store.product("checkpoint", key)
            engine = {}
            if plan.engine != "fake":
                engine = {"engine": plan.engine, "engine versions": versions("integer")}
            self.samples = self.store.product(
                "sample", drawn_by | {"unet": self.checkpoint.hash} | engine
            )
        key = {
            "samples": self.samples.hash,
            "paired": self.fp_samples.hash,
            "features": setting.features,
            "reference": setting.reference,
        }
        key |= {"files": file_digests(setting.reference), "version": EVALUATE_VERSION}
        if setting.features == "inception":
            key |= {"inception": file_digests(inception_weights()[0])}
        if "prompts" in self.drawn:
            key |= {"clip": setting.clip}
            key |= {"clip files": file_digests(setting.clip.removeprefix("local-dir:"))}
        self.score = self.store.product("evaluate", key)

    def _calibrate(self, folder: Path) -> dict[str, Any]:
        calib = questlib.calibrate(
            self.pipe, self.setting.calib_samples, seed=self.seed, progress=True, **self.how
        )
        calib.save(folder / "calibration.safetensors")
        return {"calibration_hash": calib.hash()}

    def _quantize(self, folder: Path) -> dict[str, Any]:
        self.calibration.make(self._calibrate)
        calib = questlib.Calibration.load(self.calibration.folder / "calibration.safetensors")
        # Presets and bits that agree on activation ranges and rounded weights share them; in tables of cost each row has its own.
        key = {"calibration": self.calibration.hash, "versions": versions("ranges", "adaround")}
        shared = self.store.product("quantize", key)
        cache = shared.folder if self.plan.table.shares else None
        torch.manual_seed(self.seed)
        state = folder / "finetune-state"
        with PeakMemory() as memory:
            unet = questlib.quantize(
                self.pipe.unet, self.config, calib, cache_dir=cache, progress=True
            )
            log = questlib.finetune(
                unet, self.pipe.unet, calib, self.config, state_path=state, progress=True
            )
        size = questlib.save_pretrained(unet, folder / "unet")
        state.unlink(missing_ok=True)
        return {
            "size_bytes": size,
            "peak_bytes": memory.bytes,
            "ranges_cached": unet.quest_log["ranges_cached"],
            "reconstruct_cached": unet.quest_log["reconstruct_cached"],
            "stage_seconds": unet.quest_log["seconds"] | {"finetune": log["seconds"]},
            "finetune": {
                k: v for k, v in log.items() if k in ("trained_weights", "trained_fraction")
            },
        }

    def draw(self, product: Product, unet: Any) -> Samples:
        """The samples of a product: those that its folder lacks are drawn, the others are read."""
        drawn = []

        def build(folder: Path) -> dict[str, Any]:
            drawn.append(self.draw_into(folder, unet))
            return {}

        product.make(
            build
        )  # nothing to do when done before, or by another process while this one waited
        return drawn[0] if drawn else self.draw_into(product.folder, unet)

    def draw_into(self, folder: Path, unet: Any) -> Samples:
        return drawing.sample(
            self.pipe,
            self.setting.samples_per_seed,
            seed=SAMPLING_SEED + self.seed,
            batch_size=self.setting.sample_batch,
            out_dir=folder / "shards",
            unet=unet,
            **self.drawn,
        )

    def _evaluate(self, folder: Path, samples: Samples, paired: Samples | None) -> dict[str, Any]:
        about, pair = self.setting, {}
        if paired is not None:
            key = self.fp_samples.hash, about.features
            if key not in FULL_FEATURES and about.takes_features:
                FULL_FEATURES[key] = metrics.features_of(paired.images, about.features)
            pair = {"paired": paired.images, "paired_features": FULL_FEATURES.get(key)}
        values = dict(
            metrics.evaluate(
                samples.images, reference=about.reference, features=about.features, **pair
            )
        )
        if "prompts" in self.drawn:
            values["clip_score"] = clip_score.clip_score(
                samples.images, self.drawn["prompts"], model=about.clip
            )
        if paired is not None:
            values["latent_snr_db"] = metrics.latent_snr_db(samples.latents, paired.latents)
        strip = torch.cat(list(samples.images[:PREVIEW]), dim=2).permute(
            1, 2, 0
        )  # [H, PREVIEW * W, 3]
        Image.fromarray(strip.numpy()).save(folder / "preview.png")
        measured = {
            k: v if v is None or math.isfinite(v) else None
            for k, v in values.items()
            if k in METRICS
        }
        return {"metrics": measured, "about": {k: v for k, v in values.items() if k not in METRICS}}

    def _measure_full(self, folder: Path) -> dict[str, Any]:
        """Size of the full-precision UNet as a file; the file itself is not kept."""
        self.pipe.unet.save_pretrained(folder / "unet")
        size = sum(f.stat().st_size for f in (folder / "unet").glob("*.safetensors"))
        shutil.rmtree(folder / "unet")
        return {"size_bytes": size}

    def run(self) -> dict[str, Any]:
        """Everything known of this seed; what exists is read, what lacks is made."""
        if self.checkpoint is None:
            made = self.full.make(self._measure_full)
        else:
            made = self.checkpoint.make(self._quantize)
        if not self.score.done:
            paired = None if self.checkpoint is None else self.draw(self.fp_samples, self.pipe.unet)
            # What is measured is what is on disk: the checkpoint is loaded again.
            unet = self.pipe.unet
            if self.checkpoint is not None:
                unet = questlib.from_pretrained(
                    self.checkpoint.folder / "unet", engine=self.plan.engine
                ).to(self.pipe.device)
            samples = self.draw(self.samples, unet)
            self.score.make(lambda folder: self._evaluate(folder, samples, paired))
        seconds = dict.fromkeys(("calibrate", "ranges", "reconstruct", "finetune"), 0.0)
        if self.checkpoint is not None:
            seconds |= {"calibrate": self.calibration.info["seconds"], **made["stage_seconds"]}
        seconds |= {"sample": self.samples.info["seconds"], "evaluate": self.score.info["seconds"]}
        return {
            "seed": self.seed,
            "metrics": self.score.info["metrics"],
            "size_bytes": made["size_bytes"],
            "peak_bytes": made.get("peak_bytes"),
            "ranges_cached": made.get("ranges_cached"),
            "reconstruct_cached": made.get("reconstruct_cached"),
            "finetune": made.get("finetune"),
            "seconds": seconds,
            "interrupted": sum(p.info["interrupted"] for p in self.stages),
            "config_hash": None if self.config is None else self.config.hash(),
            "calibration_hash": None
            if self.calibration is None
            else self.calibration.info["calibration_hash"],
            "about": self.score.info["about"],
            "products": self.products,
            "processors": processors(self.made),
        }

    @property
    def stages(self) -> list[Product]:
        return [
            p
            for p in (self.samples, self.score, self.checkpoint, self.calibration)
            if p is not None
        ]

    @property
    def products(self) -> dict[str, str]:
        """Hash by stage: known before anything is made."""
        return {p.folder.parent.name: p.hash for p in self.stages}

    @property
    def made(self) -> list[dict[str, Any]]:
        """Where this seed's products come from: commit, versions and machine of each, its samples' first."""
        return [p.info["provenance"] for p in self.stages if "provenance" in p.info]


def file_digests(reference: str | None) -> list[str]:
    """What metrics read beside the samples: the embedded classifier and reference, by content; the user's by size and time."""
    embedded = [*MINI_FEATURES.glob("*.safetensors")]
    if reference is not None:
        embedded += (loading.MINI / reference).glob("reference.safetensors")
    found = [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(embedded)]
    if reference is None:
        return found
    path = Path(reference)
    return found + [
        f"{f.stat().st_size}-{f.stat().st_mtime_ns}"
        for f in (path, *sorted(path.glob("**/*")))
        if f.exists()
    ]


def is_current(cell: Cell, plan: Plan) -> bool:
    """Whether the row's result is what a run would make now: images by this code, configuration and model (the products' hashes),
    measured with the files of these names. Not the score's hash: it has the times of files, which each clone has anew."""
    stored = stored_result(cell, plan)
    if stored["status"] != "done" or plan.missing(cell) is not None:
        return False
    runs = [SeedRun(cell, plan, seed) for seed in plan.seeds]
    expected = {"features": plan.setting(cell).features} | measured_with(
        cell, plan, runs[0].model_sha256
    )
    found = {s["seed"]: s["products"] | {"evaluate": None} for s in stored["per_seed"]}
    same = all(found.get(run.seed) == run.products | {"evaluate": None} for run in runs)
    return same and stored | expected == stored


def run_cell(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Make (or read) one cell's numbers and write `results/<scale>/<table>/<cell>.json`. A QuestError becomes status "failed"."""
    if plan.stored:
        return stored_result(cell, plan)
    if (reason := plan.missing(cell)) is not None:
        result = empty_result(cell, plan, "not run", reason)
    else:
        try:
            runs = [SeedRun(cell, plan, seed) for seed in plan.seeds]
            earlier = kept_result(cell, plan, runs[0].model_sha256)
            result = summarize(cell, plan, runs, [run.run() for run in runs], earlier)
            if result["per_seed"][0]["seed"] == runs[0].seed:
                shutil.copyfile(
                    runs[0].score.folder / "preview.png", plan.folder / f"{cell.id}.png"
                )
        except (QuestError, torch.OutOfMemoryError) as error:
            print(f"{cell.id}: failed: {error}", file=sys.stderr)
            result = empty_result(cell, plan, "failed", str(error))
            result["provenance"] = provenance() | {"command": plan.command}
    path = plan.row_file(cell.id)
    if (
        result["status"] != "done"
        and path.is_file()
        and json.loads(path.read_text())["status"] == "done"
    ):
        print(
            f"{cell.id}: {result['status']}: {result['reason']}; the earlier result is kept",
            file=sys.stderr,
        )
    else:
        write_json(path, result)
    return result
