"""What draws the images of a quantized row: the simulation, or the same model in integers.

Both give the same codes for the same input (docs: the integer engine), and integers are about
twice as fast on a CPU. "fastest" takes them where it can, checkpoint by checkpoint, and the row's
result names what was taken.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import questlib
from questlib.errors import EngineError
from questlib.integer.modules import IntegerLayer, TransformedLayer
from questlib.integer.report import engine_report
from questlib.kernels.library import kernels
from reproduce.scales import FASTEST, SIMULATED

# How a layer runs, as a row's result counts them.
INTEGERS = "integers"
INTEGERS_BESIDE_FLOAT = "integers beside float"
SIMULATED_LAYERS = "simulated"
NOT_QUANTIZED = "not quantized"


class Drawing(NamedTuple):
    """A checkpoint as its images are drawn."""

    unet: nn.Module

    engine: str
    """As the row's result names it: "fake", "cpu", "cpu fused", ..."""

    reason: str | None = None
    """Why "fastest" took the simulation."""


def open_for_drawing(folder: Path, engine: str, device: torch.device) -> Drawing:
    """Load a checkpoint as `engine` runs it.

    The tables' numbers are of single precision on every machine, layer by layer for an engine that
    was named. "fastest" fuses where the kernels are compiled.

    Args:
        folder: of the checkpoint.
        engine: "fake", "fastest", or an integer engine.
        device: where the pipeline is. "fastest" takes integers on a CPU only: on a GPU the engine's
            speed comes from half precision.

    Raises:
        EngineError: the engine that was named cannot run here, or the checkpoint has a layer
            without integer form.

    Example:
        >>> unet, engine, reason = open_for_drawing(folder / "unet", "fastest", pipe.device)
    """
    if engine != FASTEST:
        named = questlib.from_pretrained(
            folder, engine=engine, dtype=torch.float32, fuse=False, graphs=False
        )
        return Drawing(named.to(device), engine)
    simulated = questlib.from_pretrained(folder, dtype=torch.float32).to(device)
    if device.type != "cpu":
        return Drawing(simulated, SIMULATED, f"the model is on {device.type}")
    try:
        fuse = kernels().library is not None
        converted = questlib.convert(simulated, "cpu", fuse=fuse)
    except EngineError as error:
        return Drawing(simulated, SIMULATED, str(error))
    if not any(isinstance(layer, IntegerLayer) for layer in converted.modules()):
        return Drawing(simulated, SIMULATED, "no layer has both weights and inputs in integers")
    return Drawing(converted, "cpu fused" if fuse else "cpu")


def layer_counts(unet: nn.Module) -> dict[str, int]:
    """Number of linear layers, convolutions and attentions by how they run; the most first.

    Layers "in integers beside float" multiply in integers, and are rotated, smoothed, or have a
    branch of low rank in floating point.

    Example:
        >>> layer_counts(open_for_drawing(folder / "unet", "fastest", pipe.device).unet)
        {'integers': 55, 'integers beside float': 28}
    """
    beside = {name for name, m in unet.named_modules() if isinstance(m, TransformedLayer)}
    counts: Counter[str] = Counter()
    for layer in engine_report(unet):
        if layer.format in (SIMULATED_LAYERS, NOT_QUANTIZED):
            counts[layer.format] += 1
        else:
            counts[INTEGERS_BESIDE_FLOAT if layer.layer in beside else INTEGERS] += 1
    return dict(counts.most_common())
