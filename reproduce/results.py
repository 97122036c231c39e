"""Results of rows as typed values, and the JSON files that hold them.

A result file holds what was measured, seed by seed, and under which conditions. Means and
deviations follow from it; what the table's `Row` knows (label, bits, the paper's numbers) stays
there.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import statistics
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from questlib.errors import QuestError
from questlib.files import atomic_path
from questlib.integrity import digest_of_json
from reproduce.datasets import Sampling
from reproduce.provenance import Provenance

FORMAT: Literal[2] = 2  # of result files; 1, without the key "format", is of before 0.2
METRICS = (
    "fid",
    "sfid",
    "kid",
    "inception_score",
    "clip_score",
    "psnr_to_fp",
    "feature_distance_to_fp",
    "latent_snr_db",
)
# Told where the paper's table has them; in a table of our own the CLIP score of prompts, too.
IF_REPORTED = ("inception_score", "clip_score")
DIGEST = "digest"  # of the values of a result file; files of before have none
FULL_PRECISION = "full precision"  # in place of an engine, where nothing is quantized
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ResultError(QuestError):
    """A result file is damaged, of another row, or of an older layout. It names file and key."""


class Status(StrEnum):
    """What became of a row."""

    DONE = "done"
    FAILED = "failed"
    NOT_RUN = "not run"


class Measured(NamedTuple):
    """A metric over the seeds of a row; None where there is nothing to tell."""

    value: float | None
    """Mean over the seeds."""

    std: float | None
    """Sample standard deviation over the seeds; None for one seed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Model:
    """The full-precision model."""

    id: str
    """Embedded name, hub id, or the last part of a folder's path."""

    sha256: str
    """Of the UNet's weights."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Conditions:
    """How the images of a row are drawn and what they are compared with, without local paths."""

    model: Model | None
    """None: no seed was run."""

    dataset: str
    sampling: Sampling
    samples_per_seed: int
    features: str
    reference: str | None
    """Reference statistics for FID."""

    captions: str | None
    clip: str | None
    """The CLIP model that scores images of `captions`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SeedResult:
    """What one seed of a row came to."""

    seed: int
    metrics: dict[str, float | None]
    seconds: dict[str, float]
    """By stage, as first measured, also where an artifact was read from the work folder."""

    size_bytes: int
    """Of the UNet as a file."""

    peak_bytes: int | None
    """Largest rise of resident memory (CPU) or of allocated memory (CUDA) while quantizing and
    finetuning; None for full precision."""

    ranges_cached: bool | None
    reconstruct_cached: bool | None
    trained_weights: int | None
    trained_fraction: float | None
    """Share of the quantized layers' weights that finetuning trains."""

    interrupted: int
    """How many tries of its stages were stopped before they ended."""

    config_hash: str | None
    calibration_hash: str | None
    decided: float | None = None
    """Share of AdaRound's roundings that were 0 or 1 before they were hardened; None: no AdaRound,
    or a result of before it was recorded."""

    engine: str | None = None
    """What drew its images (`row_engine.Drawing`); None: a result of before it was recorded."""

    layers: dict[str, int] | None = None
    """Number of its layers by how they ran while it was drawn (`row_engine.layer_counts`); None:
    full precision, or a result of before it was recorded."""

    about: dict[str, str | int | float | None]
    """What the metrics say beside their values."""

    artifacts: dict[str, str]
    """Hash by stage."""

    processors: tuple[str, ...]
    """Those that its artifacts were made on."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Result:
    """A row as it was run, or why it was not."""

    format: Literal[2] = FORMAT
    table: str
    row: str
    scale: str
    status: Status
    reason: str | None = None
    """Why there are no numbers."""

    engine: str | None = None
    """What drew the images of the quantized model, each that a seed names; FULL_PRECISION for the
    model itself, None without numbers."""

    conditions: Conditions
    seeds: tuple[SeedResult, ...] = ()
    """In ascending order; empty without numbers."""

    provenance: tuple[Provenance, ...] = ()
    """Of the first seed's samples, as of when they were made; then of the row's other artifacts,
    where these differ."""

    command: str | None = None

    # ---- derived values ----

    @property
    def done(self) -> bool:
        """Whether there are numbers."""
        return self.status == Status.DONE

    @property
    def n_samples(self) -> int:
        """Images, of all seeds."""
        return self.conditions.samples_per_seed * len(self.seeds)

    def metric(self, name: str) -> Measured:
        """Mean and deviation of a metric; None where a seed lacks it."""
        values = [value for s in self.seeds if (value := s.metrics.get(name)) is not None]
        if not values or len(values) < len(self.seeds):
            return Measured(None, None)
        std = statistics.stdev(values) if len(values) > 1 else None
        return Measured(statistics.fmean(values), std)

    def of_seed(self, seed: int) -> SeedResult | None:
        """The result of one seed."""
        return next((s for s in self.seeds if s.seed == seed), None)

    @property
    def size_bytes(self) -> int | None:
        """Of the largest checkpoint."""
        return max((s.size_bytes for s in self.seeds), default=None)

    @property
    def peak_bytes(self) -> int | None:
        """Of the seed that needed most memory."""
        return max((s.peak_bytes for s in self.seeds if s.peak_bytes is not None), default=None)

    @property
    def seconds(self) -> dict[str, float]:
        """Mean over the seeds, by stage."""
        stages = self.seeds[0].seconds if self.seeds else ()
        return {stage: statistics.fmean(s.seconds[stage] for s in self.seeds) for stage in stages}

    @property
    def quantize_seconds(self) -> float | None:
        """Mean seconds to calibrate, quantize and finetune; None for full precision."""
        if not self.done or self.engine == FULL_PRECISION:
            return None
        return sum(v for stage, v in self.seconds.items() if stage not in ("sample", "evaluate"))

    @property
    def layers(self) -> dict[str, int] | None:
        """Number of layers by how they ran; None: full precision, or not recorded."""
        return next((s.layers for s in self.seeds if s.layers is not None), None)

    @property
    def trained_fraction(self) -> float | None:
        """Share of the quantized layers' weights that finetuning trains; None: of none."""
        found = (s.trained_fraction for s in self.seeds)
        return next((fraction for fraction in found if fraction is not None), None) or None

    def contradiction(self) -> str | None:
        """What in the values cannot be so; None where nothing is."""
        if self.done != bool(self.seeds):
            return f"seeds: expected {'some' if self.done else 'none'}, status is {self.status}"
        numbers = [s.seed for s in self.seeds]
        if numbers != sorted(set(numbers)):
            return f"seeds: expected each once, in ascending order, found {numbers}"
        if self.conditions.samples_per_seed < 1:
            return f"conditions.samples_per_seed: found {self.conditions.samples_per_seed}"
        for i, seed in enumerate(self.seeds):
            if unknown := seed.metrics.keys() - set(METRICS):
                return f"seeds.{i}.metrics: unknown {', '.join(sorted(unknown))}"
            if seed.seconds.keys() != self.seeds[0].seconds.keys():
                return f"seeds.{i}.seconds: expected the stages of the first seed"
            amounts = {
                **seed.seconds,
                **(seed.layers or {}),
                "size_bytes": seed.size_bytes,
                "seed": seed.seed,
            }
            if negative := [key for key, value in amounts.items() if value < 0]:
                return f"seeds.{i}: {negative[0]} is below zero"
        return None

    # ---- files ----

    def to_json(self) -> str:
        """The text of the row's file, with a digest of its values."""
        values = json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))
        return json.dumps(values | {DIGEST: digest_of_json(values)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "result") -> Result:
        """The result that `to_json` wrote.

        Args:
            name: of the file, for messages.

        Raises:
            ResultError: the text is not JSON, of format 1, a key is wrong or missing, values
                contradict each other, or they are not what was written. Files of before have no
                digest, which tells the last.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ResultError(f"{name}: expected JSON, found {error}") from error
        if not isinstance(values, dict):
            raise ResultError(f"{name}: expected a JSON object, found {type(values).__name__}")
        if values.get("format", 1) == 1:
            raise ResultError(
                f"{name}: made by questlib before 0.2 (format 1); make the row again, "
                "or name another --results folder"
            )
        digest = values.pop(DIGEST, None)
        try:
            result = _RESULT.validate_json(json.dumps(values))
        except (ValueError, RecursionError) as error:
            found = _first(error) if isinstance(error, ValidationError) else str(error)
            raise ResultError(f"{name}: {found}") from error
        if digest is not None and digest != digest_of_json(values):
            raise ResultError(f"{name}: its values are not what was written; make the row again")
        wrong = result.contradiction()
        if wrong is not None:
            raise ResultError(f"{name}: {wrong}")
        return result

    @classmethod
    def read(cls, path: Path) -> Result:
        """The result in a file. ResultError for any damage."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ResultError(f"{path}: cannot be read ({error})") from error
        return cls.from_json(text, str(path))

    def write(self, path: Path) -> None:
        """Write, or replace, the file in one step."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


_RESULT = TypeAdapter(Result)


def _first(error: ValidationError) -> str:
    """One line of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "result"
    words = first["msg"].replace("Input should be", "expected")
    found = "" if first["type"] == "missing" else f", found {reprlib.repr(first['input'])}"
    return f"{where}: {words}{found}"
