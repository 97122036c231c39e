"""Integer execution of quantized layers. `reference` is the oracle: slow, obvious, int64."""
