"""AdaRound block reconstruction as in Q-Diffusion / BRECQ: the baseline of the tables, and where QuEST starts.

Blocks in the order of execution: ResBlocks, attention blocks, and the single layers between them. For each, rounding is learned
so that the quantized block, on inputs from the model quantized so far, reproduces the full-precision block's output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from tqdm import tqdm

from questlib.calibration import Batch, Calibration
from questlib.capture import capture_calls, capture_outputs, run_time_layers
from questlib.config import QuantConfig
from questlib.finetuning.losses import local_loss
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers, set_mode
from questlib.quantization.roles import TIME_ROLES

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, Attention, TimestepEmbedding)
ROUND_WEIGHT, BETA_START, BETA_END, WARMUP = 0.01, 20.0, 2.0, 0.2  # AdaRound's regularizer


def blocks(unet: nn.Module, inputs: Batch) -> list[str]:
    """Names of the units of reconstruction in the order in which a forward runs them; every layer is in exactly one."""
    found: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, BLOCKS) or isinstance(child, QuantLayer):
                if any(isinstance(m, QuantLayer) for m in child.modules()):
                    found.append(path)
            else:
                visit(child, f"{path}.")

    visit(unet, "")
    order: list[str] = []
    handles = [
        unet.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: order.append(n))
        for n in found
    ]
    try:
        with torch.no_grad():
            inputs[:1].run(unet)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))  # a block that never runs has nothing to reconstruct


def pick_samples(calib: Calibration, count: int, seed: int) -> Batch:
    """`count` pairs (x_t, t), steps in equal shares."""
    steps, n = calib.x.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    step = torch.arange(count) % steps
    which = torch.randint(n, (count,), generator=generator)
    return calib.batch(step, which)


def _join(batches: list) -> Callable[[torch.Tensor], tuple[tuple, dict]]:
    """Concatenate recorded calls; the result picks rows `idx` of every tensor argument."""

    def stack(values: list):
        return torch.cat(values) if torch.is_tensor(values[0]) and values[0].ndim > 0 else values[0]

    args = [stack([b[0][i] for b in batches]) for i in range(len(batches[0][0]))]
    kwargs = {k: stack([b[1][k] for b in batches]) for k in batches[0][1]}

    def rows(idx: torch.Tensor) -> tuple[tuple, dict]:
        def pick(v):
            return v[idx] if torch.is_tensor(v) and v.ndim > 0 else v

        return tuple(map(pick, args)), {k: pick(v) for k, v in kwargs.items()}

    return rows


def _each_block(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    desc: str,
    progress: bool,
) -> Iterator:
    """For each block: the student's block, a function idx -> call arguments, the teacher's outputs, and the step groups [n]."""
    inputs = pick_samples(calib, config.adaround.samples, config.seed)
    groups = torch.as_tensor(student.quest_steps.lookup(inputs.t)).expand(len(inputs))
    for name in tqdm(blocks(student, inputs), desc=desc, disable=not progress, mininterval=2):
        calls, _ = capture_calls(student, name, inputs, config.forward_batch)
        _, targets = capture_calls(teacher, name, inputs, config.forward_batch)
        yield student.get_submodule(name), _join(calls), torch.cat(targets), groups


def _minimize(
    block,
    rows,
    target,
    groups,
    steps,
    params: list[dict],
    iters: int,
    config: QuantConfig,
    regularizer=None,
) -> None:
    opt = torch.optim.Adam(params)
    generator = torch.Generator().manual_seed(config.seed)
    scale = 1.0 / target.pow(2).mean().clamp_min(
        1e-8
    )  # relative error: one regularizer weight serves every block
    for i in range(iters):
        idx = torch.randint(
            len(target), (min(config.batch_size, len(target)),), generator=generator
        )
        steps.current = groups[idx]
        args, kwargs = rows(idx)
        loss = (block(*args, **kwargs) - target[idx]).pow(2).mean() * scale
        if regularizer is not None:
            loss = loss + regularizer(i)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()


def rounding_loss(layers: list[QuantLayer], i: int, iters: int) -> torch.Tensor | float:
    """AdaRound's regularizer at iteration i: after a warm-up it draws every rounding to 0 or 1, ever more sharply."""
    progress = i / max(1, iters)
    if progress < WARMUP:
        return 0.0
    beta = BETA_END + (BETA_START - BETA_END) * (1 - (progress - WARMUP) / (1 - WARMUP))
    return ROUND_WEIGHT * sum(
        (1 - (2 * layer.weight_quantizer.rounding() - 1).abs().pow(beta)).mean() for layer in layers
    )


def _start(layers: list[QuantLayer]) -> list[nn.Parameter]:
    for layer in layers:
        layer.thaw()
    return [layer.weight_quantizer.start_adaround(layer.weight) for layer in layers]


def _harden(layers: list[QuantLayer]) -> None:
    for layer in layers:
        layer.weight.data.copy_(layer.weight_quantizer.harden(layer.weight))
        layer.freeze()


def reconstruct_time(
    student: nn.Module, teacher: nn.Module, calib: Calibration, config: QuantConfig
) -> None:
    """AdaRound of all time-embedding layers as one block, on what it gives at every calibrated step: the temporal features that
    the ResBlocks receive (TFMQ-DM, Huang et al. 2024: temporal information block and its reconstruction)."""
    layers = [
        m
        for m in quant_layers(student).values()
        if m.role in TIME_ROLES and m.weight_quantizer is not None
    ]
    names = [n for n, m in quant_layers(student).items() if m.role == "time_proj"]
    t = calib.t.to(student.device)
    with torch.no_grad(), capture_outputs(teacher, names) as targets:
        run_time_layers(teacher, t)
    opt = torch.optim.Adam([{"params": _start(layers), "lr": config.adaround.lr}])
    for i in range(config.adaround.iters):
        with capture_outputs(student, names) as own:
            run_time_layers(student, t)
        loss = local_loss(own, targets, normalize=True) + rounding_loss(
            layers, i, config.adaround.iters
        )
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    _harden(layers)


def reconstruct_weights(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    progress: bool = False,
) -> None:
    """AdaRound, block by block, activations in full precision; each layer's weight ends inside its learned rounding cell."""
    set_mode(student, weights=True, acts=False)
    for layer in quant_layers(student).values():
        layer.freeze()
    done = TIME_ROLES if config.adaround.temporal_block else ()
    if done:
        reconstruct_time(student, teacher, calib, config)
    for block, rows, target, groups in _each_block(
        student, teacher, calib, config, "adaround", progress
    ):
        layers = [
            m
            for m in block.modules()
            if isinstance(m, QuantLayer) and m.weight_quantizer is not None and m.role not in done
        ]
        if not layers:
            continue
        regularizer = functools.partial(rounding_loss, layers, iters=config.adaround.iters)
        params = [{"params": _start(layers), "lr": config.adaround.lr}]
        _minimize(
            block,
            rows,
            target,
            groups,
            student.quest_steps,
            params,
            config.adaround.iters,
            config,
            regularizer,
        )
        _harden(layers)
    set_mode(student, weights=True, acts=True)


def reconstruct_acts(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    progress: bool = False,
) -> None:
    """Q-Diffusion's second stage: the activation scales of each block are trained on the block's output error, weights fixed."""
    set_mode(student, weights=True, acts=True)
    for layer in quant_layers(student).values():
        layer.freeze()
    for block, rows, target, groups in _each_block(
        student, teacher, calib, config, "act scales", progress
    ):
        params = [
            {"params": [q.scale], "lr": config.act_recon.lr * q.scale.detach().mean().item()}
            for q in act_quantizers(block)
            if q.enabled
        ]
        for group in params:
            group["params"][0].requires_grad_(True)
        _minimize(
            block, rows, target, groups, student.quest_steps, params, config.act_recon.iters, config
        )
        for group in params:
            group["params"][0].requires_grad_(False)
