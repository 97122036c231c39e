"""questlib: QuEST (arXiv 2402.03666), low-bit diffusion-model quantization by selective finetuning, for diffusers UNets."""

from questlib.calibrate import Calibration, calibrate
from questlib.checkpoint import from_pretrained, save_pretrained
from questlib.config import QuantConfig
from questlib.finetune import finetune
from questlib.integer import convert, engine_report
from questlib.quantize import quantize

__all__ = [
    "Calibration",
    "QuantConfig",
    "calibrate",
    "convert",
    "engine_report",
    "finetune",
    "from_pretrained",
    "quantize",
    "save_pretrained",
]
