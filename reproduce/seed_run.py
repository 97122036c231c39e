"""One seed of a row: its artifacts, each made on demand from the ones before it.

The stages are: calibrate; quantize and finetune, which make one checkpoint; sample; evaluate.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import questlib
from questlib.denoisers import unet_of
from questlib.diffusion import digests
from questlib.diffusion.drawing import Samples
from questlib.distributed import device, use_full_float32
from questlib.integer.engines import CPU_ENGINES
from questlib.versions import versions
from reproduce.datasets import Setting
from reproduce.evaluation import clip_score, drawing, metrics
from reproduce.evaluation.features import MINI_FEATURES, inception_weights
from reproduce.models import loading
from reproduce.plan import Plan
from reproduce.provenance import PeakMemory, Provenance, processors
from reproduce.results import FULL_PRECISION, METRICS, SeedResult
from reproduce.row_engine import layer_counts, open_for_drawing
from reproduce.scales import SIMULATED
from reproduce.store import Artifact, ArtifactStore
from reproduce.tables.base import Row

SAMPLING_SEED = 1000  # sampling with seed s draws its noise from 1000 + s
EVALUATE_VERSION = 1  # of the metrics' numbers; raised by hand, as those of questlib.versions
PREVIEW = 8  # images in a row's picture
PREVIEW_FILE = "preview.jpg"
STAGES = ("ranges", "adaround", "act_recon", "noise_correction", "finetune")  # of a checkpoint

# By artifact and kind: Inception takes longer than drawing small images.
FULL_FEATURES: dict[tuple[str, str], torch.Tensor] = {}


@cache
def load(model: str, engine: str = "fake") -> tuple[Any, str, str]:
    """Load a model once a process.

    Returns:
        The pipeline, on a device where the engine can run; the digest of its UNet's weights; the
        digest of the rest.
    """
    pipe = loading.load_pipeline(model)
    where = torch.device("cpu") if engine in CPU_ENGINES else device()
    use_full_float32()
    return pipe.to(where), digests.model_digest(pipe), digests.parts_digest(pipe)


class SeedRun:
    """The artifacts of one row and one seed, each made on demand from the ones before it.

    All hashes are known before anything is made. Of full precision there is no configuration, no
    calibration and no checkpoint.
    """

    def __init__(self, row: Row, plan: Plan, seed: int) -> None:
        self.row = row
        self.plan = plan
        self.seed = seed
        self.setting = plan.setting(row)
        self.features = self.setting.features or plan.scale.features
        self.store = ArtifactStore(plan.work)
        self.pipe, self.model_sha256, self._parts_sha256 = load(self.setting.model, plan.engine)
        self.config = None if row.preset is None else plan.config(row, seed)
        self.how = self._choices(self.setting)  # while calibrating
        self.drawn = self._choices(plan.drawing(row))  # for the images
        self.fp_samples = self._samples_of(None)
        self.calibration: Artifact | None = None
        self.checkpoint: Artifact | None = None
        self.samples = self.fp_samples
        if self.config is not None:
            self.calibration = self._calibration()
            self.checkpoint = self._checkpoint_of(self.calibration, self.config)
            self.samples = self._samples_of(self.checkpoint)
        self.score = self._score()

    # ---- what decides each artifact ----

    def _choices(self, setting: Setting) -> dict[str, Any]:
        """How a setting draws, as keywords; the i-th sample is drawn with the i-th prompt."""
        choices: dict[str, Any] = vars(setting.sampling).copy()
        if setting.captions is not None:
            choices["prompts"] = clip_score.coco_prompts(
                setting.captions, setting.samples_per_seed, self.seed
            )
        return choices

    @property
    def _schedule(self) -> dict[str, Any]:
        """Model and sampler. A CPU's and a GPU's artifacts differ in the last bits, and in time."""
        return self.how | {
            "model": self.model_sha256,
            "parts": self._parts_sha256,
            "device": self.pipe.device.type,
        }

    def _calibration(self) -> Artifact:
        key = self._schedule | {
            "seed": self.seed,
            "trajectories": self.setting.calib_samples,
            "versions": versions("calibrate"),
        }
        return self.store.artifact("calibrate", key)

    def _checkpoint_of(self, calibration: Artifact, config: questlib.QuantConfig) -> Artifact:
        key = {
            "calibration": calibration.hash,
            "config": config.chosen(),
            "versions": versions(*STAGES),
        }
        # Rows of tables of cost make every stage themselves.
        own = {} if self.plan.table.shares else {"shares": False}
        return self.store.artifact("checkpoint", key | own)

    def _samples_of(self, checkpoint: Artifact | None) -> Artifact:
        key = self._schedule | self.drawn
        key |= {
            "seed": SAMPLING_SEED + self.seed,
            "num_samples": self.setting.samples_per_seed,
            "batch": self.setting.sample_batch,
            "versions": versions("sample"),
            "unet": None if checkpoint is None else checkpoint.hash,
        }
        if checkpoint is not None and self.plan.engine != SIMULATED:
            key |= {"engine": self.plan.engine, "engine versions": versions("integer")}
        return self.store.artifact("sample", key)

    def _score(self) -> Artifact:
        setting = self.setting
        key = {
            "samples": self.samples.hash,
            "paired": self.fp_samples.hash,
            "features": self.features,
            "reference": setting.reference,
            "files": file_digests(setting.reference),
            "version": EVALUATE_VERSION,
            "picture": PREVIEW_FILE,
        }
        if self.features == "inception":
            key |= {"inception": file_digests(inception_weights()[0])}
        if "prompts" in self.drawn:
            clip_files = file_digests(setting.clip.removeprefix("local-dir:"))
            key |= {"clip": setting.clip, "clip files": clip_files}
        return self.store.artifact("evaluate", key)

    # ---- making them ----

    def _calibrate(self, folder: Path) -> dict[str, Any]:
        batches = folder / "batches"
        calib = questlib.calibrate(
            self.pipe,
            self.setting.calib_samples,
            seed=self.seed,
            cache_dir=batches,
            progress=True,
            **self.how,
        )
        calib.save(folder / "calibration.safetensors")
        shutil.rmtree(batches, ignore_errors=True)
        return {"calibration_hash": calib.hash()}

    def _quantize(self, folder: Path) -> dict[str, Any]:
        """Quantize and finetune; the checkpoint and what it took."""
        assert self.config is not None and self.calibration is not None
        self.calibration.make(self._calibrate)
        calib = questlib.Calibration.load(self.calibration.folder / "calibration.safetensors")
        torch.manual_seed(self.seed)
        state = folder / "finetune-state"
        with PeakMemory() as memory:
            unet = questlib.quantize(
                unet_of(self.pipe),
                self.config,
                calib,
                cache_dir=self._shared_cache(self.calibration),
                progress=True,
            )
            log = questlib.finetune(
                unet, unet_of(self.pipe), calib, self.config, state_path=state, progress=True
            )
        size = questlib.save_pretrained(unet, folder / "unet")
        state.unlink(missing_ok=True)
        return {
            "size_bytes": size,
            "peak_bytes": memory.bytes,
            "ranges_cached": unet.quest_log["ranges_cached"],
            "reconstruct_cached": unet.quest_log["reconstruct_cached"],
            "decided": unet.quest_log["decided"],
            "stage_seconds": unet.quest_log["seconds"] | {"finetune": log["seconds"]},
            "trained_weights": log["trained_weights"],
            "trained_fraction": log["trained_fraction"],
        }

    def _shared_cache(self, calibration: Artifact) -> Path | None:
        """Where presets and bits that agree on ranges and rounded weights share them."""
        if not self.plan.table.shares:
            return None
        stages = versions("ranges", "adaround", "act_recon")
        key = {"calibration": calibration.hash, "versions": stages}
        return self.store.artifact("quantize", key).folder

    def draw(self, artifact: Artifact, unet: Any, engine: str = SIMULATED) -> Samples:
        """The samples of an artifact: those that its folder lacks are drawn, the others read."""
        drawn = []

        def build(folder: Path) -> dict[str, Any]:
            drawn.append(self.draw_into(folder, unet, engine))
            return {"engine": engine, "layers": layer_counts(unet)}

        # Nothing is built when that was done before, or by another process meanwhile.
        artifact.make(build)
        return drawn[0] if drawn else self.draw_into(artifact.folder, unet, engine)

    def draw_into(self, folder: Path, unet: Any, engine: str = SIMULATED) -> Samples:
        """Draw the samples that `folder` lacks, and read all."""
        return drawing.sample(
            self.pipe,
            self.setting.samples_per_seed,
            seed=SAMPLING_SEED + self.seed,
            batch_size=self.setting.sample_batch,
            out_dir=folder / "shards",
            unet=unet,
            about={} if engine == SIMULATED else {"engine": engine},
            **self.drawn,
        )

    def _draw_row(self) -> Samples:
        """The row's samples. What is measured is what is on disk: the checkpoint is loaded."""
        if self.checkpoint is None:
            return self.draw(self.samples, unet_of(self.pipe))
        folder = self.checkpoint.folder / "unet"
        unet, engine, reason = open_for_drawing(folder, self.plan.engine, self.pipe.device)
        if reason is not None:
            print(f"{self.row.id}: drawn by the simulation: {reason}", file=sys.stderr)
        return self.draw(self.samples, unet, engine)

    def _evaluate(self, folder: Path, samples: Samples, paired: Samples | None) -> dict[str, Any]:
        """Metrics of the samples, and a strip of the first ones as a picture."""
        setting = self.setting
        pair = {} if paired is None else self._paired(paired)
        values: dict[str, Any] = dict(
            metrics.evaluate(
                samples.images, reference=setting.reference, features=self.features, **pair
            )
        )
        if "prompts" in self.drawn:
            values["clip_score"] = clip_score.clip_score(
                samples.images, self.drawn["prompts"], model=setting.clip
            )
        if paired is not None:
            values["latent_snr_db"] = metrics.latent_snr_db(samples.latents, paired.latents)
        strip = torch.cat(list(samples.images[:PREVIEW]), dim=2)  # [3, H, PREVIEW * W]
        # A third of a PNG's size. Colors keep their resolution: the images are small.
        picture = Image.fromarray(strip.permute(1, 2, 0).numpy())
        picture.save(folder / PREVIEW_FILE, quality=90, subsampling=0)
        return {
            "metrics": {k: _finite(v) for k, v in values.items() if k in METRICS},
            "about": {k: v for k, v in values.items() if k not in METRICS},
        }

    def _paired(self, paired: Samples) -> dict[str, Any]:
        """Full precision's images from the same noise, and their features, taken once."""
        key = self.fp_samples.hash, self.features
        if key not in FULL_FEATURES and self.setting.takes_features:
            FULL_FEATURES[key] = metrics.features_of(paired.images, self.features)
        return {"paired": paired.images, "paired_features": FULL_FEATURES.get(key)}

    def _measure_full(self, folder: Path) -> dict[str, Any]:
        """Size of the full-precision denoiser as a file; the file itself is not kept."""
        unet_of(self.pipe).save_pretrained(folder / "unet")
        size = sum(f.stat().st_size for f in (folder / "unet").glob("*.safetensors"))
        shutil.rmtree(folder / "unet")
        return {"size_bytes": size}

    def run(self) -> SeedResult:
        """Everything known of this seed; what exists is read, what lacks is made."""
        if self.checkpoint is None:
            full = self.store.artifact("full-precision", {"model": self.model_sha256})
            made = full.make(self._measure_full)
        else:
            made = self.checkpoint.make(self._quantize)
        if not self.score.done:
            original = unet_of(self.pipe)
            paired = None if self.checkpoint is None else self.draw(self.fp_samples, original)
            samples = self._draw_row()
            self.score.make(lambda folder: self._evaluate(folder, samples, paired))
        calibrated = {} if self.calibration is None else self.calibration.info
        score = self.score.info
        return SeedResult(
            seed=self.seed,
            metrics=score["metrics"],
            seconds=self._seconds(made, calibrated),
            size_bytes=made["size_bytes"],
            peak_bytes=made.get("peak_bytes"),
            ranges_cached=made.get("ranges_cached"),
            reconstruct_cached=made.get("reconstruct_cached"),
            decided=made.get("decided"),
            trained_weights=made.get("trained_weights"),
            trained_fraction=made.get("trained_fraction"),
            interrupted=sum(artifact.info["interrupted"] for artifact in self._stages),
            config_hash=None if self.config is None else self.config.hash(),
            calibration_hash=calibrated.get("calibration_hash"),
            engine=self._engine,
            layers=None if self.checkpoint is None else self.samples.info.get("layers"),
            about=score["about"],
            artifacts=self.artifacts,
            processors=processors(self.made),
        )

    def _seconds(self, made: dict[str, Any], calibrated: dict[str, Any]) -> dict[str, float]:
        """By stage, as each was first measured."""
        seconds = dict.fromkeys(("calibrate", "ranges", "reconstruct", "finetune"), 0.0)
        seconds |= {"calibrate": calibrated.get("seconds", 0.0)} | made.get("stage_seconds", {})
        return seconds | {
            "sample": self.samples.info["seconds"],
            "evaluate": self.score.info["seconds"],
        }

    # ---- what they are ----

    @property
    def _engine(self) -> str:
        """What drew the images; artifacts of before this was recorded were drawn as asked."""
        if self.checkpoint is None:
            return FULL_PRECISION
        return self.samples.info.get("engine", self.plan.engine)

    @property
    def _stages(self) -> list[Artifact]:
        found = (self.samples, self.score, self.checkpoint, self.calibration)
        return [artifact for artifact in found if artifact is not None]

    @property
    def artifacts(self) -> dict[str, str]:
        """Hash by stage."""
        return {artifact.stage: artifact.hash for artifact in self._stages}

    @property
    def made(self) -> list[Provenance]:
        """Commit, versions and machine of each artifact, its samples' first."""
        return [artifact.info["provenance"] for artifact in self._stages]


def _finite(value: float | None) -> float | None:
    """None for a metric that is infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


def file_digests(reference: str | None) -> list[str]:
    """What metrics read beside the samples.

    The embedded classifier and reference are told by content, the user's files by size and time.
    """
    embedded = [*MINI_FEATURES.glob("*.safetensors")]
    if reference is not None:
        embedded += (loading.MINI / reference).glob("reference.safetensors")
    found = [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(embedded)]
    if reference is None:
        return found
    path = Path(reference)
    files = (f.stat() for f in (path, *sorted(path.glob("**/*"))) if f.exists())
    return found + [f"{about.st_size}-{about.st_mtime_ns}" for about in files]
