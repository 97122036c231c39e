"""Smoothing and the low-rank branch of SVDQuant (Li et al. 2025).

For a linear layer with inputs X and weight W both are found on calibrated inputs, layer by layer:

1. smoothing: d_k = max |X_k|^a / max |W_k|^(1 - a), as in SmoothQuant (Xiao et al. 2023,
   Eq. 4). The migration strength a is the one whose layer has the least output error with inputs
   and weights quantized; no smoothing at all is a candidate, too;
2. the branch: the largest singular values of W d go into two thin matrices of 16 bits.

The layer keeps the rest of the weight, whose range is searched again. `questlib.quantization.
transforms` computes with what is found here. SVDQuant rounds the rest by GPTQ; here AdaRound may
follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from questlib.calibration import Calibration, pick_samples
from questlib.capture import hooks
from questlib.config import OFF, QuantConfig
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import quant_layers
from questlib.quantization.primitives import EPS, fake_quant
from questlib.quantization.range_search import choose_qparams
from questlib.quantization.transforms import Transform
from questlib.quantization.weight_quantizer import WeightQuantizer

STRENGTHS = (0.25, 0.5, 0.75)  # candidates for a
ROWS = 1024  # inputs of a layer that candidates are compared on


class Inputs:
    """What a linear layer receives: the largest of each channel, and a sample of rows."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.largest: torch.Tensor | None = None  # [K]
        self.rows: list[torch.Tensor] = []  # [n, K] each

    def add(self, x: torch.Tensor, keep: int) -> None:
        """Take in x [..., K], of which `keep` rows are kept."""
        rows = x.detach().flatten(0, -2).float()  # [..., K] -> [n, K]
        largest = rows.abs().amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        picked = torch.randperm(len(rows), generator=self.generator)[:keep]
        self.rows.append(rows[picked.to(rows.device)].cpu())


@torch.no_grad()
def fit_transforms(
    student: nn.Module, teacher: nn.Module, calib: Calibration, config: QuantConfig
) -> None:
    """Find divisors and branches of all layers that have them, and the ranges of their weights.

    Args:
        student: the prepared UNet; its layers' weights are set anew from the teacher's.
        teacher: the full-precision UNet.
        calib: the teacher's calls.
        config: `transforms`, bits, `adaround.samples` for the number of calls, `seed`.
    """
    chosen = config.transforms
    if not chosen.smoothing and not chosen.low_rank:
        return
    layers = {n: x for n, x in quant_layers(student).items() if x.transform is not None}
    found = record_inputs(teacher, list(layers), calib, config)
    for name, layer in layers.items():
        full = teacher.get_submodule(name).weight.detach().to(layer.weight)
        fit(layer, full, found[name], config)


def record_inputs(
    teacher: nn.Module, names: list[str], calib: Calibration, config: QuantConfig
) -> dict[str, Inputs]:
    """What the named layers of the full-precision model receive on calibrated calls."""
    found = {name: Inputs(config.seed) for name in names}
    batches = [
        part
        for batch in pick_samples(calib, config.adaround.samples, config.seed)
        for part in batch.split(config.forward_batch)
    ]
    keep = -(-ROWS // len(batches))

    def keeps(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[name].add(args[0], keep)

        return hook

    with hooks(teacher, {name: keeps(name) for name in names}, "input"):
        for batch in batches:
            batch.run(teacher)
    return found


def fit(layer: QuantLayer, full: torch.Tensor, inputs: Inputs, config: QuantConfig) -> None:
    """Find the divisor and the branch of one layer, and give it the rest of its weight.

    Args:
        layer: with a transform.
        full: W, float32 [O, K].
        inputs: of the layer.
        config: bits, ranges of weights, `transforms`.
    """
    transform, quantizer = layer.transform, layer.weight_quantizer
    assert transform is not None and inputs.largest is not None
    x = torch.cat(inputs.rows).to(full.device)  # [n, K]
    bits = layer.input_quantizer.bits
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    for divisor in divisors(full, inputs.largest, config.transforms.smoothing):
        if transform.divisor is not None:
            transform.divisor.copy_(divisor)
        if transform.up is not None:
            transform.set_branch(transform.turned(full))
        error = output_error(transform, quantizer, full, x, bits, config)
        if best is None or error < best[0]:
            best = error, {name: v.clone() for name, v in transform.state_dict().items()}
    assert best is not None
    transform.load_state_dict(best[1])
    layer.weight.data = transform.weight(full)
    if quantizer is not None:
        quantizer.search(layer.weight, config.weight_range, config.weight_range_norm)


def divisors(full: torch.Tensor, largest: torch.Tensor, smoothing: bool) -> Iterator[torch.Tensor]:
    """Candidates for d [K]: all 1, and one for each migration strength.

    Args:
        full: W [O, K].
        largest: max |X_k| [K].
        smoothing: whether there are others than 1.
    """
    yield torch.ones_like(largest)
    if not smoothing:
        return
    weights = full.abs().amax(0).clamp_min(EPS)
    inputs = largest.to(full.device).clamp_min(EPS)
    for strength in STRENGTHS:
        divisor = inputs**strength / weights ** (1 - strength)
        # A common factor changes nothing; around 1 both operands keep their size.
        yield divisor / divisor.log().mean().exp()


def output_error(
    transform: Transform,
    quantizer: WeightQuantizer | None,
    full: torch.Tensor,
    x: torch.Tensor,
    bits: int,
    config: QuantConfig,
) -> float:
    """The squared error of a layer's output with weights to nearest and inputs quantized by row.

    Args:
        transform: with its candidate for d.
        quantizer: of the weight; None where weights are not quantized.
        full: W [O, K].
        x: inputs [n, K].
        bits: of the inputs.
    """
    weight = transform.weight(full)
    if quantizer is not None:
        nearest = WeightQuantizer.from_weight(
            weight, quantizer.bits, quantizer.index, config.weight_range, config.weight_range_norm
        )
        weight = nearest(weight)

    def quantized(rows: torch.Tensor) -> torch.Tensor:
        if bits != OFF:
            scale, zero_point = choose_qparams(rows, rows.amin(1), rows.amax(1), bits, "minmax")
            rows = fake_quant(rows, scale[:, None], zero_point[:, None], bits)
        return F.linear(rows, weight)

    return (transform.around(x, quantized) - F.linear(x, full)).pow(2).mean().item()
