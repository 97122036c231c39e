"""QuEST's selective, network-wise finetuning (paper, Sec. 3.3): one loop, two progressive stages.

Stage TLA trains the time-embedding layers on L_TLA + w L_G, stage CMA the attention-related layers on L_CMA + w L_G; all
activation scales are trained along. Only the selected layers' weights have gradients; every other weight stays at its
quantized value.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from questlib.baselines.low_rank import attach, count_trainable, merge
from questlib.calibration import Batch, Calibration
from questlib.capture import capture_outputs, run_time_layers
from questlib.config import QuantConfig
from questlib.distributed import mean, processes, synchronize
from questlib.errors import ConfigError, QuestError
from questlib.finetuning.losses import losses
from questlib.finetuning.optimizer import StageAdam
from questlib.finetuning.stages import Stage, stages, trainable
from questlib.finetuning.state import STATE_FORMAT, _load_state, _save_state
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import freeze, quant_layers, step_groups
from questlib.versions import STAGE_VERSIONS

SAVE_EVERY = 100


def settle(layers: Iterable[QuantLayer]) -> None:
    """Frozen layers that stay as they are keep one tensor in place of two: their quantized weight, whose codes are the same."""
    for layer in layers:
        if layer.w_hat is not None:
            layer.weight.data = layer.w_hat


def check_shares(batch_size: int) -> None:
    """ConfigError when the processes cannot share a batch out evenly."""
    world = processes().num_processes
    if batch_size % world:
        raise ConfigError(
            f"batch_size: expected a multiple of {world} processes, found {batch_size}"
        )


def finetune(
    unet: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    state_path: str | Path | None = None,
    progress: bool = False,
) -> dict:
    """Finetune a quantized UNet in place against its full-precision teacher; returns the log.

    With `state_path` the state is saved every 100 iterations and at each stage's end, and resumed from when the file exists; a
    resumed run continues bit for bit. CheckpointError when the file belongs to another configuration, calibration or version.
    Under `accelerate launch` every process calls this with the same calibration: each takes its part of every batch, gradients
    are averaged, process 0 writes the state. ConfigError when the batch cannot be shared out evenly.
    Log: seconds, loss [[stage, iteration, local, global], ...], trained_weights, trained_fraction.
    """
    step_groups(unet)
    todo = stages(unet, config)
    check_shares(config.batch_size)
    log = {"seconds": 0.0, "loss": [], "trained_weights": 0, "trained_fraction": 0.0}
    if not todo:
        return log
    trained = {
        id(m): count_trainable(m, stage.rank) for stage in todo for m in stage.layers.values()
    }
    log["trained_weights"] = sum(trained.values())
    log["trained_fraction"] = log["trained_weights"] / sum(
        m.weight.numel() for m in quant_layers(unet).values()
    )
    version = f"{STATE_FORMAT}-v{STAGE_VERSIONS['finetune']}"
    key = hashlib.sha256(f"{version}-{config.hash()}-{calib.hash()}".encode()).hexdigest()
    state = _load_state(state_path, key)
    untrained = (
        [m for m in quant_layers(unet).values() if id(m) not in trained]
        if config.save_memory
        else []
    )

    def rest() -> None:
        freeze(unet)
        settle(untrained)

    rest()
    synchronize(unet)
    if config.save_memory:
        unet.enable_gradient_checkpointing()
    te_t = calib.t.to(unet.device)
    for number, stage in enumerate(todo):
        if state is not None and state["stage"] > number:
            continue
        with (
            torch.no_grad(),
            capture_outputs(
                teacher, list(stage.layers) if stage.name == "tla" else []
            ) as te_targets,
        ):
            run_time_layers(teacher, te_t)
        # a state of the stage before has none of this one's low-rank updates
        between = state is not None and state["iteration"] == 0
        if between:
            unet.load_state_dict(state["model"])
        attach(stage.layers.values(), stage.rank, config.seed)
        start = 0
        if (
            state is not None
        ):  # before `trainable`, which takes relative learning rates from the stage's starting point
            if not between:
                unet.load_state_dict(state["model"])
            log, start = state["log"], state["iteration"]
            rest()
        groups = trainable(unet, stage, config)
        params = [p for g in groups for p in g["params"]]
        opt = StageAdam(groups)
        decay = (
            (lambda i, n=stage.iters: 0.5 * (1 + math.cos(math.pi * i / n)))
            if config.finetuning.lr_decay
            else (lambda i: 1.0)
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, decay)
        generator = torch.Generator().manual_seed(config.seed + number)
        if start:  # a state with iteration 0 is the end of the stage before
            opt.load_state_dict(state["opt"]), schedule.load_state_dict(state["schedule"])
            generator.set_state(state["rng"])
        state = None
        clock = time.perf_counter() - log["seconds"]
        for i in tqdm(
            range(start, stage.iters),
            desc=stage.name,
            disable=not progress,
            mininterval=2,
            initial=start,
            total=stage.iters,
        ):
            batch = _batch(calib, config, stage, i, generator)
            local, total = losses(unet, teacher, stage, config, batch, te_t, te_targets)
            loss = local + config.finetuning.global_weight * total
            local, total = mean(
                torch.stack([torch.as_tensor(local).detach().to(total.device), total.detach()])
            ).tolist()
            if not math.isfinite(local + total):  # of all processes: they stop together
                raise QuestError(
                    f"finetune: loss is {local} (local), {total} (global) in stage {stage.name} at iteration {i}; "
                    "lower the learning rates"
                )
            loss.backward()
            for p in params:
                p.grad = None if p.grad is None else mean(p.grad)
            opt.step(), schedule.step()
            opt.zero_grad(
                set_to_none=True
            )  # here, so that the next forward pass does not carry them along
            for p in (p for g in groups if g["positive"] for p in g["params"]):
                p.data.clamp_min_(1e-8)  # a scale stays positive
            log["loss"].append([stage.name, i, local, total])
            if state_path is not None and (i + 1) % SAVE_EVERY == 0 and i + 1 < stage.iters:
                log["seconds"] = time.perf_counter() - clock
                _save_state(state_path, key, unet, number, i + 1, log, opt, schedule, generator)
        log["seconds"] = time.perf_counter() - clock
        merge(stage.layers.values())
        rest()
        if state_path is not None:
            _save_state(state_path, key, unet, number + 1, 0, log, opt, schedule, generator)
    if state is not None:  # every stage was done when it was saved
        log = state["log"]
        unet.load_state_dict(state["model"])
        rest()
    unet.disable_gradient_checkpointing()
    return log


def _batch(
    calib: Calibration, config: QuantConfig, stage: Stage, i: int, generator: torch.Generator
) -> Batch:
    """Random calls: over all steps, or (TLA in sequential order, release) the i-th share of the stage is one step's.

    Of several processes, each draws the same batch and takes its part of it.
    """
    steps, n = calib.x.shape[:2]
    if stage.name == "tla" and config.finetuning.tla_order == "sequential":
        step = torch.full((config.batch_size,), min(i * steps // stage.iters, steps - 1))
    else:
        step = torch.randint(steps, (config.batch_size,), generator=generator)
    which = torch.randint(n, (config.batch_size,), generator=generator)
    state = processes()
    own = slice(state.process_index, None, state.num_processes)
    return calib.batch(step[own], which[own])
