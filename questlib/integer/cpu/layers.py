"""Quantized layers on the CPU: the activation is sent as bytes (`quantizing`), multiplied by
oneDNN's kernels, which undo its zero point in int32 (`products`), and rescaled.

Weights whose products could saturate on this machine are split into two nibbles, at twice the work.
"""

from __future__ import annotations

import torch
from torch import nn

from questlib.integer.cpu.products import (
    MIDDLE,
    Geometry,
    Packed,
    along_outputs,
    compensate,
    input_sums,
    multiply,
    nibbles,
    prepack,
    saturates,
)
from questlib.integer.cpu.quantizing import Prepared, Sender, Sent, engine_name, uses_kernels
from questlib.integer.form import Grid, IntegerForm, WeightPart, group_in_force
from questlib.integer.modules import IntegerLayer
from questlib.kernels.rows import Target
from questlib.quantization.step_groups import StepGroups

INT16 = 2**15 - 1


class PartWeights:
    """The weights of a part, laid out at the first call, when the activation's shape is known.

    Attributes:
        part: the part, whose own weights are dropped when they have been laid out.
        index: its number among the layer's activations.
    """

    def __init__(
        self, part: WeightPart, index: int, geometry: Geometry | None, exact: bool
    ) -> None:
        self.part = part
        self.index = index
        self.geometry = geometry
        self.exact = exact
        self.packed: Packed | None = None

    def of(self, codes: torch.Tensor) -> Packed:
        """The weights as the product with `codes` takes them."""
        if self.packed is None:
            k = codes.shape[-1]
            shape = (codes.numel() // k, k) if self.geometry is None else codes.shape
            self.packed = prepack(self.part, self.geometry, shape, self.exact)
            self.part = self.part._replace(weight=self.part.weight.new_empty(0))
        return self.packed


class CpuLayer(IntegerLayer):
    """A Linear or Conv2d on the CPU; a convolution's output is channels_last.

    Args:
        form: the layer's integer form.
        steps: the UNet's step groups.
        exact: whether for the reference engine.
        split: whether weights are split into nibbles where products could saturate; None: where
            this machine needs it.
        kernels: whether the compiled kernels quantize; None: where there are any.
    """

    def __init__(
        self,
        form: IntegerForm,
        steps: StepGroups,
        exact: bool = False,
        split: bool | None = None,
        kernels: bool | None = None,
    ) -> None:
        super().__init__(form, steps)
        self.bias = form.bias
        self.grids = form.grids
        self.token = form.token
        self.geometry: Geometry | None = None
        self.dim = -1
        self.shape: tuple[int, ...] = (-1,)  # of the bias, to broadcast over the output
        layer = form.layer
        if isinstance(layer, nn.Conv2d):
            self.geometry = Geometry(
                list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
            )
            self.dim = 1
            self.shape = (-1, 1, 1)
        self.compiled = compiled = uses_kernels(exact, kernels)
        self.senders = [
            [Sender(grid, self.dim, self.name, compiled) for grid in group] for group in self.grids
        ]
        parts: list[tuple[WeightPart, int]] = []
        for i, part in enumerate(form.parts):
            risk = 2 * _largest_byte(form, i) * int(part.weight.int().abs().max()) > INT16
            if risk and not exact and (saturates() if split is None else split):
                parts += [(nibble, i) for nibble in nibbles(part)]
            else:
                parts.append((part, i))
        self.parts = [PartWeights(part, i, self.geometry, exact) for part, i in parts]
        self.bounds = [(part.start, part.stop) for part in form.parts]
        self.engine = engine_name(exact, compiled, split=len(parts) > len(form.parts))
        self._resident_bytes = sum(p.weight.numel() for p, _ in parts)

    @property
    def resident_bytes(self) -> int:
        return self._resident_bytes

    @torch.compiler.disable  # its kernels are compiled already
    def forward(self, x: torch.Tensor | Prepared) -> torch.Tensor:
        """x [..., K] or [B, C, H, W], or what a fused norm has made of it."""
        sent = x.of[self.name] if isinstance(x, Prepared) else self.send(x)
        return self.multiply(sent, x.dtype)

    def send(self, x: torch.Tensor) -> list[Sent]:
        """The bytes of each part of an activation."""
        whole = len(self.grids[0]) == 1
        return [
            sender(x if whole else x.narrow(self.dim, start, stop - start))
            for sender, (start, stop) in zip(self.own_senders(), self.bounds, strict=True)
        ]

    def targets(self) -> list[Target]:
        """Where a fused kernel sends each part of the layer's input."""
        return [
            sender.target(*bounds)
            for sender, bounds in zip(self.own_senders(), self.bounds, strict=True)
        ]

    def own_senders(self) -> list[Sender]:
        """What quantizes each part in the step group of the present call."""
        return self.senders[group_in_force(self.steps, self.name)]

    def multiply(self, sent: list[Sent], dtype: torch.dtype) -> torch.Tensor:
        """The layer's output, of `dtype`, from the bytes of each part of its input."""
        g = group_in_force(self.steps, self.name)
        # The kernels write bfloat16 themselves where nothing is added to their output.
        native = dtype in (torch.float32, torch.bfloat16)
        inner = dtype if native and len(self.parts) == 1 and not self.token else torch.float32
        out: torch.Tensor | None = None
        for part in self.parts:
            codes, scale = sent[part.index]
            zero = self.senders[g][part.index].offset
            base = self.grids[g][part.index].base
            bias = self.bias if out is None else None
            fused = None if self.token else bias
            packed = part.of(codes)
            y = multiply(codes, zero, base, packed, self.geometry, fused, inner)
            y = compensate(y, codes, zero, base, packed, self.geometry, self.compiled)
            if scale is not None:
                y = y * scale if bias is None else torch.addcmul(bias.reshape(self.shape), y, scale)
            out = y if out is None else out.add_(y)
        assert out is not None
        return out.to(dtype)

    @torch.no_grad()
    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """int64 [..., O] or [B, O, H', W'] of each part, as the kernels made them.

        The kernels hand them over in float32: exact below 2^24.
        """
        senders = self.own_senders()
        sent = self.send(x)
        found: dict[int, torch.Tensor] = {}
        for part in self.parts:
            i = part.index
            codes = sent[i].bytes
            packed = part.of(codes)
            zero = senders[i].offset
            plain = packed._replace(scale=torch.ones_like(packed.scale), scales={})
            y = multiply(codes, zero, 1.0, plain, self.geometry, None, torch.float32).long()
            if (compensation := part.part.compensation) is not None:
                sums = input_sums(codes, zero, packed, self.geometry, self.compiled).long()
                y += along_outputs(sums, compensation.long(), self.geometry)
            y = y.movedim(self.dim, -1)
            # the high nibbles come first
            found[i] = y if i not in found else found[i] * 16 + y
        return [y.movedim(-1, self.dim) for y in found.values()]


def _largest_byte(form: IntegerForm, part: int) -> int:
    """The largest byte that a part's activation is sent as."""

    def largest(grid: Grid) -> int:
        code = grid.uniform and not form.token
        return 2**form.act_bits - 1 if code else MIDDLE + grid.max_abs

    return max(largest(group[part]) for group in form.grids)
