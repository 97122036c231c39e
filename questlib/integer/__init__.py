"""Integer execution of quantized layers. `reference` is the oracle: slow, obvious, int64."""

from questlib.integer.convert import convert, engine_report

__all__ = ["convert", "engine_report"]
