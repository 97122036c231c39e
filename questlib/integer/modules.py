"""What the layers of all engines have in common."""

from __future__ import annotations

import torch
from torch import nn

from questlib.integer.attention_form import attention_form
from questlib.integer.form import IntegerForm
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.precision import FixedPrecision
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.transforms import Transform

SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups"),
)


class IntegerLayer(FixedPrecision):
    """A Linear or Conv2d that runs in integers, in the place of the quantized layer.

    Input and output are those of the layer it replaces, in the input's dtype. Engines implement
    `forward`, `accumulators` and `resident_bytes`. Of all that is executed, the state_dict holds
    only a digest (`IntegerForm.digest`): the weights' layout is the engine's own.
    """

    engine: str  # what really runs the layer, for reports

    def __init__(self, form: IntegerForm, steps: StepGroups) -> None:
        super().__init__()
        # What pipelines and diffusers' blocks ask a layer for.
        for key in SIZES:
            if hasattr(form.layer, key):
                setattr(self, key, getattr(form.layer, key))
        weight = form.layer.weight
        self._weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self.name = form.name
        self.format = form.format
        self.packed_bytes = form.packed_bytes
        self.__dict__["steps"] = steps  # shared by the whole UNet, and registered once there
        self.register_buffer("digest", form.digest())

    @property
    def weight(self) -> torch.Tensor:
        """The weight's shape and precision, on the device "meta": its values are the engine's."""
        return self._weight

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights in memory."""
        raise NotImplementedError

    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The integer sums of each part, in the layout of the output."""
        raise NotImplementedError


class TransformedLayer(nn.Module):
    """An engine's layer, and what stands before and beside it, in floating point.

    It is no `IntegerLayer`, so that no fused block takes it for one and leaves the rest out.
    """

    def __init__(self, layer: IntegerLayer, transform: Transform) -> None:
        super().__init__()
        self.layer = layer
        self.transform = transform
        self.in_features = layer.in_features
        self.out_features = layer.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The inner layer's, see there."""
        return self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform.around(x, self.layer)


class IntegerAttention(QuantAttnProcessor):
    """An attention whose two products run in integers. Engines implement `attend`.

    Raises:
        EngineError: the attention has no integer form.
    """

    engine: str

    def __init__(self, processor: QuantAttnProcessor, name: str) -> None:
        operands = (processor.q, processor.k, processor.v, processor.probs)
        super().__init__(*operands, rotation=processor.rotation)
        form = attention_form(processor, name)
        self.name = name
        self.format = form.format
        self.grids = form.grids
        self.v_shift = form.v_shift
        self.__dict__["steps"] = processor.q.steps
