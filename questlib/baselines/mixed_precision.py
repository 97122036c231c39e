"""Bits for each layer by its sensitivity (MixDQ, Zhao et al. 2024).

The sensitivity of a layer to b bits is the error of the model's output when this layer alone is
quantized. Here the error is the squared one of the predicted noise, where MixDQ takes one metric
for content and one for quality. An integer program then chooses bits b_l for each layer:

    minimize    sum_l sensitivity_l(b_l)
    subject to  sum_l n_l b_l <= B sum_l n_l

where n_l is the number of a layer's weights, or of its inputs' values, and B the mean that
`weight_bits` or `act_bits` names. Weights and inputs of layers are chosen one after the other. The
operands of attention's products keep `act_bits`. Layers whose bits another choice fixes (the first
and the last layer, the time path) take no part where it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from questlib.calibration import Calibration, pick_samples
from questlib.calls import Batch
from questlib.capture import hooks
from questlib.config import QuantConfig
from questlib.errors import ConfigError
from questlib.observers import init_ranges
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import quant_layers, set_mode
from questlib.quantization.preparation import prepare
from questlib.quantization.roles import TIME_ROLES

Sensitivities = dict[str, dict[int, float]]  # by layer, by bits


def with_chosen_bits(unet: nn.Module, calib: Calibration, config: QuantConfig) -> QuantConfig:
    """The configuration with `layer_weight_bits` and `layer_act_bits` chosen by sensitivity.

    Without `mixed` choices it is the one that was given.

    Args:
        unet: the full-precision UNet.
        calib: its calls.
        config: `mixed` names the candidates, `weight_bits` and `act_bits` the means.

    Raises:
        ConfigError: layers have bits of their own already, or scipy is not installed.
    """
    if not config.mixed.enabled:
        return config
    if config.layer_weight_bits or config.layer_act_bits:
        raise ConfigError(
            "mixed: expected no layer_weight_bits and layer_act_bits beside it, which it chooses"
        )
    choices = {"weight": config.mixed.weight_choices, "act": config.mixed.act_choices}
    plain = config.replace(mixed={"weight_choices": [], "act_choices": []})
    chosen = {}
    for kind, bits in choices.items():
        if bits:
            found, sizes = sensitivities(unet, calib, plain, kind, sorted(set(bits)))
            mean = config.weight_bits if kind == "weight" else config.act_bits
            chosen[f"layer_{kind}_bits"] = choose_bits(found, sizes, mean)
    return config.replace(**chosen)


def is_free(layer: QuantLayer, config: QuantConfig, kind: str) -> bool:
    """Whether no other choice fixes a layer's bits."""
    fixed: dict[str, Any] = {}
    ends = config.first_last_weight_bits if kind == "weight" else config.first_last_act_bits
    if ends is not None:
        fixed |= {"first": ends, "last": ends}
    if kind == "act" and config.te_act_bits is not None:
        fixed |= dict.fromkeys(TIME_ROLES, config.te_act_bits)
    return layer.role not in fixed


# ---- how much each layer suffers ----


@torch.no_grad()
def sensitivities(
    unet: nn.Module, calib: Calibration, config: QuantConfig, kind: str, choices: Sequence[int]
) -> tuple[Sensitivities, dict[str, int]]:
    """The error of the model's output with one operand of one layer quantized.

    Args:
        unet: the full-precision UNet.
        calib: its calls.
        config: without `mixed`.
        kind: "weight" or "act".
        choices: candidate bits.

    Returns:
        Squared errors of the predicted noise by layer and bits, and the size of each layer's
        operand: the number of its weights, or of its input's values for one sample.
    """
    batches = pick_samples(calib, config.mixed.sensitivity_samples, config.seed)
    found: Sensitivities = {}
    sizes: dict[str, int] = {}
    for bits in choices:
        # One set of activation scales is enough to compare layers.
        own = config.replace(**{f"{kind}_bits": bits}, step_groups=1, calib_batch=32)
        student = prepare(unet, own, calib.t)
        if kind == "act":
            init_ranges(student, calib, own)
        layers = {n: x for n, x in quant_layers(student).items() if is_free(x, config, kind)}
        if not sizes:
            sizes = operand_sizes(student, layers, batches[0], kind)
        set_mode(student, weights=False, acts=False)
        for name, layer in layers.items():
            switch(layer, kind, on=True)
            error = sum(squared_error(student, batch) for batch in batches)
            found.setdefault(name, {})[bits] = error / len(batches)
            switch(layer, kind, on=False)
    return found, sizes


def switch(layer: QuantLayer, kind: str, on: bool) -> None:
    """Quantize one operand of a layer, or leave it in full precision."""
    if kind == "act":
        layer.input_quantizer.enabled = on
    else:
        layer.weights_on = on


def squared_error(unet: nn.Module, batch: Batch) -> float:
    """Of the predicted noise, relative to its power."""
    out = batch.run(unet).cpu()
    return ((out - batch.eps).pow(2).mean() / batch.eps.pow(2).mean()).item()


def operand_sizes(
    unet: nn.Module, layers: Mapping[str, QuantLayer], batch: Batch, kind: str
) -> dict[str, int]:
    """Number of values of each layer's weight, or of its input for one sample."""
    if kind == "weight":
        return {name: layer.weight.numel() for name, layer in layers.items()}
    sizes: dict[str, int] = {}

    def measures(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            sizes[name] = args[0][0].numel()

        return hook

    set_mode(unet, weights=False, acts=False)
    with hooks(unet, {name: measures(name) for name in layers}, "input"):
        batch[:1].run(unet)
    return sizes


# ---- the integer program ----


def choose_bits(
    sensitivity: Sensitivities, sizes: Mapping[str, int], mean: float
) -> dict[str, int]:
    """Bits for each layer with the least summed sensitivity, whose mean by size is at most `mean`.

    Args:
        sensitivity: by layer and candidate bits.
        sizes: what a layer counts in the mean.
        mean: of the bits.

    Raises:
        ConfigError: no candidates have so small a mean, or scipy is not installed.

    Example:
        >>> choose_bits({"a": {2: 9.0, 6: 0.0}, "b": {2: 1.0, 6: 0.0}}, {"a": 10, "b": 10}, 4)
        {'a': 6, 'b': 2}
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ConfigError(
            "mixed: expected scipy, which chooses the bits; pip install scipy"
        ) from error
    names = list(sensitivity)
    pairs = [(name, bits) for name in names for bits in sensitivity[name]]
    total = sum(sizes[name] for name in names)
    cost = torch.tensor([sensitivity[name][bits] for name, bits in pairs], dtype=torch.float64)
    share = [sizes[name] * bits / total for name, bits in pairs]
    one = [[float(own == name) for own, _ in pairs] for name in names]
    found = milp(
        (cost / cost.max().clamp_min(1e-300)).numpy(),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint([share], -float("inf"), mean)],
        integrality=torch.ones(len(pairs)).numpy(),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        least = sum(sizes[name] * min(sensitivity[name]) for name in names) / total
        raise ConfigError(
            f"mixed: expected candidates with a mean of at most {mean} bits, found {least:g} at "
            f"the least ({found.message})"
        )
    return {name: bits for (name, bits), x in zip(pairs, found.x, strict=True) if x > 0.5}
