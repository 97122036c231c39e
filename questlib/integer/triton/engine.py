"""The Triton engine as the registry knows it. Triton is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from questlib.integer.interface import Engine

if TYPE_CHECKING:
    from torch import nn

    from questlib.integer.form import IntegerForm
    from questlib.integer.modules import IntegerAttention, IntegerLayer
    from questlib.quantization.attention import QuantAttnProcessor
    from questlib.quantization.step_groups import StepGroups


def _check() -> None:
    from questlib.integer.triton.runtime import require_engine

    require_engine()


def _make_layer(form: IntegerForm, steps: StepGroups, options: Mapping[str, Any]) -> IntegerLayer:
    from questlib.integer.triton.layers import TritonLayer

    return TritonLayer(form, steps, options["weights"])


def _make_attention(processor: QuantAttnProcessor, name: str, heads: int) -> IntegerAttention:
    from questlib.integer.triton.attention import TritonAttnProcessor

    return TritonAttnProcessor(processor, name, heads)


def _finish(unet: nn.Module, options: Mapping[str, Any]) -> None:
    from questlib.integer.triton.flags import hold_flagged
    from questlib.integer.triton.fused import fuse
    from questlib.integer.triton.graphs import use_graphs

    if options["fuse"]:
        fuse(unet)
    hold_flagged(unet)
    if options["graphs"]:
        use_graphs(unet)


def _after_call(unet: nn.Module) -> None:
    """Kernels raise flags: a look after each call, not a wait in each layer."""
    from questlib.integer.triton.flags import check_finite

    check_finite(unet)


TRITON = Engine(
    name="triton",
    device="cuda",
    check=_check,
    make_layer=_make_layer,
    make_attention=_make_attention,
    options=frozenset({"weights", "fuse", "graphs"}),
    finish=_finish,
    after_call=_after_call,
)
