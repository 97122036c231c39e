"""AdaRound (Nagel et al. 2020): learned rounding of weights, block by block as in Q-Diffusion.

It is the weight quantization of the paper (Sec. 3.1) and of the methods it compares with. Blocks
are reconstructed in the order in which they run (BRECQ, Li et al. 2021): ResBlocks, attention
blocks, and the single layers between them. Each gets the inputs that the model quantized so far
gives it, and its output is fitted to the full-precision block's.

Here too are two relatives of it: Q-Diffusion's training of activation scales, block by block, and
TFMQ-DM's reconstruction of the whole time path as one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from tqdm import tqdm

from questlib.alignment import alignment_error
from questlib.calibration import Batch, Calibration
from questlib.capture import Call, capture_calls, capture_outputs, execution_order
from questlib.config import QuantConfig
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers, set_mode
from questlib.quantization.roles import TIME_ROLES
from questlib.quantization.time_path import run_time_layers
from questlib.quantization.weight_quantizer import WeightQuantizer

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, Attention, TimestepEmbedding)

ROUND_WEIGHT = 0.01  # lambda, the weight of the regularizer
BETA_START = 20.0
BETA_END = 2.0
WARMUP = 0.2  # share of the iterations that run without the regularizer

Loss = Callable[[int], torch.Tensor]  # of an iteration


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


def pick_samples(calib: Calibration, count: int, seed: int) -> Batch:
    """Draw `count` pairs (x_t, t): all steps in turn, trajectories at random."""
    steps, n = calib.x.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    step = torch.arange(count) % steps
    which = torch.randint(n, (count,), generator=generator)
    return calib.batch(step, which)


class RecordedCalls:
    """The arguments of a block's recorded calls, joined along the batch."""

    def __init__(self, calls: list[Call]) -> None:
        first = calls[0]
        self.args = [_joined([call.args[i] for call in calls]) for i in range(len(first.args))]
        self.kwargs = {k: _joined([call.kwargs[k] for call in calls]) for k in first.kwargs}

    def rows(self, index: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keywords of the samples `index` int64 [B]."""
        args = [value[index] if _is_batched(value) else value for value in self.args]
        kwargs = {k: v[index] if _is_batched(v) else v for k, v in self.kwargs.items()}
        return args, kwargs


def _is_batched(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def _joined(values: list[Any]) -> Any:
    """Tensors along the batch; of anything else, which is the same in all calls, the first."""
    return torch.cat(values) if _is_batched(values[0]) else values[0]


@dataclass
class BlockData:
    """A block of the quantized model, and what it is fitted to."""

    block: nn.Module
    calls: RecordedCalls
    """What the block receives in the model quantized so far."""
    targets: torch.Tensor
    """Outputs of the full-precision block [N, ...]."""
    groups: torch.Tensor
    """Step group of each sample, int64 [N]."""


def block_data(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    desc: str,
    progress: bool,
) -> Iterator[BlockData]:
    """One block after another. Each is recorded when the ones before it are finished."""
    inputs = pick_samples(calib, config.adaround.samples, config.seed)
    groups = torch.as_tensor(student.quest_steps.lookup(inputs.t)).expand(len(inputs))
    runs = [part.run for part in inputs.split(config.forward_batch)]
    for name in tqdm(blocks(student, inputs), desc=desc, disable=not progress, mininterval=2):
        calls = RecordedCalls(capture_calls(student, name, runs))
        targets = torch.cat([call.output for call in capture_calls(teacher, name, runs)])
        yield BlockData(student.get_submodule(name), calls, targets, groups)


# ---- one minimization for all ----


def minimize(loss: Loss, groups: list[dict[str, Any]], iters: int) -> None:
    """Minimize `loss` by Adam.

    Args:
        loss: called with the number of each iteration.
        groups: Adam's parameter groups.
        iters: number of iterations.
    """
    optimizer = torch.optim.Adam(groups)
    for i in range(iters):
        value = loss(i)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()


def block_loss(student: nn.Module, data: BlockData, config: QuantConfig) -> Loss:
    """The mean squared error of the block's output on random batches.

    It is divided by the mean square of the targets, so that one weight of the regularizer serves
    every block.
    """
    generator = torch.Generator().manual_seed(config.seed)
    scale = 1.0 / data.targets.pow(2).mean().clamp_min(1e-8)
    size = min(config.batch_size, len(data.targets))

    def loss(i: int) -> torch.Tensor:
        index = torch.randint(len(data.targets), (size,), generator=generator)
        # The block runs alone, without the UNet's hook that selects the step groups.
        student.quest_steps.select_group(data.groups[index])
        args, kwargs = data.calls.rows(index)
        return (data.block(*args, **kwargs) - data.targets[index]).pow(2).mean() * scale

    return loss


def rounding_loss(quantizers: list[WeightQuantizer], i: int, iters: int) -> torch.Tensor | float:
    """AdaRound's regularizer (Nagel et al. 2020, Eq. 24) at iteration i of `iters`:

        lambda sum_layers mean_ij ( 1 - |2 h(V_ij) - 1|^beta )

    h(V) in 0..1 is the rounding of a weight, down or up. The term pulls it to 0 or 1. beta falls
    from 20 to 2, so that at first only weights near 0 or 1 are pulled, and all in the end. A
    warm-up runs without the term. The paper's sum over a layer's weights is a mean here.
    """
    progress = i / max(1, iters)
    if progress < WARMUP:
        return 0.0
    beta = BETA_END + (BETA_START - BETA_END) * (1 - (progress - WARMUP) / (1 - WARMUP))
    return ROUND_WEIGHT * sum(
        (1 - (2 * quantizer.rounding() - 1).abs().pow(beta)).mean() for quantizer in quantizers
    )


def learn_rounding(layers: list[QuantLayer], loss: Loss, config: QuantConfig) -> None:
    """Learn the rounding of the layers' weights, then move each weight to where it was rounded.

    The weight ends inside its learned rounding cell: rounding it to nearest gives AdaRound's code.
    Layers whose weights are not quantized are left alone.
    """
    pairs = [(x, x.weight_quantizer) for x in layers if x.weight_quantizer is not None]
    if not pairs:
        return
    for layer, _ in pairs:
        layer.thaw()
    alphas = [quantizer.start_adaround(layer.weight) for layer, quantizer in pairs]
    quantizers = [quantizer for _, quantizer in pairs]
    iters = config.adaround.iters
    minimize(
        lambda i: loss(i) + rounding_loss(quantizers, i, iters),
        [{"params": alphas, "lr": config.adaround.lr}],
        iters,
    )
    for layer, quantizer in pairs:
        layer.weight.data.copy_(quantizer.harden(layer.weight))
        layer.freeze()


# ---- the three reconstructions ----


def reconstruct_weights(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    progress: bool = False,
) -> None:
    """AdaRound, block by block, with activations in full precision; see `config.adaround`.

    Args:
        student: the quantized UNet, whose weights are changed in place.
        teacher: the full-precision UNet.
        calib: the teacher's calls.
        config: the run's configuration.
        progress: whether to show a progress bar.
    """
    set_mode(student, weights=True, acts=False)
    for layer in quant_layers(student).values():
        layer.freeze()
    done: tuple[str, ...] = ()
    if config.adaround.temporal_block:
        reconstruct_time(student, teacher, calib, config)
        done = TIME_ROLES
    for data in block_data(student, teacher, calib, config, desc="adaround", progress=progress):
        layers = [
            module
            for module in data.block.modules()
            if isinstance(module, QuantLayer) and module.role not in done
        ]
        learn_rounding(layers, block_loss(student, data, config), config)
    set_mode(student, weights=True, acts=True)


def reconstruct_time(
    student: nn.Module, teacher: nn.Module, calib: Calibration, config: QuantConfig
) -> None:
    """AdaRound of all time-embedding layers as one block (TFMQ-DM, Huang et al. 2024).

    Its outputs are the temporal features that the ResBlocks receive, at every calibrated step.
    """
    layers = quant_layers(student)
    projections = [name for name, layer in layers.items() if layer.role == "time_proj"]
    time_layers = [layer for layer in layers.values() if layer.role in TIME_ROLES]
    t = calib.t.to(student.device)
    with torch.no_grad(), capture_outputs(teacher, projections) as targets:
        run_time_layers(teacher, t)

    def loss(i: int) -> torch.Tensor:
        with capture_outputs(student, projections) as outputs:
            run_time_layers(student, t)
        return alignment_error(outputs, targets, relative=True)

    learn_rounding(time_layers, loss, config)


def reconstruct_acts(
    student: nn.Module,
    teacher: nn.Module,
    calib: Calibration,
    config: QuantConfig,
    *,
    progress: bool = False,
) -> None:
    """Train the activation scales of each block on its output's error, with fixed weights.

    This is Q-Diffusion's second stage; see `config.act_recon`. Learning rates are fractions of each
    scale. For the arguments see `reconstruct_weights`.
    """
    set_mode(student, weights=True, acts=True)
    for layer in quant_layers(student).values():
        layer.freeze()
    for data in block_data(student, teacher, calib, config, desc="act scales", progress=progress):
        scales = [quantizer.scale for quantizer in act_quantizers(data.block) if quantizer.enabled]
        if not scales:
            continue
        groups = [
            {"params": [scale], "lr": config.act_recon.lr * scale.detach().mean().item()}
            for scale in scales
        ]
        for scale in scales:
            scale.requires_grad_(True)
        minimize(block_loss(student, data, config), groups, config.act_recon.iters)
        for scale in scales:
            scale.requires_grad_(False)
