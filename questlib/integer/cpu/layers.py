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
    multiply,
    nibbles,
    prepack,
    saturates,
)
from questlib.integer.cpu.quantizing import Sender, Sent, engine_name, uses_kernels
from questlib.integer.form import Grid, IntegerForm, WeightPart, group_in_force
from questlib.integer.modules import IntegerLayer
from questlib.quantization.step_groups import StepGroups

INT16 = 2**15 - 1


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
        compiled = uses_kernels(exact, kernels)
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
        self.parts = [
            (p.start, p.stop, i, prepack(p, self.geometry, exact=exact)) for p, i in parts
        ]
        self.engine = engine_name(exact, compiled, split=len(parts) > len(form.parts))
        self._resident_bytes = sum(p.weight.numel() for p, _ in parts)

    @property
    def resident_bytes(self) -> int:
        return self._resident_bytes

    @torch.compiler.disable  # its kernels are compiled already
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g = group_in_force(self.steps, self.name)
        grids = self.grids[g]
        # The kernels write bfloat16 themselves where nothing is added to their output.
        native = x.dtype in (torch.float32, torch.bfloat16)
        dtype = x.dtype if native and len(self.parts) == 1 and not self.token else torch.float32
        out: torch.Tensor | None = None
        sent: dict[int, Sent] = {}
        for start, stop, i, packed in self.parts:
            if i not in sent:
                sent[i] = self.senders[g][i](self._own(x, start, stop))
            codes, scale = sent[i]
            zero = self.senders[g][i].offset
            bias = self.bias if out is None else None
            fused = None if self.token else bias
            y = multiply(codes, zero, grids[i].base, packed, self.geometry, fused, dtype)
            if scale is not None:
                y = y * scale if bias is None else torch.addcmul(bias.reshape(self.shape), y, scale)
            out = y if out is None else out.add_(y)
        assert out is not None
        return out.to(x.dtype)

    @torch.no_grad()
    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """int64 [..., O] or [B, O, H', W'] of each part, as the kernels made them.

        The kernels hand them over in float32: exact below 2^24.
        """
        senders = self.senders[group_in_force(self.steps, self.name)]
        found: dict[int, torch.Tensor] = {}
        for start, stop, i, packed in self.parts:
            codes, _ = senders[i](self._own(x, start, stop))
            plain = packed._replace(scale=torch.ones_like(packed.scale), compensation=None)
            y = multiply(codes, senders[i].offset, 1.0, plain, self.geometry, None, torch.float32)
            y = y.movedim(self.dim, -1).long()
            if packed.compensation is not None:
                compensation = packed.compensation.flatten() / packed.scale[:-1]
                y = y[..., :-1] + compensation.round().long() * y[..., -1:]
            # the high nibbles come first
            found[i] = y if i not in found else found[i] * 16 + y
        return [y.movedim(-1, self.dim) for y in found.values()]

    def _own(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The channels of a part."""
        whole = len(self.grids[0]) == 1
        return x if whole else x.narrow(self.dim, start, stop - start)


def _largest_byte(form: IntegerForm, part: int) -> int:
    """The largest byte that a part's activation is sent as."""

    def largest(grid: Grid) -> int:
        code = grid.uniform and not form.token
        return 2**form.act_bits - 1 if code else MIDDLE + grid.max_abs

    return max(largest(group[part]) for group in form.grids)
