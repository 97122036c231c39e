"""AdaRound (Nagel et al. 2020): learned rounding of weights, block by block as in Q-Diffusion.

It is the weight quantization of the paper (Sec. 3.1) and of the methods it compares with. Blocks
are reconstructed in the order in which they run (BRECQ, Li et al. 2021): ResBlocks, attention
blocks, and the single layers between them. Each gets the inputs that the model quantized so far
gives it, and its output is fitted to the full-precision block's.

Here too are two relatives of it: Q-Diffusion's training of activation scales, block by block, and
TFMQ-DM's reconstruction of the whole time path as one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from tqdm import tqdm

from questlib.alignment import alignment_error
from questlib.calibration import Calibration, pick_samples
from questlib.calls import Batch, put_tensors, take_tensors
from questlib.capture import Call, capture_calls, capture_outputs, execution_order
from questlib.config import QuantConfig
from questlib.minimization import Loss, minimize
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers, set_mode
from questlib.quantization.roles import TIME_ROLES
from questlib.quantization.time_path import run_time_layers
from questlib.stage_cache import Parts, Unfinished

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, Attention, TimestepEmbedding)

BETA_START = 20.0
BETA_END = 2.0
WARMUP = 0.2  # share of the iterations that run without the regularizer
REFERENCE_BITS = 4  # at which `config.adaround.round_weight` is the regularizer's weight

# ---- blocks and their data ----


def blocks(unet: nn.Module, inputs: Batch) -> list[str]:
    """Names of the units of reconstruction, in the order in which a forward pass runs them.

    Every quantized layer that runs is in exactly one of them.

    Args:
        unet: the quantized UNet.
        inputs: calls of the UNet; the first one is run to find the order.
    """
    found: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if not isinstance(child, (*BLOCKS, QuantLayer)):
                visit(child, f"{path}.")
            elif any(isinstance(m, QuantLayer) for m in child.modules()):
                found.append(path)

    visit(unet, "")
    return execution_order(unet, found, inputs[:1].run)


class RecordedCalls:
    """The arguments of a block's recorded calls, joined along the batch.

    What has no batch dimension is the same in all calls.
    """

    def __init__(self, calls: list[Call]) -> None:
        found = [take_tensors([list(call.args), call.kwargs]) for call in calls]
        self.skeleton, self.constants = found[0]
        self.batched = {
            name: torch.cat([tensors[name] for _, tensors in found])
            for name, value in self.constants.items()
            if value.ndim and len(value) == len(calls[0].output)
        }

    def rows(self, index: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keywords of the samples `index` int64 [B]."""
        rows = {name: value[index] for name, value in self.batched.items()}
        args, kwargs = put_tensors(self.skeleton, self.constants | rows)
        return args, kwargs


@dataclass
class BlockData:
    """Calls of a block of the quantized model, and what it is fitted to."""

    block: nn.Module
    calls: RecordedCalls
    """What the block receives in the model quantized so far."""
    targets: torch.Tensor
    """Outputs of the full-precision block [N, ...]."""
    groups: torch.Tensor
    """Step group of each of the N outputs, int64 [N]."""


class BlockRecorder:
    """Records blocks on the same samples, each when the ones before it are finished.

    Args:
        student: the quantized UNet.
        teacher: the full-precision UNet.
        calib: the teacher's calls.
        config: `adaround.samples`, `forward_batch` and `seed`.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, calib: Calibration, config: QuantConfig
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.size = config.forward_batch
        self.inputs = pick_samples(calib, config.adaround.samples, config.seed)
        found = [blocks(student, inputs) for inputs in self.inputs]
        self.names = list(dict.fromkeys(name for names in found for name in names))

    def record(self, name: str) -> list[BlockData]:
        """The data of a block by its name, for each table of the calibration that calls it."""
        found = []
        for inputs in self.inputs:
            runs = [part.run for part in inputs.split(self.size)]
            calls = capture_calls(self.student, name, runs)
            if not calls:
                continue
            full = capture_calls(self.teacher, name, runs)
            targets = torch.cat([call.output for call in full]).float()
            groups = torch.as_tensor(self.student.quest_steps.lookup(inputs.t)).expand(len(inputs))
            groups = groups.repeat_interleave(len(targets) // len(inputs))
            block = self.student.get_submodule(name)
            found.append(BlockData(block, RecordedCalls(calls), targets, groups))
        return found


# ---- the error of a block ----


class BlockLoss:
    """The mean squared error of the block's output on random batches of `batch_size` calls.

    It is divided by the mean square of the targets, so that one weight of the regularizer serves
    every block. The tables take turns.

    Args:
        student: the quantized UNet.
        tables: the block's data.
        batch_size: calls a batch.
        seed: of the batches.
    """

    def __init__(
        self, student: nn.Module, tables: list[BlockData], batch_size: int, seed: int
    ) -> None:
        self.student = student
        self.tables = tables
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.scales = [1.0 / data.targets.pow(2).mean().clamp_min(1e-8) for data in tables]

    def __call__(self, i: int) -> torch.Tensor:
        """The loss of iteration i."""
        data = self.tables[i % len(self.tables)]
        scale = self.scales[i % len(self.tables)]
        size = min(self.batch_size, len(data.targets))
        index = torch.randint(len(data.targets), (size,), generator=self.generator)
        # The block runs alone, without the UNet's hook that selects the step groups.
        self.student.quest_steps.select_group(data.groups[index])
        args, kwargs = data.calls.rows(index)
        return (data.block(*args, **kwargs) - data.targets[index]).pow(2).mean() * scale


# ---- learned rounding ----


def round_beta(i: int, iters: int) -> float | None:
    """beta of AdaRound's regularizer at iteration i of `iters`; None in the warm-up without it.

    The regularizer is (Nagel et al. 2020, Eq. 24)

        lambda sum_layers mean_ij ( 1 - |2 h(V_ij) - 1|^beta )

    h(V) in 0..1 is the rounding of a weight, down or up. The term pulls it to 0 or 1. beta falls
    from 20 to 2, so that at first only weights near 0 or 1 are pulled, and all in the end.

    The original adds the sum over a block's weights to an error in the units of the block's
    output. Here the error is relative and the term is a mean, so that one lambda (`round_weight`)
    serves blocks of every size.
    """
    progress = i / max(1, iters)
    if progress < WARMUP:
        return None
    return BETA_END + (BETA_START - BETA_END) * (1 - (progress - WARMUP) / (1 - WARMUP))


def round_weight(weight: float, bits: int) -> float:
    """lambda for weights of some bits.

    A rounding error has a fourth of the power with each bit more. So has its regularizer:
    otherwise it outweighs the error at 8 bits, and every weight goes to the nearest code.

    Args:
        weight: lambda at 4 bits, `config.adaround.round_weight`.
        bits: of the quantizer.

    Example:
        >>> round_weight(10.0, 4), round_weight(10.0, 8)
        (10.0, 0.0390625)
    """
    return weight * 4.0 ** (REFERENCE_BITS - bits)


class Rounding(NamedTuple):
    """What learned rounding reports of a block."""

    decided: int
    """Number of its roundings that were 0 or 1 before they were hardened."""
    weights: int
    """Number of its roundings."""


def learn_rounding(
    layers: list[QuantLayer],
    loss: Loss,
    config: QuantConfig,
    generator: torch.Generator | None = None,
    unfinished: Unfinished | None = None,
) -> Rounding:
    """Learn the rounding of the layers' weights, then move each weight to where it was rounded.

    The weight ends inside its learned rounding cell: rounding it to nearest gives AdaRound's code.
    Layers whose weights are not quantized are left alone. For `generator` and `unfinished` see
    `minimize`.
    """
    pairs = [(x, x.weight_quantizer) for x in layers if x.weight_quantizer is not None]
    if not pairs:
        return Rounding(0, 0)
    for layer, _ in pairs:
        layer.thaw()
    alphas = [quantizer.start_adaround(layer.weight) for layer, quantizer in pairs]
    quantizers = [quantizer for _, quantizer in pairs]
    choices = config.adaround

    def regularize(i: int) -> None:
        beta = round_beta(i, choices.iters)
        for quantizer in quantizers if beta is not None else ():
            quantizer.regularize(beta, round_weight(choices.round_weight, quantizer.bits))

    minimize(
        loss,
        [{"params": alphas, "lr": choices.lr}],
        choices.iters,
        regularize,
        generator=generator,
        unfinished=unfinished,
    )
    decided = sum(quantizer.count_decided() for quantizer in quantizers)
    for layer, quantizer in pairs:
        layer.weight.data.copy_(quantizer.harden(layer.weight))
        layer.freeze()
    return Rounding(decided, sum(alpha.numel() for alpha in alphas))


def decided_share(record: Mapping[str, Sequence[int]]) -> float:
    """The share of all roundings that were decided, from what `reconstruct_weights` returns."""
    rounding = [Rounding(*counts) for counts in record.values()]
    return sum(r.decided for r in rounding) / max(1, sum(r.weights for r in rounding))


# ---- the three reconstructions ----


def reconstruct_weights(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    parts: Parts | None = None,
    progress: bool = False,
) -> dict[str, list[int]]:
    """AdaRound, block by block, with activations in full precision; see `config.adaround`.

    Args:
        student: the quantized UNet, whose weights are changed in place.
        teacher: the full-precision UNet.
        calib: the teacher's calls.
        config: the run's configuration.
        parts: keeps finished blocks, and gives those of a run that was stopped.
        progress: whether to show a progress bar.

    Returns:
        The values of a `Rounding` for each block, by its name.
    """
    parts = Parts() if parts is None else parts
    set_mode(student, weights=True, acts=False)
    for layer in quant_layers(student).values():
        layer.freeze()
    record: dict[str, list[int]] = {}

    def fill(
        name: str, layers: list[QuantLayer], compute: Callable[[Unfinished], Rounding]
    ) -> None:
        tensors = {str(i): layer.weight.data for i, layer in enumerate(layers)}
        filled = parts.fill(name, tensors, lambda unfinished: list(compute(unfinished)))
        record[name] = filled.record
        for layer in layers if filled.cached else ():
            layer.freeze()

    done: tuple[str, ...] = ()
    if config.adaround.temporal_block:
        done = TIME_ROLES
        layers = [layer for layer in quant_layers(student).values() if layer.role in TIME_ROLES]
        fill("time", layers, partial(reconstruct_time, student, teacher, calib, config))
    recorder = BlockRecorder(student, teacher, calib, config)
    for name in tqdm(recorder.names, desc="adaround", disable=not progress, mininterval=2):
        layers = [
            module
            for module in student.get_submodule(name).modules()
            if isinstance(module, QuantLayer) and module.role not in done
        ]

        def learn(
            unfinished: Unfinished, name: str = name, layers: list[QuantLayer] = layers
        ) -> Rounding:
            data = recorder.record(name)
            loss = BlockLoss(student, data, config.adaround.batch_size, config.seed)
            return learn_rounding(layers, loss, config, loss.generator, unfinished)

        fill(name, layers, learn)
    set_mode(student, weights=True, acts=True)
    return record


def reconstruct_time(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    unfinished: Unfinished | None = None,
) -> Rounding:
    """AdaRound of all time-embedding layers as one block (TFMQ-DM, Huang et al. 2024).

    Its outputs are the temporal features that the ResBlocks receive, at every calibrated step.
    For `unfinished` see `minimize`.
    """
    layers = quant_layers(student)
    projections = [name for name, layer in layers.items() if layer.role == "time_proj"]
    time_layers = [layer for layer in layers.values() if layer.role in TIME_ROLES]
    rows = calib.time_rows(student, torch.Generator().manual_seed(config.seed))
    calls = [row.on(student) for row in rows]
    goals = []
    for t, arguments in (row.on(teacher) for row in rows):
        with torch.no_grad(), capture_outputs(teacher, projections) as targets:
            run_time_layers(teacher, t, arguments)
        goals.append(targets)

    def loss(i: int) -> torch.Tensor:
        t, arguments = calls[i % len(calls)]
        with capture_outputs(student, projections) as outputs:
            run_time_layers(student, t, arguments)
        return alignment_error(outputs, goals[i % len(calls)], relative=True)

    return learn_rounding(time_layers, loss, config, unfinished=unfinished)


def reconstruct_acts(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    parts: Parts | None = None,
    progress: bool = False,
) -> None:
    """Train the activation scales of each block on its output's error, with fixed weights.

    This is Q-Diffusion's second stage; see `config.act_recon`. Learning rates are fractions of each
    scale. For the arguments see `reconstruct_weights`.
    """
    parts = Parts() if parts is None else parts
    set_mode(student, weights=True, acts=True)
    for layer in quant_layers(student).values():
        layer.freeze()
    recorder = BlockRecorder(student, teacher, calib, config)
    for name in tqdm(recorder.names, desc="act scales", disable=not progress, mininterval=2):
        quantizers = act_quantizers(student.get_submodule(name))
        scales = [quantizer.scale for quantizer in quantizers if quantizer.enabled]

        def train(
            unfinished: Unfinished, name: str = name, scales: list[nn.Parameter] = scales
        ) -> None:
            data = recorder.record(name)
            loss = BlockLoss(student, data, config.batch_size, config.seed)
            train_scales(scales, loss, config, unfinished)

        if scales:
            parts.fill(name, {str(i): scale.data for i, scale in enumerate(scales)}, train)


def train_scales(
    scales: list[nn.Parameter], loss: BlockLoss, config: QuantConfig, unfinished: Unfinished
) -> None:
    """Train the activation scales of one block."""
    groups = [
        {"params": [scale], "lr": config.act_recon.lr * scale.detach().mean().item()}
        for scale in scales
    ]
    for scale in scales:
        scale.requires_grad_(True)
    minimize(
        loss,
        groups,
        config.act_recon.iters,
        generator=loss.generator,
        unfinished=unfinished,
    )
    for scale in scales:
        scale.requires_grad_(False)
