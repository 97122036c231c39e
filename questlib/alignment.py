"""How far the outputs of quantized layers are from those of the full-precision model."""

from __future__ import annotations

import torch

from questlib.distributed import mean

SMALLEST_POWER = 1e-8  # an output that is all zero has no relative error


def alignment_error(
    quantized: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], *, relative: bool
) -> torch.Tensor:
    """The mean squared error of each layer's output, taken together over the layers.

    Args:
        quantized: outputs of the quantized model's layers, by name.
        targets: outputs of the same layers in full precision; they may be on another device.
        relative: False: the sum over the layers, as in the paper's losses. True: each error is
            divided by the mean square of its target, and the mean over the layers is taken, so
            that layers with small outputs count as much as layers with large ones.

    Returns:
        A scalar with a gradient. Under several processes the mean squares are those of the whole
        batch, so that the mean gradient of the processes is the gradient of one process's batch.
    """
    # Half precision has no squares of small outputs, and no SMALLEST_POWER.
    targets = {name: target.float() for name, target in targets.items()}
    errors = [
        (quantized[name] - target.to(quantized[name].device)).pow(2).mean()
        for name, target in targets.items()
    ]
    if not relative:
        return sum(errors, torch.zeros(()))
    powers = mean(torch.stack([target.pow(2).mean() for target in targets.values()]))
    total = sum(
        error / power.to(error.device).clamp_min(SMALLEST_POWER)
        for error, power in zip(errors, powers, strict=True)
    )
    return total / len(errors)
