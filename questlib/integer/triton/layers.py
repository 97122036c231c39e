"""Quantized layers on NVIDIA GPUs, by Triton kernels; on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from questlib.errors import EngineError
from questlib.integer.form import BYTE, Grid, IntegerForm, WeightPart, group_in_force
from questlib.integer.interface import OPTIONS
from questlib.integer.modules import IntegerLayer
from questlib.integer.triton.flags import Flagged, Tables
from questlib.integer.triton.packing import (
    column_order,
    grid_table,
    packable,
    sent_constant,
    stored_weight,
    unshifted,
    weight_sum,
)
from questlib.integer.triton.products import integer_gemm
from questlib.integer.triton.quantizing import quantize
from questlib.integer.triton.runtime import check_input
from questlib.integer.triton.tiles import MOST_SPLIT
from questlib.quantization.step_groups import StepGroups


class Codes(NamedTuple):
    """Of outputs that are written as codes, for a product that follows."""

    table: torch.Tensor  # float32 [4, O]: `grid_table`
    levels: int  # 2^bits - 1
    transposed: bool  # whether the pixels are innermost


# What a part multiplies: a', the sums of a, the scales of tokens.
Sent = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Affine = tuple[torch.Tensor | None, torch.Tensor | None]  # float32 [B, C]: scale and shift


def serves(form: IntegerForm) -> str | None:
    """None when TritonLayer can run this layer, otherwise the reason why not."""
    layer = form.layer
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return f"expected a Linear or Conv2d, found {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            return f"expected one group, found a convolution with {layer.groups}"
        if tuple(layer.dilation) != (1, 1):
            return f"expected no dilation, found {tuple(layer.dilation)}"
    for grid in (grid for group in form.grids for grid in group):
        if grid.max_abs > (255 if grid.uniform else BYTE):
            return "activations do not fit a byte"
    return None


class TritonPart(Tables):
    """What the kernels read of one part of a layer, as buffers outside the state_dict.

    weight        int8 [O, taps, C'], or packed uint8 [O, taps, C'/2]
    table         float32 [G, 4, C or 1]: `grid_table` of each step group
    scale         float32 [G, O]: base * s_o
    correction    int32 [G, O]: what undoes the constants in a'; None where zero
    compensation  int32 [O]: what was taken from w; None where zero
    clip          float32 [G, 2] of grids a token: 1 / clip and clip / levels; otherwise None
    order         int32 [C'] of packed weights with shifts 2^e: each column's channel or -1;
                  otherwise None. Table is in its order then, and its last row holds 2^e
    ends          where the columns of each shift end; empty without order
    """

    def __init__(self, part: WeightPart, grids: list[Grid], levels: int, packed: bool) -> None:
        super().__init__()
        self.span = (part.start, part.stop)
        shift = part.shift if packed else torch.zeros_like(part.shift)
        shifted = bool(shift.any())
        order, ends = column_order(shift)
        if packed:
            codes = unshifted(part)
            compensation = codes.flatten(1).amin(1).clamp_max(0).int()
            weight = stored_weight(codes, order, compensation)
        else:
            compensation = part.compensation
            weight = stored_weight(part.weight.short(), order, None)
        total = weight_sum(weight)
        correction = torch.stack([(-sent_constant(grid) * total).int() for grid in grids])

        columns = len(shift) if shifted else max(len(grid.inverse) for grid in grids)
        table = torch.stack([grid_table(grid).expand(4, columns) for grid in grids])
        if shifted:
            # In the columns' order. The place of the constant, which is 0 here, takes the weight
            # of each column in the sums of a.
            powers = (2.0**shift).expand(len(grids), 1, -1)
            table = torch.cat([table[:, :3], powers], 1)
            table = torch.where(order >= 0, table[..., order.clamp_min(0)], 0)
        scale = torch.stack([(grid.base * part.scale.double()).float() for grid in grids])
        clip = [
            torch.cat([1.0 / grid.token.clip, grid.token.clip / levels])
            for grid in grids
            if grid.token is not None
        ]
        if compensation is not None and not bool(compensation.any()):
            compensation = None
        self.ends = ends if shifted else []
        self.hold("clip", torch.stack(clip) if clip else None)
        self.hold("order", order if shifted else None)
        self.hold("weight", weight)
        self.hold("table", table)
        self.hold("scale", scale)
        self.hold("correction", correction if bool(correction.any()) else None)
        self.hold("compensation", compensation)


class TritonLayer(Flagged, IntegerLayer):
    """A Linear ([..., K]) or Conv2d ([B, C, H, W]; result channels_last) in integers.

    Args:
        form: the layer's integer form.
        steps: the UNet's step groups.
        weights: "packed" or "int8". Layers whose weights are no 4-bit codes have int8 anyway.

    Raises:
        EngineError: the engine does not serve this layer; the message names it.
    """

    engine = "triton"
    takes_silu = True  # `forward` has it

    def __init__(self, form: IntegerForm, steps: StepGroups, weights: str = "packed") -> None:
        super().__init__(form, steps)
        reason = serves(form)
        if reason is not None:
            raise EngineError(f"{form.name}: engine triton: {reason}")
        if weights not in OPTIONS["weights"]:
            raise EngineError(
                f"{form.name}: weights: expected 'packed' or 'int8', found {weights!r}"
            )
        self.levels = 2**form.act_bits - 1
        packed = weights == "packed" and all(packable(part) for part in form.parts)
        self.kind = "packed" if packed else "int8"
        layer = form.layer
        self.linear = isinstance(layer, nn.Linear)
        self.window = [1, 1] if self.linear else list(layer.kernel_size)
        self.stride = [1, 1] if self.linear else list(layer.stride)
        self.pad = [0, 0] if self.linear else list(layer.padding)
        self.channels = form.parts[-1].stop
        self.outputs = len(form.parts[0].weight)
        self.hold("bias", form.bias)
        self.hold_flag(form.parts[0].weight.device)
        self.hold("arrived", self.flag.new_zeros(MOST_SPLIT))
        self.parts = nn.ModuleList(
            TritonPart(part, [group[i] for group in form.grids], self.levels, packed)
            for i, part in enumerate(form.parts)
        )

    @property
    def resident_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def rows(self, x: torch.Tensor, gated: bool = False) -> torch.Tensor:
        """x -> [B, H, W, C], C innermost, copied only when it is not so already.

        With gates C is twice the number of channels.

        Raises:
            EngineError: the engine cannot run on x.
        """
        found: int | str
        if self.linear:
            found = x.shape[-1] // 2 if gated else x.shape[-1]
        else:
            found = x.shape[1] if x.ndim == 4 else f"{x.ndim} dimensions"
        check_input(x, self.name, found, self.channels)
        if not self.linear:
            rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        elif x.ndim == 3:
            rows = x[:, None]  # [B, N, C] -> [B, 1, N, C]
        else:
            rows = x.reshape(1, 1, -1, x.shape[-1])
        return rows if rows.stride(-1) == 1 else rows.contiguous()

    def quantized(
        self,
        rows: torch.Tensor,
        i: int,
        g: int,
        norm: Affine = (None, None),
        silu: bool = False,
        gated: bool = False,
    ) -> Sent:
        """What part i multiplies in step group g.

        Args:
            rows: [B, H, W, C], or 2 C with gates.
            i: the part.
            g: the step group.
            norm: as in `forward`.
            silu: as in `forward`.
            gated: as in `forward`.
        """
        part = self.parts[i]
        start, stop = part.span
        own = rows if gated else rows[..., start:stop]
        scale, shift = (v if v is None else v[:, start:stop].float().contiguous() for v in norm)
        return quantize(
            own,
            part.table[g],
            self.flag,
            self.levels,
            self.pad,
            part.compensation is not None,
            part.order,
            scale,
            shift,
            silu,
            None if part.clip is None else part.clip[g],
            gated,
        )

    def multiplied(
        self,
        a: torch.Tensor,
        sums: torch.Tensor,
        scales: torch.Tensor,
        i: int,
        g: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        codes: Codes | None = None,
    ) -> torch.Tensor:
        """Part i of the output, [B, H', W', O]; with dtype int32 its accumulators."""
        part = self.parts[i]
        return integer_gemm(
            a,
            part.weight,
            part.scale[g],
            bias,
            residual,
            None if part.correction is None else part.correction[g],
            part.compensation,
            None if part.compensation is None else sums,
            self.window,
            self.stride,
            part.ends,
            dtype,
            self.arrived,
            scales if len(scales) else None,
            shift,
            *(codes or ()),
        )

    def forward(
        self,
        x: torch.Tensor,
        norm: Affine = (None, None),
        silu: bool = False,
        residual: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        gated: bool = False,
        codes: Codes | None = None,
        sent: Sent | None = None,
    ) -> torch.Tensor:
        """Run the layer, and optionally what stands before and after it.

        Args:
            x: [..., K] or [B, C, H, W].
            norm: scale and shift of a GroupNorm before the layer (`group_norm_affine`), applied
                inside the quantizing kernel.
            silu: whether a SiLU stands between that norm and the layer; it runs there as well.
            residual: like the output; added in the product's epilogue.
            shift: [B, O], added to each picture's outputs there.
            gated: whether x has 2 K channels, values and gates of a GEGLU before the layer, which
                runs inside the quantizing kernel. For layers of one part.
            codes: of a Linear's output, which is int8 [B, N, O'] or [B, O, N'] then.
            sent: what the layer multiplies, where x is quantized already (`quantized_together`).
        """
        rows = self.rows(x, gated)
        g = group_in_force(self.steps, self.name)
        out = residual
        if residual is not None:
            out = (residual if self.linear else residual.permute(0, 2, 3, 1)).contiguous()
        last = len(self.parts) - 1
        for i in range(len(self.parts)):
            operands = self.quantized(rows, i, g, norm, silu, gated) if sent is None else sent
            dtype = torch.float32 if i < last else x.dtype if codes is None else torch.int8
            out = self.multiplied(
                *operands,
                i,
                g,
                dtype,
                bias=self.bias if i == 0 else None,
                residual=out,
                shift=shift if i == 0 else None,
                codes=codes if i == last else None,
            )
        assert out is not None  # a layer has one part at least
        if codes is not None:
            return out if codes.transposed else out[:, 0]
        return self._shaped(out, x)

    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The accumulators, int32, one tensor a part, in the layer's output layout."""
        rows = self.rows(x)
        g = group_in_force(self.steps, self.name)
        found = []
        for i in range(len(self.parts)):
            sent = self.quantized(rows, i, g)
            found.append(self._shaped(self.multiplied(*sent, i, g, torch.int32), x))
        return found

    def _shaped(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out.reshape(*x.shape[:-1], self.outputs) if self.linear else out.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        geometry = f"window={self.window}, stride={self.stride}, pad={self.pad}"
        return f"{self.channels}, {self.outputs}, {geometry}, {self.format}, {self.kind}"
