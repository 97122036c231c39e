"""The CPU engine and the reference engine, as the registry knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from questlib.errors import EngineError
from questlib.integer.interface import Engine

if TYPE_CHECKING:
    from torch import nn

    from questlib.integer.form import IntegerForm
    from questlib.integer.modules import IntegerAttention, IntegerLayer
    from questlib.quantization.attention import QuantAttnProcessor
    from questlib.quantization.step_groups import StepGroups


def _check() -> None:
    from questlib.integer.cpu.products import saturates

    saturates()  # raises where the kernels are missing or inexact


def _require_kernels() -> None:
    from questlib.kernels.library import kernels

    if kernels().library is None:
        raise EngineError(
            f"fuse=True needs the compiled CPU kernels, found none: {kernels().reason}; "
            "fuse=False does without"
        )


def _finish(unet: nn.Module, options: Mapping[str, Any]) -> None:
    from questlib.integer.cpu.fused import fuse

    if options["fuse"]:
        fuse(unet)


def _engine(name: str, exact: bool) -> Engine:
    def make_layer(
        form: IntegerForm, steps: StepGroups, options: Mapping[str, Any]
    ) -> IntegerLayer:
        from questlib.integer.cpu.layers import CpuLayer

        if options.get("fuse"):
            _require_kernels()
        return CpuLayer(form, steps, exact)

    def make_attention(processor: QuantAttnProcessor, name: str, heads: int) -> IntegerAttention:
        from questlib.integer.cpu.attention import CpuAttnProcessor

        return CpuAttnProcessor(processor, name, exact)

    def runs_anywhere() -> None:
        pass

    return Engine(
        name=name,
        device="cpu",
        check=runs_anywhere if exact else _check,
        make_layer=make_layer,
        make_attention=make_attention,
        options=frozenset() if exact else frozenset({"fuse"}),
        finish=None if exact else _finish,
    )


CPU = _engine("cpu", exact=False)
REFERENCE = _engine("reference", exact=True)
