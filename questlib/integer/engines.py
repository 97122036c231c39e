"""The engines that run quantized layers in integers, by name."""

from __future__ import annotations

import torch
from torch import nn

from questlib.errors import ConfigError
from questlib.integer.cpu.attention import CpuAttnProcessor
from questlib.integer.cpu.layers import CpuLayer, saturates
from questlib.integer.form import IntegerForm
from questlib.integer.triton import layers
from questlib.integer.triton.attention import TritonAttnProcessor
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.step_groups import StepGroups

ENGINES = ("cpu", "reference", "triton")
CPU_ENGINES = ENGINES[:2]  # need the model on the CPU
WEIGHTS = ("packed", "int8")
LAYERS = (CpuLayer, layers.TritonLayer)
ATTENTION = (CpuAttnProcessor, TritonAttnProcessor)


def choose_engine(engine: str) -> str:
    """`engine`, or for "auto" the one of this machine. ConfigError for an unknown name, EngineError when it cannot run here."""
    if engine not in (*ENGINES, "auto"):
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, auto, found {engine!r}")
    if engine == "auto":
        engine = "triton" if torch.cuda.is_available() else "cpu"
    if engine == "cpu":
        saturates()  # raises where the kernels are missing or inexact
    elif engine == "triton":
        layers.require_engine()
    return engine


def make_layer(engine: str, form: IntegerForm, steps: StepGroups, weights: str) -> nn.Module:
    if engine == "triton":
        return layers.TritonLayer(form, steps, weights)
    return CpuLayer(form, steps, exact=engine == "reference")


def make_attention(
    engine: str, processor: QuantAttnProcessor, name: str, heads: int
) -> QuantAttnProcessor:
    if engine == "triton":
        return TritonAttnProcessor(processor, name, heads)
    return CpuAttnProcessor(processor, name, exact=engine == "reference")
