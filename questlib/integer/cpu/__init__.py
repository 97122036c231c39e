"""The CPU engine: oneDNN's int8 kernels."""
