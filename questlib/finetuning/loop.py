"""QuEST's selective, network-wise finetuning (paper, Sec. 3.3): one loop, two progressive stages.

Stage TLA trains the time-embedding layers on L_TLA + 2 L_G, then stage CMA the attention-related
layers on L_CMA + 2 L_G. Both train all activation scales. Only the weights of the selected layers
have gradients; every other weight stays at its quantized value.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from questlib.baselines import low_rank
from questlib.calibration import Calibration, TimeCalls
from questlib.calls import Batch
from questlib.capture import capture_outputs
from questlib.config import QuantConfig
from questlib.diffusion.digests import model_digest
from questlib.distributed import broadcast_value, mean, processes, synchronize
from questlib.errors import ConfigError, QuestError
from questlib.finetuning.losses import Outputs, stage_losses
from questlib.finetuning.optimizer import StageAdam, constant, cosine_decay
from questlib.finetuning.stages import ParameterGroup, Stage, select_parameters, select_stages
from questlib.finetuning.state import STATE_FORMAT, FinetuningLog, FinetuningState
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import freeze, quant_layers, step_groups
from questlib.quantization.precision import cast
from questlib.quantization.primitives import EPS
from questlib.quantization.time_path import run_time_layers
from questlib.versions import STAGE_VERSIONS

SAVE_EVERY = 100  # iterations between two saved states
VISIT = 16  # iterations of CMA on one step group before the next one's turn (release)


def finetune(
    unet: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    state_path: str | Path | None = None,
    save_every: int = SAVE_EVERY,
    progress: bool = False,
) -> FinetuningLog:
    """Finetune a quantized UNet in place against its full-precision teacher (paper, Sec. 3.3).

    A UNet in half precision is trained in float32, and is in half precision again afterwards.

    Under `accelerate launch` every process calls this with the same calibration. Each takes its
    part of every batch, gradients are averaged, and process 0 writes the state.

    Args:
        unet: what `questlib.quantize` returned.
        teacher: the full-precision UNet that it was made from.
        calib: the teacher's calls, from `questlib.calibrate`.
        config: the run's configuration; `config.finetuning` decides on stages and losses.
        state_path: file in which the state is saved every `save_every` iterations and at the end of
            each stage. When the file exists, finetuning resumes from it, bit for bit.
        save_every: iterations between two saved states.
        progress: whether to show a progress bar.

    Returns:
        The log: seconds, losses of each iteration, number of trained weights.

    Raises:
        ConfigError: `unet` is not quantized, the batch cannot be divided among the processes, or
            the calibration is of another model than the teacher.
        CheckpointError: the state is damaged, or of another configuration, calibration, teacher,
            quantized UNet or version.
        StorageError: the state cannot be saved.
        QuestError: the loss is no longer finite.

    Example:
        >>> config = QuantConfig.preset("quest", 4, 4)
        >>> unet = questlib.quantize(pipe.unet, config, calib)
        >>> log = questlib.finetune(unet, pipe.unet, calib, config, state_path="finetune.pt")
    """
    step_groups(unet)
    check_batch_sizes(config)
    model = calib.check(teacher)
    stages = select_stages(unet, config)
    job = Finetuning(unet, teacher, calib, config, stages)
    if not stages:
        return job.log
    key = state_key(config, calib, model)
    state = None
    if state_path is not None:
        # The last bits of the processes' UNets may differ; they go on with those of process 0.
        own = broadcast_value(model_digest(unet), 0)
        state = FinetuningState.load(state_path, key, own)

    def save(stage: int, run: StageRun | None = None) -> None:
        if state_path is not None and processes().is_main_process:
            job.state(key, own, stage, run).save(state_path)

    dtype = unet.dtype
    job.prepare()
    first = 0 if state is None else state.stage
    if state is not None and state.between_stages:
        job.load_model(state)
        state = None
    for number, stage in enumerate(stages[first:], first):
        run = job.begin_stage(number, stage, state)
        state = None
        started = time.perf_counter() - job.log["seconds"]
        bar = tqdm(
            desc=stage.name,
            initial=run.iteration,
            total=stage.iters,
            disable=not progress,
            mininterval=2,
        )
        with bar:
            while run.iteration < stage.iters:
                job.iterate(run)
                bar.update()
                job.log["seconds"] = time.perf_counter() - started
                if run.iteration % save_every == 0 and run.iteration < stage.iters:
                    save(number, run)
        job.end_stage(stage)
        save(number + 1)
    unet.disable_gradient_checkpointing()
    cast(unet, dtype)
    return job.log


def check_batch_sizes(config: QuantConfig) -> None:
    """Raise ConfigError when the processes cannot take equal parts of a batch."""
    world = processes().num_processes
    sizes = {"batch_size": config.batch_size}
    sizes |= {
        name: size
        for name in ("tla_batch_size", "cma_batch_size")
        if (size := getattr(config.finetuning, name)) is not None
    }
    for name, size in sizes.items():
        if size % world:
            raise ConfigError(f"{name}: expected a multiple of {world} processes, found {size}")


def state_key(config: QuantConfig, calib: Calibration, model: str) -> str:
    """Digest of what a saved state belongs to: configuration, calibration, teacher, versions.

    Args:
        model: the teacher's digest.
    """
    version = f"{STATE_FORMAT}-v{STAGE_VERSIONS['finetune']}"
    about = f"{version}-{config.hash()}-{calib.hash()}-{model}"
    return hashlib.sha256(about.encode()).hexdigest()


def release_full_weights(layers: Iterable[QuantLayer]) -> None:
    """Let frozen layers keep one tensor in place of two: their quantized weight.

    It replaces the weight it was computed from. Their codes are the same, so that freezing such a
    layer again changes nothing.
    """
    for layer in layers:
        if layer.w_hat is not None:
            layer.weight.data = layer.w_hat


def draw_batch(
    calib: Calibration,
    stage: Stage,
    iteration: int,
    steps: torch.Tensor,
    generator: torch.Generator,
) -> Batch:
    """Draw the calls (x_t, t) of one iteration.

    Steps are drawn from all of them, which makes E_t one expectation over all steps (paper). In
    TLA's sequential order (release) the iterations are divided among the steps, one after another,
    and CMA's rounds (release) visit each step for some iterations. With several processes each
    draws the same batch and takes its part of it.

    Args:
        calib: the teacher's calls.
        stage: batch size, number of trajectories, order.
        iteration: of the stage.
        steps: the steps of the calibration that the stage goes over, int64 [T].
        generator: draws the steps and the trajectories.
    """
    size = stage.batch_size
    owners = calib.table_of_step[steps]
    if len(owners.unique()) > 1:
        # One batch is of one table. Each step is drawn equally often, as without tables.
        drawn = owners[torch.randint(len(steps), (1,), generator=generator)]
        steps = steps[owners == drawn]
    if stage.order == "joint":
        index = torch.randint(len(steps), (size,), generator=generator)
    elif stage.order == "sequential":
        index = torch.full((size,), iteration * len(steps) // stage.iters)
    else:
        index = torch.full((size,), iteration // visit(stage, len(steps)) % len(steps))
    step = steps[index]
    width = calib.width(step[0])
    n = width if stage.samples is None else min(stage.samples, width)
    which = torch.randint(n, (size,), generator=generator)
    state = processes()
    own = slice(state.process_index, None, state.num_processes)
    return calib.batch(step[own], which[own])


def global_weight(stage: Stage, config: QuantConfig) -> float:
    """The weight of L_G beside the stage's local loss, which is a sum over its layers."""
    weight = config.finetuning.global_weight
    if config.finetuning.global_per_layer and stage.local:
        return weight * len(stage.layers)
    return weight


def visit(stage: Stage, steps: int) -> int:
    """Iterations of one visit of a step in CMA's rounds: 16, or fewer so that each gets one."""
    return max(1, min(VISIT, stage.iters // steps))


@dataclass
class StageRun:
    """A stage that is running: what changes from one iteration to the next."""

    stage: Stage
    groups: list[ParameterGroup]
    optimizer: StageAdam
    schedule: torch.optim.lr_scheduler.LambdaLR
    generator: torch.Generator
    iteration: int = 0
    """The next iteration."""
    te_targets: Outputs = field(default_factory=dict)
    """The teacher's outputs of the time-embedding layers at all steps, where the timestep is all
    they see; empty outside of TLA."""


class Finetuning:
    """One call of `finetune`: the models, the data, the log, and the steps of a stage."""

    def __init__(
        self,
        unet: nn.Module,
        teacher: nn.Module,
        calib: Calibration,
        config: QuantConfig,
        stages: list[Stage],
    ) -> None:
        self.unet = unet
        self.teacher = teacher
        self.calib = calib
        self.config = config
        self.steps = torch.arange(len(calib.t))
        self.group_steps = self.steps
        if config.ranges.calib_steps == "first":
            first = step_groups(unet).first_steps().cpu()
            self.group_steps = torch.stack([(calib.t == t).nonzero()[0, 0] for t in first])
        trained = {
            layer: low_rank.count_trainable(layer, stage.rank)
            for stage in stages
            for layer in stage.layers.values()
        }
        layers = quant_layers(unet).values()
        self.untrained = [layer for layer in layers if layer not in trained]
        trained_weights = sum(trained.values())
        self.log: FinetuningLog = {
            "seconds": 0.0,
            "loss": [],
            "trained_weights": trained_weights,
            "trained_fraction": trained_weights / sum(layer.weight.numel() for layer in layers),
        }

    def prepare(self) -> None:
        """Before the first stage, of a resumed run too.

        Weights are trained in float32. Half precision has each weight in the middle of its code's
        cell; training starts at the point of the cell that is nearest to the teacher's weight.
        """
        if self.unet.dtype != torch.float32:
            cast(self.unet, torch.float32)
            for name, layer in quant_layers(self.unet).items():
                if layer.weight_quantizer is not None:
                    full = self.teacher.get_submodule(name).weight.to(layer.weight.device)
                    full = layer.own_weight(full)
                    layer.weight.data = layer.weight_quantizer.reopen(layer.codes(), full)
        self.rest()
        synchronize(self.unet)
        if self.config.save_memory:
            self.unet.enable_gradient_checkpointing()

    def rest(self) -> None:
        """Quantize every weight once and train nothing, as it is between two stages."""
        freeze(self.unet)
        if self.config.save_memory:
            release_full_weights(self.untrained)

    # ---- resuming ----

    def state(self, key: str, unet: str, stage: int, run: StageRun | None) -> FinetuningState:
        """What has to be saved now; run: the running stage, None between stages."""
        return FinetuningState(
            key=key,
            unet=unet,
            stage=stage,
            iteration=0 if run is None else run.iteration,
            log=self.log,
            model=self.unet.state_dict(),
            optimizer={} if run is None else run.optimizer.state_dict(),
            schedule={} if run is None else run.schedule.state_dict(),
            generator=None if run is None else run.generator.get_state(),
        )

    def load_model(self, state: FinetuningState) -> None:
        self.unet.load_state_dict(state.model)
        self.log = state.log
        self.rest()

    # ---- one stage ----

    def begin_stage(self, number: int, stage: Stage, state: FinetuningState | None) -> StageRun:
        """Select what is trained, and make its optimizer.

        Args:
            number: of the stage, 0 or 1.
            stage: the stage.
            state: saved inside this stage, to resume from; None: the stage starts.
        """
        low_rank.attach(stage.layers.values(), stage.rank, self.config.seed)
        if state is not None:
            # After the low-rank updates are attached, since the state has their tensors.
            self.load_model(state)
        groups = select_parameters(self.unet, stage, self.config)
        optimizer = StageAdam(groups)
        decay = cosine_decay(stage.iters) if self.config.finetuning.lr_decay else constant
        run = StageRun(
            stage=stage,
            groups=groups,
            optimizer=optimizer,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, decay),
            generator=torch.Generator().manual_seed(self.config.seed + number),
        )
        if state is not None:
            run.optimizer.load_state_dict(state.optimizer)
            run.schedule.load_state_dict(state.schedule)
            run.generator.set_state(state.generator)
            run.iteration = state.iteration
        return run

    @torch.no_grad()
    def te_targets(self, stage: Stage, calls: TimeCalls) -> Outputs:
        """O(t; w_l) of Eq. 4."""
        with capture_outputs(self.teacher, list(stage.layers)) as targets:
            run_time_layers(self.teacher, *calls)
        return targets

    def te_data(self, run: StageRun, batch: Batch) -> tuple[TimeCalls | None, Outputs]:
        """What TLA's local loss compares at this iteration, and the teacher's outputs for it.

        It is all calibrated steps. In sequential order (release) it is the step of the batch.
        """
        stage = run.stage
        if stage.name != "tla" or not stage.local:
            return None, {}
        only = batch.t[0] if stage.order == "sequential" else None
        drawn = self.calib.time_rows(self.unet, run.generator, only)
        rows = drawn[run.iteration % len(drawn)]
        chosen = rows.on(self.unet)
        if chosen.arguments:
            return chosen, self.te_targets(stage, rows.on(self.teacher))
        # The timestep alone: the outputs of all steps are computed once.
        if not run.te_targets:
            run.te_targets = self.te_targets(
                stage, self.calib.time_calls(self.unet, run.generator)[0]
            )
        kept = slice(None) if only is None else (self.calib.t == only)
        return chosen, {name: target[kept] for name, target in run.te_targets.items()}

    def iterate(self, run: StageRun) -> None:
        """One iteration: losses of a batch, one step of Adam, one entry of the log."""
        stage, i = run.stage, run.iteration
        steps = self.steps if stage.order == "joint" else self.group_steps
        if stage.order == "rounds" and i % visit(stage, len(steps)) == 0:
            run.optimizer.forget_scales()
        batch = draw_batch(self.calib, stage, i, steps, run.generator)
        local, total = stage_losses(
            self.unet, self.teacher, stage, self.config, batch, *self.te_data(run, batch)
        )
        loss = local + global_weight(stage, self.config) * total
        self.record(stage, i, local, total)

        loss.backward()
        for group in run.groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else mean(p.grad)
        run.optimizer.step()
        run.schedule.step()
        # Now, so that the next forward pass does not hold the gradients in memory beside it.
        run.optimizer.zero_grad(set_to_none=True)
        for group in run.groups:
            if group["positive"]:
                for scale in group["params"]:
                    scale.data.clamp_min_(EPS)
        run.iteration += 1

    def record(
        self, stage: Stage, i: int, local: torch.Tensor | float, total: torch.Tensor
    ) -> None:
        """Put the losses, means over all processes, into the log; QuestError if not finite.

        All processes see the same mean, and so stop together.
        """
        both = [torch.as_tensor(local).detach().to(total.device), total.detach()]
        local_value, global_value = mean(torch.stack(both)).tolist()
        if not math.isfinite(local_value + global_value):
            raise QuestError(
                f"finetune: loss is {local_value} (local), {global_value} (global) "
                f"in stage {stage.name} at iteration {i}; lower the learning rates"
            )
        self.log["loss"].append((stage.name, i, local_value, global_value))

    def end_stage(self, stage: Stage) -> None:
        low_rank.merge(stage.layers.values())
        self.rest()
