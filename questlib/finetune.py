"""QuEST's selective, network-wise finetuning (paper, Sec. 3.3): one loop, two progressive stages.

Stage TLA trains the time-embedding layers on L_TLA + w L_G, stage CMA the attention-related layers on L_CMA + w L_G; all
activation scales are trained along. Only the selected layers' weights have gradients; every other weight stays at its
quantized value.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from tqdm import tqdm

from questlib.calibrate import Batch, Calibration
from questlib.config import QuantConfig
from questlib.distributed import mean, processes, synchronize
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.layers import QuantLayer
from questlib.low_rank import attach, merge, trained_numbers
from questlib.model import freeze, quant_layers, step_groups
from questlib.stages import Stage, StageAdam, stages, trainable
from questlib.versions import STAGE_VERSIONS

SAVE_EVERY = 100
STATE_FORMAT = 2  # of saved states; 1 held the optimizer's moments of each activation scale apart


class PassDone(Exception):
    """Ends a forward pass of which nothing more is needed."""


@contextmanager
def recorded(
    unet: nn.Module, names: list[str], device: str | None = None, stop: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Inside the block, the dict holds the last output of each named layer, with its gradient history; on `device` if given.

    stop: leave the block as soon as each of them has run, without what a UNet computes after the last one.
    """
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            outputs[name] = out if device is None else out.to(device)
            if stop and len(outputs) == len(names):
                raise PassDone

        return keep

    handles = [unet.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
    except PassDone:
        pass
    finally:
        for handle in handles:
            handle.remove()


def run_time_layers(unet: nn.Module, t: torch.Tensor) -> None:
    """Run only the layers that map t to the embedding and its projections, t int64 [T] (Property 1: they see t alone)."""
    steps = getattr(unet, "quest_steps", None)
    if steps is not None:
        steps.current = steps.lookup(t)
    emb = unet.time_embedding(unet.time_proj(t).to(unet.dtype))  # [T, 4 * width]
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.time_emb_proj(emb if block.skip_time_act else block.nonlinearity(emb))


def local_loss(student: dict, teacher: dict, normalize: bool) -> torch.Tensor:
    """L_TLA and L_CMA: the sum over layers of the mean squared difference.

    normalize: the mean over layers of the error relative to the teacher's power: layers, and L_G beside them, count alike. The
    power is that of the whole batch, of all processes, so that their mean gradient is the gradient of one process's larger batch.
    """
    powers = mean(torch.stack([target.pow(2).mean() for target in teacher.values()])) if normalize else None
    total = 0.0
    for i, (name, target) in enumerate(teacher.items()):
        error = (student[name] - target.to(student[name].device)).pow(2).mean()
        total = total + (error / powers[i].to(error.device).clamp_min(1e-8) if normalize else error)
    return total / len(teacher) if normalize else total


def losses(
    student: nn.Module, teacher: nn.Module, stage: Stage, config: QuantConfig, batch: Batch, te_t: torch.Tensor,
    te_targets: dict[str, torch.Tensor],
) -> tuple[torch.Tensor | float, torch.Tensor]:  # fmt: skip
    """(local, global) loss of one batch; te_t [T] and te_targets are for the TE layers."""
    local: torch.Tensor | float = 0.0
    names = list(stage.layers)
    if stage.name == "tla":
        if config.tla_order == "sequential":  # one step's outputs and, below, its inputs
            now = te_t == batch.t[0].to(te_t.device)
            te_t, te_targets = te_t[now], {name: target[now] for name, target in te_targets.items()}
        if stage.local:
            with recorded(student, names) as own:
                run_time_layers(student, te_t)
            local = local_loss(own, te_targets, config.normalize_local)
        out = batch.run(student)
    elif stage.local:
        with torch.no_grad(), recorded(teacher, names, "cpu" if config.save_memory else None, stop=True) as target:
            batch.run(teacher)
        with recorded(student, names) as own:
            out = batch.run(student)
        local = local_loss(own, target, config.normalize_local)
    else:
        out = batch.run(student)
    return local, (out - batch.eps.to(out.device)).pow(2).mean()


def settle(layers: Iterable[QuantLayer]) -> None:
    """Frozen layers that stay as they are keep one tensor in place of two: their quantized weight, whose codes are the same."""
    for layer in layers:
        if layer.w_hat is not None:
            layer.weight.data = layer.w_hat


def check_shares(batch_size: int) -> None:
    """ConfigError when the processes cannot share a batch out evenly."""
    world = processes().num_processes
    if batch_size % world:
        raise ConfigError(f"batch_size: expected a multiple of {world} processes, found {batch_size}")


def finetune(
    unet: nn.Module, teacher: nn.Module, calib: Calibration, config: QuantConfig, *, state_path: str | Path | None = None,
    progress: bool = False,
) -> dict:  # fmt: skip
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
    trained = {id(m): trained_numbers(m, stage.rank) for stage in todo for m in stage.layers.values()}
    log["trained_weights"] = sum(trained.values())
    log["trained_fraction"] = log["trained_weights"] / sum(m.weight.numel() for m in quant_layers(unet).values())
    version = f"{STATE_FORMAT}-v{STAGE_VERSIONS['finetune']}"
    key = hashlib.sha256(f"{version}-{config.hash()}-{calib.hash()}".encode()).hexdigest()
    state = _load_state(state_path, key)
    untrained = [m for m in quant_layers(unet).values() if id(m) not in trained] if config.save_memory else []

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
        with torch.no_grad(), recorded(teacher, list(stage.layers) if stage.name == "tla" else []) as te_targets:
            run_time_layers(teacher, te_t)
        # a state of the stage before has none of this one's low-rank updates
        between = state is not None and state["iteration"] == 0
        if between:
            unet.load_state_dict(state["model"])
        attach(stage.layers.values(), stage.rank, config.seed)
        start = 0
        if state is not None:  # before `trainable`, which takes relative learning rates from the stage's starting point
            if not between:
                unet.load_state_dict(state["model"])
            log, start = state["log"], state["iteration"]
            rest()
        groups = trainable(unet, stage, config)
        params = [p for g in groups for p in g["params"]]
        opt = StageAdam(groups)
        decay = (lambda i, n=stage.iters: 0.5 * (1 + math.cos(math.pi * i / n))) if config.lr_decay else (lambda i: 1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, decay)
        generator = torch.Generator().manual_seed(config.seed + number)
        if start:  # a state with iteration 0 is the end of the stage before
            opt.load_state_dict(state["opt"]), schedule.load_state_dict(state["schedule"])
            generator.set_state(state["rng"])
        state = None
        clock = time.perf_counter() - log["seconds"]
        for i in tqdm(
            range(start, stage.iters), desc=stage.name, disable=not progress, mininterval=2, initial=start, total=stage.iters
        ):
            batch = _batch(calib, config, stage, i, generator)
            local, total = losses(unet, teacher, stage, config, batch, te_t, te_targets)
            loss = local + config.global_weight * total
            local, total = mean(torch.stack([torch.as_tensor(local).detach().to(total.device), total.detach()])).tolist()
            if not math.isfinite(local + total):  # of all processes: they stop together
                raise QuestError(
                    f"finetune: loss is {local} (local), {total} (global) in stage {stage.name} at iteration {i}; "
                    "lower the learning rates"
                )
            loss.backward()
            for p in params:
                p.grad = None if p.grad is None else mean(p.grad)
            opt.step(), schedule.step()
            opt.zero_grad(set_to_none=True)  # here, so that the next forward pass does not carry them along
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


def _batch(calib: Calibration, config: QuantConfig, stage: Stage, i: int, generator: torch.Generator) -> Batch:
    """Random calls: over all steps, or (TLA in sequential order, release) the i-th share of the stage is one step's.

    Of several processes, each draws the same batch and takes its part of it.
    """
    steps, n = calib.x.shape[:2]
    if stage.name == "tla" and config.tla_order == "sequential":
        step = torch.full((config.batch_size,), min(i * steps // stage.iters, steps - 1))
    else:
        step = torch.randint(steps, (config.batch_size,), generator=generator)
    which = torch.randint(n, (config.batch_size,), generator=generator)
    state = processes()
    own = slice(state.process_index, None, state.num_processes)
    return calib.batch(step[own], which[own])


def _save_state(path, key, unet, stage, iteration, log, opt, schedule, generator) -> None:
    if not processes().is_main_process:
        return
    tmp = Path(path).with_suffix(f".tmp{os.getpid()}")
    state = dict(key=key, stage=stage, iteration=iteration, log=log, model=unet.state_dict(), opt=opt.state_dict(),
                 schedule=schedule.state_dict(), rng=generator.get_state())  # fmt: skip
    torch.save(state, tmp)
    os.replace(tmp, path)


def _load_state(path, key: str) -> dict | None:
    if path is None or not Path(path).exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state.get("key")
    except (OSError, RuntimeError, EOFError, LookupError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"finetune: {path} cannot be read ({error!r}); remove it to start again") from error
    if found != key:
        raise CheckpointError(
            f"finetune: {path} belongs to another configuration, calibration or version of questlib; remove it or name another"
        )
    return state
