"""What an engine tells the rest of the library about itself.

Without torch, so that the names and choices of all engines are known before it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from questlib.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from questlib.integer.form import IntegerForm
    from questlib.integer.modules import IntegerAttention, IntegerLayer
    from questlib.quantization.attention import QuantAttnProcessor
    from questlib.quantization.step_groups import StepGroups

# Choices of `convert` that only some engines take, and their values; the first is the default.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "weights": ("packed", "int8"),
    "fuse": (False, True),
    "graphs": (False, True),
}


@dataclass(frozen=True)
class Engine:
    """One way to run quantized layers in integers.

    The functions import the engine's kernels when they are first called, so that an engine that is
    never asked for costs nothing.
    """

    name: str
    """What users ask for."""

    device: Literal["cpu", "cuda"]
    """The type of device that the converted layers run on."""

    check: Callable[[], None]
    """Raises EngineError when the engine cannot run on this machine."""

    make_layer: Callable[[IntegerForm, StepGroups, Mapping[str, Any]], IntegerLayer]
    """(form, steps, options) -> the layer. EngineError when the engine does not serve it."""

    make_attention: Callable[[QuantAttnProcessor, str, int], IntegerAttention]
    """(processor, name, heads) -> the processor in integers. EngineError likewise."""

    options: frozenset[str] = frozenset()
    """The names in OPTIONS that the engine takes."""

    finish: Callable[[nn.Module, Mapping[str, Any]], None] | None = None
    """(unet, options): runs once, when all layers are converted."""

    after_call: Callable[[nn.Module], None] | None = None
    """(unet): runs after each call of the UNet, to report what its kernels have flagged."""

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Check values of OPTIONS.

        Raises:
            ConfigError: a value that no engine knows, or a choice that this engine does not have.
        """
        for name, value in given.items():
            values = OPTIONS[name]
            if value not in values:
                expected = ", ".join(map(str, values))
                raise ConfigError(f"{name}: expected one of {expected}, found {value!r}")
            if name not in self.options and value != values[0]:
                raise ConfigError(f"{name}: engine {self.name} has no such choice, found {value!r}")
