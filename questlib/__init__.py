"""questlib: QuEST, low-bit diffusion-model quantization by selective finetuning.

The paper is arXiv 2402.03666. What stands here is the whole public interface for a diffusers
UNet; parts are loaded when they are first used, so that `import questlib` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from questlib.registration import register

if TYPE_CHECKING:
    from questlib.calibration import Calibration, calibrate
    from questlib.checkpoint import from_pretrained, save_pretrained
    from questlib.config import QuantConfig
    from questlib.diffusion.loading import load_pipeline
    from questlib.finetuning.loop import finetune
    from questlib.hub import model_card
    from questlib.integer.conversion import convert
    from questlib.integer.report import engine_report
    from questlib.post_training import quantize

_HOMES = {
    "Calibration": "questlib.calibration",
    "QuantConfig": "questlib.config",
    "calibrate": "questlib.calibration",
    "convert": "questlib.integer.conversion",
    "engine_report": "questlib.integer.report",
    "finetune": "questlib.finetuning.loop",
    "from_pretrained": "questlib.checkpoint",
    "load_pipeline": "questlib.diffusion.loading",
    "model_card": "questlib.hub",
    "quantize": "questlib.post_training",
    "save_pretrained": "questlib.checkpoint",
}

__all__ = [
    "Calibration",
    "QuantConfig",
    "calibrate",
    "convert",
    "engine_report",
    "finetune",
    "from_pretrained",
    "load_pipeline",
    "model_card",
    "quantize",
    "save_pretrained",
]

register()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("questlib")
    if name not in _HOMES:
        raise AttributeError(f"module 'questlib' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
