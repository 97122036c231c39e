"""Quantized Linear and Conv2d: torch's own modules, plus quantizers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.weight_quantizer import WeightQuantizer


class QuantLayer(nn.Module):
    """What QuantLinear and QuantConv2d share: `act` quantizes the input, `wq` the weight.

    w_hat: the quantized weight is computed once (`freeze`) and reused at every forward until the weight may change (`thaw`).
    """

    role: str
    input_quantizer: ActQuantizer
    weight_quantizer: WeightQuantizer | None
    w_hat: torch.Tensor | None

    def quantized_weight(self) -> torch.Tensor:
        if self.w_hat is not None:
            return self.w_hat
        return (
            self.weight
            if self.weight_quantizer is None or not self.weights_on
            else self.weight_quantizer(self.weight)
        )

    @torch.no_grad()
    def freeze(self) -> None:
        self.w_hat = (
            self.weight_quantizer(self.weight)
            if self.weight_quantizer is not None and self.weights_on
            else None
        )

    def thaw(self) -> None:
        self.w_hat = None


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.input_quantizer(x), self.quantized_weight(), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)


def convert_layer(
    module: nn.Linear | nn.Conv2d, role: str, act: ActQuantizer, wq: WeightQuantizer | None
) -> None:
    """Turn a layer into its quantized class in place: same object, same parameters, same name in the model."""
    module.__class__ = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
    module.role, module.input_quantizer, module.weight_quantizer, module.weights_on = (
        role,
        act,
        wq,
        True,
    )
    module.register_buffer(
        "w_hat", None, persistent=False
    )  # a buffer, so that .to() takes it along
