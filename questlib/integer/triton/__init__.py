"""The GPU engine: Triton kernels."""
