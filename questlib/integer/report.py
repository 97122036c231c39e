"""How each layer of a UNet runs."""

from __future__ import annotations

import pandas as pd
from torch import nn

from questlib.integer.engines import ATTENTION, LAYERS
from questlib.integer.form import packed_size
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.layers import QuantLayer

# ---- report ----


def engine_report(unet: nn.Module) -> pd.DataFrame:
    """One row a layer: name, engine that really runs it, format, bytes of its weights in the checkpoint and in memory."""
    rows = []
    for name, module in unet.named_modules():
        if isinstance(module, LAYERS):
            rows.append(
                (name, module.engine, module.format, module.packed_bytes, module.resident_bytes)
            )
        elif isinstance(module, ATTENTION):
            rows.append((name.removesuffix(".processor"), module.engine, module.format, 0, 0))
        elif isinstance(module, QuantLayer | nn.Linear | nn.Conv2d):
            quantized = isinstance(module, QuantLayer) and (
                module.weight_quantizer is not None or module.input_quantizer.enabled
            )
            simulated = quantized and (module.input_quantizer.enabled or module.weights_on)
            engine = "fake" if simulated else str(module.weight.dtype).removeprefix("torch.")
            size = module.weight.numel() * module.weight.element_size()
            packed = (
                packed_size(module.weight.numel(), module.weight_quantizer.bits)
                if simulated and module.weight_quantizer is not None
                else size
            )
            rows.append((name, engine, "simulated" if simulated else "not quantized", packed, size))
        elif isinstance(module, QuantAttnProcessor):
            rows.append((name.removesuffix(".processor"), "fake", "simulated", 0, 0))
    return pd.DataFrame(
        rows, columns=["layer", "engine", "format", "checkpoint bytes", "resident bytes"]
    )
