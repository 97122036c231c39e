"""Integer execution of quantized layers: their form, the oracle, and the engines."""
