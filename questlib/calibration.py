"""Calibration data: what the full-precision denoiser received and returned while it sampled."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from questlib.calls import Batch, CallTable, skeleton_from_json, skeleton_to_json
from questlib.capture import hooks
from questlib.config import digest
from questlib.denoisers import unet_of
from questlib.diffusion.digests import model_digest, parts_digest
from questlib.distributed import broadcast_from, broadcast_value, processes
from questlib.errors import CheckpointError, ConfigError
from questlib.integrity import as_bytes, fail_if_any, read_tensors, write_tensors
from questlib.quantization.preparation import check_unet
from questlib.quantization.time_path import RESIDUALS, needs_arguments
from questlib.recording import (
    CallRecorder,
    ProcessorWatch,
    check_finite,
    check_weights,
    evaluating,
    make_calls,
)
from questlib.stage_cache import Parts
from questlib.trajectories import sample_trajectories
from questlib.versions import STAGE_VERSIONS

PLAIN = ("x", "t", "eps", "context")  # tensors of a file that has these alone


class TimeCalls(NamedTuple):
    """Calls for the time path alone (`questlib.quantization.time_path.run_time_layers`)."""

    t: torch.Tensor
    """Timesteps [R]."""
    arguments: dict[str, Any]
    """The other arguments of R samples; empty where the timestep is all that is needed."""


class TimeRows(NamedTuple):
    """The same calls as they were recorded, for UNets of any device and precision."""

    t: torch.Tensor
    """Timesteps [R]."""
    batch: Batch | None
    """R samples; None where the timestep is all that is needed."""

    def on(self, unet: nn.Module) -> TimeCalls:
        """The calls on a UNet's device, in its precision."""
        arguments = {} if self.batch is None else self.batch.arguments(unet)
        return TimeCalls(self.t.to(unet.device), arguments)


class Calibration:
    """Calls of a full-precision denoiser, on the CPU, or in files where they are large.

    They stand in tables of T steps and N samples each. A pipeline whose calls agree in structure
    and shapes has one table. Several tables are one after another: their steps are numbered
    together. Under guidance N counts both halves: the unconditional samples, then the conditional
    ones. Stable Diffusion, 50 steps of 128 samples, takes 1.7 GB in float32.

    Args:
        tables: the calls.
        model: `questlib.diffusion.digests.model_digest` of the denoiser; None: not known.
        files: the folder of the tables' files, which lives as long as this object.
    """

    def __init__(
        self,
        tables: Sequence[CallTable],
        model: str | None = None,
        files: tempfile.TemporaryDirectory | None = None,
    ) -> None:
        self.tables = tuple(tables)
        self.model = model
        self.files = files

    @classmethod
    def regular(
        cls,
        x: torch.Tensor,
        t: torch.Tensor,
        eps: torch.Tensor,
        context: torch.Tensor | None = None,
        model: str | None = None,
        argument: str = "encoder_hidden_states",
    ) -> Calibration:
        """N trajectories of T steps: x, eps [T, N, C, h, w], t [T], context [N, ...] or None.

        Args:
            model: the digest of the denoiser.
            argument: its name for the context.
        """
        return cls([CallTable.regular(x, t, eps, context, argument)], model)

    # ---- all calls together ----

    @property
    def t(self) -> torch.Tensor:
        """The timestep of each step, float32 or int64 [T]; one that is called twice occurs twice
        where trajectories were recorded."""
        return torch.cat([table.t for table in self.tables])

    @property
    def table_of_step(self) -> torch.Tensor:
        """The number of each step's table, int64 [T]."""
        steps = [torch.full((len(table.t),), i) for i, table in enumerate(self.tables)]
        return torch.cat(steps)

    def width(self, step: int) -> int:
        """Number of samples at a step."""
        return self.tables[int(self.table_of_step[step])].width

    def batch(self, step: int | torch.Tensor, which: torch.Tensor) -> Batch:
        """The calls of samples `which` int64 [B], at one step or at a step each [B].

        All steps must be of one table.
        """
        if len(self.tables) == 1:
            return self.tables[0].batch(step, which)
        first = int(step if isinstance(step, int) else step.reshape(-1)[0])
        number = int(self.table_of_step[first])
        before = sum(len(table.t) for table in self.tables[:number])
        return self.tables[number].batch(step - before, which)

    def time_calls(
        self, unet: nn.Module, generator: torch.Generator, only: torch.Tensor | None = None
    ) -> list[TimeCalls]:
        """`time_rows` on the UNet's device, in its precision."""
        return [rows.on(unet) for rows in self.time_rows(unet, generator, only)]

    def time_rows(
        self, unet: nn.Module, generator: torch.Generator, only: torch.Tensor | None = None
    ) -> list[TimeRows]:
        """Calls for the time path of a UNet: one for each step, by table.

        Where the timestep alone enters the embedding, all steps are together. Else the sample at
        each step is drawn.

        Args:
            generator: draws the samples.
            only: a timestep, whose steps alone are taken; None: all.
        """
        if not needs_arguments(unet):
            t = self.t if only is None else self.t[self.t == only]
            return [TimeRows(t, None)]
        found = []
        for table in self.tables:
            steps = torch.arange(len(table.t))
            if only is not None:
                steps = steps[table.t == only]
            if len(steps):
                which = torch.randint(table.width, (len(steps),), generator=generator)
                batch = table.batch(steps, which).without(*RESIDUALS)
                found.append(TimeRows(batch.t, batch))
        return found

    # ---- one table ----

    @property
    def x(self) -> torch.Tensor:
        """Inputs x_t [T, N, C, h, w]; ConfigError where there are several tables."""
        return self._only().inputs["sample"].grid()

    @property
    def eps(self) -> torch.Tensor:
        """Outputs [T, N, C, h, w]; ConfigError where there are several tables."""
        return self._only().eps.grid()

    @property
    def context(self) -> torch.Tensor | None:
        """`encoder_hidden_states` of each sample, the same at all steps [N, L, D]; None for
        unconditional models."""
        column = self._only().inputs.get("encoder_hidden_states")
        if column is None:
            return None
        return column.values if column.same_at_all_steps else column.values[column.rows[0]]

    def _only(self) -> CallTable:
        if len(self.tables) > 1:
            raise ConfigError(
                "calibration: its calls differ in structure or shapes; read them table by table"
            )
        return self.tables[0]

    # ---- what it belongs to ----

    def check(self, unet: nn.Module) -> str:
        """The denoiser's digest, once it is clear that the calls are its own and finite.

        Raises:
            ConfigError: they are of another denoiser.
            NotFiniteError: a value of the calls, or a weight, is not finite.
        """
        check_weights(unet)
        model = model_digest(unet)
        if self.model is not None and self.model != model:
            raise ConfigError(
                f"calibration: it was recorded at another model (weights {self.model[:12]}, found "
                f"{model[:12]}); calibrate this one"
            )
        for table in self.tables:
            named = {name: column.values for name, column in table.inputs.items()}
            check_finite(table.t, named | {"its output": table.eps.values})
        return model

    # ---- files ----

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, which a reader sees whole or not at all."""
        about = {} if self.model is None else {"model": self.model}
        if not self._plain:
            about["tables"] = json.dumps(self._skeletons())
        write_tensors(path, self._tensors(), about)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file cannot be read, does not hold what was saved, or is not one
            of calibration data.
        """
        tensors, about = read_tensors(path)
        try:
            if "tables" in about:
                tables = _tables(tensors, json.loads(about["tables"]))
            else:
                fail_if_any(path, {"unexpected": tensors.keys() - set(PLAIN)})
                x, t, eps = (tensors[name] for name in PLAIN[:3])
                tables = [CallTable.regular(x, t, eps, tensors.get("context"))]
            for table in tables:
                table.check()
        except CheckpointError as error:
            raise CheckpointError(f"calibration file {path}: {error}") from error
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"calibration file {path}: {error!r}") from error
        return cls(tables, about.get("model"))

    def hash(self) -> str:
        """Sixteen hex digits of all values: the part of a cache's key that this data decides."""
        digest = hashlib.sha256()
        if not self._plain:
            digest.update(json.dumps(self._skeletons()).encode())
        for tensor in self._tensors().values():
            digest.update(as_bytes(tensor))
        return digest.hexdigest()[:16]

    @property
    def _plain(self) -> bool:
        return len(self.tables) == 1 and self.tables[0].plain

    def _skeletons(self) -> list[Any]:
        return [skeleton_to_json(table.skeleton) for table in self.tables]

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self._plain:
            values = (self.x, self.t, self.eps, self.context)
            return {k: v for k, v in zip(PLAIN, values, strict=True) if v is not None}
        return self._table_tensors()

    def _table_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{i}.{name}": value
            for i, table in enumerate(self.tables)
            for name, value in sorted(table.tensors().items())
        }


def _tables(tensors: Mapping[str, torch.Tensor], skeletons: list[Any]) -> list[CallTable]:
    """The tables of a file's tensors. KeyError where one is missing."""
    if not skeletons:
        raise CheckpointError("it has no calls")
    found = []
    for i, skeleton in enumerate(skeletons):
        start = f"{i}."
        own = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
        found.append(CallTable.from_tensors(own, skeleton_from_json(skeleton)))
    return found


# ---- calibrating ----


@torch.no_grad()
def calibrate(
    pipe: DiffusionPipeline,
    num_samples: int | None = None,
    num_inference_steps: int | None = None,
    *,
    calls: Sequence[Mapping[str, Any]] | None = None,
    run: Callable[[], Any] | None = None,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    sampler: str | None = None,
    guidance_scale: float = 1.0,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Calibration:
    """Record what the full-precision pipeline's UNet receives and returns while it samples.

    The pipeline runs itself: `calls` are the arguments of its calls, and `run` is a function that
    runs it in any other way. All that the UNet receives is kept: timesteps as the scheduler gives
    them, added conditions, residuals of ControlNets and adapters. A call without a `generator` gets
    one that follows from `seed` and its number.

    Pipelines that turn noise and, at most, labels or prompts into images can also be sampled here:
    `num_samples` trajectories of `num_inference_steps` steps each. The initial noise of sample i
    follows from `seed` and i, and differs from the noise of samples that are drawn for evaluation
    with the same seed.

    The modules are in eval mode meanwhile. Under `accelerate launch` every process calls this, and
    all get the whole result, which does not depend on their number. Batches of trajectories are
    shared out; calls run in process 0.

    Args:
        pipe: a diffusers pipeline in full precision.
        num_samples: number of trajectories; under guidance each has two halves.
        num_inference_steps: T.
        calls: keyword arguments of the pipeline's calls.
        run: a function without arguments that runs the pipeline.
        eta: of DDIM.
        seed: of the noise, and of the order of labels and prompts.
        batch_size: samples that go through the UNet at once.
        sampler: "ddim", "plms", ...; None: the pipeline's own scheduler. See
            `questlib.diffusion.sampling.choose_scheduler`.
        guidance_scale: of classifier-free guidance; 1: none.
        labels: classes of a class-conditional model; None: all. Each occurs equally often, give or
            take one, in an order drawn from `seed`.
        prompts: of a text-conditional model, likewise.
        cache_dir: folder where finished batches of trajectories are kept, so that the same call
            goes on after the last one. It can be removed when the calibration is saved.
        progress: show a progress bar.

    Raises:
        ConfigError: no denoiser that can be quantized, a count below one, choices that do not fit
            the pipeline, or an argument of the denoiser that cannot be recorded.
        NotFiniteError: a weight, an argument or an output that is not finite.

    Example:
        >>> texts = ["a lighthouse", "a fox in the snow"]
        >>> calls = [dict(prompt=text, num_inference_steps=20) for text in texts]
        >>> calib = calibrate(pipe, calls=calls)
        >>> calib.save("calibration.safetensors")
        >>> calib = calibrate(pipe, 256, 50, labels=[1, 7], guidance_scale=3.0)
    """
    denoiser = unet_of(pipe)
    check_unet(denoiser)
    check_weights(denoiser)
    chosen = {
        "num_samples and num_inference_steps": num_samples is not None,
        "calls": calls is not None,
        "run": run is not None,
    }
    if sum(chosen.values()) != 1:
        found = " and ".join(name for name, is_chosen in chosen.items() if is_chosen) or "none"
        raise ConfigError(f"calibrate: expected one of {', '.join(chosen)}, found {found}")
    sampling: dict[str, Any] = dict(
        eta=eta, sampler=sampler, guidance_scale=guidance_scale, labels=labels, prompts=prompts
    )
    if calls is None and run is None:
        model = model_digest(denoiser)
        parts = Parts()
        if cache_dir is not None:
            how = [num_samples, num_inference_steps, batch_size, seed, sampling, parts_digest(pipe)]
            key = digest(json.loads(json.dumps([*how, model], default=str)))
            name = f"calibrate-v{STAGE_VERSIONS['calibrate']}-{key}"
            parts = Parts(Path(cache_dir) / name, model)
        with evaluating(pipe):
            values = sample_trajectories(
                pipe,
                num_samples,
                num_inference_steps,
                batch_size,
                seed,
                progress,
                parts,
                **sampling,
            )
        return Calibration.regular(**values, model=model)
    defaults = inspect.signature(calibrate).parameters
    unused = [name for name, value in sampling.items() if value != defaults[name].default]
    if cache_dir is not None:
        unused.append("cache_dir")
    if num_inference_steps is not None:
        unused.append("num_inference_steps")
    if unused:
        raise ConfigError(
            f"calibrate: {unused[0]} is for trajectories that are sampled here; with calls or run "
            "it is the pipeline's own argument"
        )
    if run is None:
        run = make_calls(pipe, list(calls or ()), seed, progress)
    with evaluating(pipe):
        return _record(pipe, run)


def _record(pipe: DiffusionPipeline, run: Callable[[], Any]) -> Calibration:
    """Record the calls of a pipeline's UNet while `run` runs it; process 0 does it for all.

    Raises:
        ConfigError: the UNet was not called, or received what cannot be recorded.
        QuestError: a value that is not finite.
    """
    state = processes()
    denoiser = unet_of(pipe)
    files: tempfile.TemporaryDirectory | None = None
    tables: list[CallTable] = []
    if state.is_main_process:
        files = tempfile.TemporaryDirectory(prefix="quest-calibration-")
        recorder = CallRecorder(Path(files.name))
        watch = ProcessorWatch(denoiser)
        with hooks(denoiser, {"": watch}, "input"), recorder.on(denoiser):
            run()
        tables = recorder.tables()
    own = Calibration(tables)
    found = broadcast_from(own._table_tensors(), 0)
    skeletons = broadcast_value(own._skeletons(), 0)
    if not skeletons:
        raise ConfigError("calibrate: the pipeline has run, but its denoiser was not called")
    if not state.is_main_process:
        tables = _tables(found, skeletons)
    return Calibration(tables, model_digest(denoiser), files)


def pick_samples(calib: Calibration, count: int, seed: int) -> list[Batch]:
    """Draw `count` calls (x_t, t), a batch a table: all steps in turn, samples at random.

    Each table gives as many as it has steps among all, rounded up.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for table in calib.tables:
        share = -(-count * len(table.t) // len(calib.t))
        step = torch.arange(share) % len(table.t)
        which = torch.randint(table.width, (share,), generator=generator)
        batches.append(table.batch(step, which))
    return batches
