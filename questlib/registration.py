"""Registers questlib's quantizer with diffusers, when diffusers is imported or now.

`import questlib` loads neither torch nor diffusers. So the quantizer is registered once diffusers'
own registry has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "diffusers.quantizers.auto"


class _Loader(Loader):
    """Loads the registry as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the registry's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the registry's own loader; then add the quantizer to it."""
        self.loader.exec_module(module)
        add_quantizer(module)


class _Finder(MetaPathFinder):
    """Finds the registry, for `_Loader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The registry's spec; None for any other module."""
        if name != REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def add_quantizer(registry: ModuleType) -> None:
    """Add `quant_method: "quest"` to diffusers' registry."""
    own = import_module("questlib.diffusers_quantizer")
    if not hasattr(own, "QuestQuantizer"):
        return  # It is being imported, has asked for diffusers itself, and registers at its end.
    registry.AUTO_QUANTIZER_MAPPING[own.METHOD] = own.QuestQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[own.METHOD] = own.QuestQuantizationConfig


def register() -> None:
    """Register now where diffusers' registry is imported, else when it is."""
    if REGISTRY in sys.modules:
        add_quantizer(sys.modules[REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
