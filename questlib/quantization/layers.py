"""Quantized Linear and Conv2d: torch's own modules, with quantizers of their input and weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.weight_quantizer import WeightQuantizer


class QuantLayer(nn.Module):
    """What QuantLinear and QuantConv2d share.

    Attributes:
        role: see `questlib.quantization.roles.layer_roles`.
        input_quantizer: of the layer's input.
        weight_quantizer: of its weight; None where weights stay in full precision.
        weights_on: whether the weight is quantized at present.
        w_hat: the quantized weight, computed once by `freeze`; None while the weight may change.
    """

    role: str
    input_quantizer: ActQuantizer
    weight_quantizer: WeightQuantizer | None
    weights_on: bool
    w_hat: torch.Tensor | None

    def quantized_weight(self) -> torch.Tensor:
        """The weight that the forward pass uses."""
        if self.w_hat is not None:
            return self.w_hat
        if self.weight_quantizer is None or not self.weights_on:
            return self.weight
        return self.weight_quantizer(self.weight)

    @torch.no_grad()
    def freeze(self) -> None:
        """Quantize the weight once, for all forward passes until `thaw`."""
        self.w_hat = None
        if self.weight_quantizer is not None and self.weights_on:
            self.w_hat = self.weight_quantizer(self.weight)

    def thaw(self) -> None:
        """Quantize the weight at each forward pass again, because it may change."""
        self.w_hat = None


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.input_quantizer(x), self.quantized_weight(), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)


def add_quantizers(
    module: nn.Linear | nn.Conv2d,
    role: str,
    input_quantizer: ActQuantizer,
    weight_quantizer: WeightQuantizer | None,
) -> None:
    """Turn a layer into its quantized class in place.

    It stays the same object, with the same parameters and name in its model.
    """
    module.__class__ = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
    module.role = role
    module.input_quantizer = input_quantizer
    module.weight_quantizer = weight_quantizer
    module.weights_on = True
    # a buffer, so that `.to()` takes it along
    module.register_buffer("w_hat", None, persistent=False)
