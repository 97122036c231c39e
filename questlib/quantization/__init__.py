"""Quantizers, the layers that hold them, and how a UNet gets them (paper, Sec. 3.1)."""
