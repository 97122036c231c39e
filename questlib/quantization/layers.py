"""Quantized Linear and Conv2d: torch's own modules, with quantizers of their input and weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from questlib.errors import ConfigError
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.transforms import Transform
from questlib.quantization.weight_quantizer import WeightQuantizer

HALF = (torch.float16, torch.bfloat16)


class QuantLayer(nn.Module):
    """What QuantLinear and QuantConv2d share.

    Attributes:
        role: see `questlib.quantization.roles.layer_roles`.
        input_quantizer: of the layer's input.
        weight_quantizer: of its weight; None where weights stay in full precision.
        weights_on: whether the weight is quantized at present.
        w_hat: the quantized weight, computed once by `freeze`; None while the weight may change.
        held_codes: the weight's codes, where its precision cannot tell them apart; else None.
        transform: what stands before and beside a linear layer; else None.
    """

    role: str
    input_quantizer: ActQuantizer
    weight_quantizer: WeightQuantizer | None
    weights_on: bool
    w_hat: torch.Tensor | None
    held_codes: torch.Tensor | None
    transform: Transform | None

    def own_weight(self, full: torch.Tensor) -> torch.Tensor:
        """What the layer holds in place of a weight of the full-precision model."""
        return full if self.transform is None else self.transform.weight(full)

    def quantized_weight(self) -> torch.Tensor:
        """The weight that the forward pass uses."""
        if self.w_hat is not None:
            return self.w_hat
        if self.weight_quantizer is None or not self.weights_on:
            return self.weight
        return self.weight_quantizer(self.weight)

    def operands(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias in the precision of the layer's input."""
        bias = self.bias
        return self.quantized_weight().to(dtype), None if bias is None else bias.to(dtype)

    @torch.no_grad()
    def freeze(self) -> None:
        """Quantize the weight once, for all forward passes until `thaw`.

        In half precision the weight is at its quantized value already (`_apply`): it is not kept
        twice.
        """
        self.hold("w_hat", None)
        if self.weight_quantizer is not None and self.weights_on:
            half = self.weight.dtype in HALF
            self.hold("w_hat", self.weight.detach() if half else self.weight_quantizer(self.weight))

    def codes(self) -> torch.Tensor:
        """The codes of the weight, uint8, shaped like it."""
        assert self.weight_quantizer is not None
        if self.held_codes is not None:
            return self.held_codes
        return self.weight_quantizer.codes(self.weight.detach())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move or cast the layer. A cast changes no code of the weight.

        Float32 holds any point of a code's cell. Half precision holds the cell's middle, from which
        its rounding is too small a way to the next cell; bfloat16's is not with codes of more than
        6 bits, and these are kept beside the weight.
        """
        quantizer = self.weight_quantizer
        frozen = self.w_hat is not None
        self.hold("w_hat", None)
        before = self.weight.dtype
        after = fn(self.weight.detach()[:0]).dtype
        if quantizer is not None and after != before:
            held = self.codes()
            with torch.no_grad():
                middle = quantizer.decode(held)
                check_precision(self.input_quantizer.name, middle, after)
                self.weight.data = middle
            keeps = after == torch.bfloat16 and quantizer.bits > 6
            self.hold("held_codes", held if keeps else None)
        found = super()._apply(fn, recurse)
        if frozen:
            self.freeze()
        return found

    def thaw(self) -> None:
        """Quantize the weight at each forward pass again, because it may change."""
        self.hold("w_hat", None)

    def hold(self, name: str, value: torch.Tensor | None) -> None:
        """Hold a tensor as a buffer that `.to()` takes along and no file has, or None.

        accelerate cannot offload a buffer that is None.
        """
        self._buffers.pop(name, None)
        self.__dict__.pop(name, None)
        if value is None:
            self.__dict__[name] = None
        else:
            self.register_buffer(name, value, persistent=False)


def check_precision(name: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that no row of a quantized weight is lost in another precision.

    Args:
        name: of the layer's input quantizer.
        weight: [O, ...].
        dtype: the precision.

    Raises:
        ConfigError: a row of it becomes zero or infinite there.
    """
    rows = weight.flatten(1)
    cast = rows.to(dtype)
    lost = (rows != 0).any(1) & ((cast == 0).all(1) | cast.isinf().any(1))
    if bool(lost.any()):
        largest = rows[lost].abs().max().item()
        raise ConfigError(
            f"{name.removesuffix('.input_quantizer')}: weights of {largest:.1e} are zero or "
            f"infinite in {dtype}; leave the model in float32, or try bfloat16"
        )


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) if self.transform is None else self.transform.around(x, self.run)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The layer itself, without what stands around it."""
        weight, bias = self.operands(x.dtype)
        return F.linear(self.input_quantizer(x), weight, bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.operands(x.dtype)
        return self._conv_forward(self.input_quantizer(x), weight, bias)


def add_quantizers(
    module: nn.Linear | nn.Conv2d,
    role: str,
    input_quantizer: ActQuantizer,
    weight_quantizer: WeightQuantizer | None,
    transform: Transform | None = None,
) -> None:
    """Turn a layer into its quantized class in place.

    It stays the same object, with the same parameters and name in its model.
    """
    module.__class__ = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
    module.role = role
    module.input_quantizer = input_quantizer
    module.weight_quantizer = weight_quantizer
    module.transform = transform
    module.weights_on = True
    for name in ("w_hat", "held_codes"):
        module.hold(name, None)
