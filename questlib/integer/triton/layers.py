"""The Triton engine: quantized layers on NVIDIA GPUs; on CPU tensors with TRITON_INTERPRET=1 (set before triton is imported)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from questlib.errors import EngineError
from questlib.integer.form import BYTE, INT32, Grid, IntegerForm, Part, group_in_force
from questlib.integer.triton import tiles
from questlib.integer.triton.ops import CHANNEL_BLOCK, integer_attention, integer_gemm, quantize
from questlib.quantization.step_groups import StepGroups

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def require_engine() -> None:
    """EngineError unless the kernels can run here."""
    if tiles.triton is None:
        raise EngineError(
            "engine triton: expected the package triton (it comes with CUDA builds of torch), found none"
        )
    if not tiles.INTERPRET and not torch.cuda.is_available():
        raise EngineError(
            "engine triton needs an NVIDIA GPU, found none; for tests set TRITON_INTERPRET=1 before triton is imported"
        )


def serves(form: IntegerForm) -> str | None:
    """None when TritonLayer can run this layer, otherwise the reason why not."""
    if not isinstance(form.layer, nn.Linear | nn.Conv2d):
        return f"expected a Linear or Conv2d, found {type(form.layer).__name__}"
    if isinstance(form.layer, nn.Conv2d):
        if form.layer.groups != 1:
            return f"expected one group, found a convolution with {form.layer.groups}"
        if tuple(form.layer.dilation) != (1, 1):
            return f"expected no dilation, found {tuple(form.layer.dilation)}"
    if not all(
        g.limit <= (BYTE if g.multiplier is not None else 255)
        for group in form.grids
        for g in group
    ):
        return "activations do not fit a byte"
    return None


def channel_shifts(part: Part) -> torch.Tensor | None:
    """The shift e of each input channel, int64 [C], without which each output channel's weights are 4-bit codes around a zero
    point of its own; None when there is none. Any e will do whose power of two divides the channel's weights."""
    w = part.weight.transpose(0, 1).flatten(1).short()  # [C, n]
    none = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    most = sum(((w % 2**j == 0).all(1) & w.any(1)).long() for j in (1, 2, 3))
    if part.offset is not None or w.numel() // len(part.weight) * 15 * 8 * 128 > INT32:
        return None
    for shift in (none, most):
        codes = unshifted(part, shift).flatten(1)
        if int((codes.amax(1).clamp_min(0) - codes.amin(1).clamp_max(0)).max()) <= 15:
            return shift
    return None


def unshifted(part: Part, shift: torch.Tensor) -> torch.Tensor:
    return part.weight.short() >> shift.short().reshape(1, -1, *[1] * (part.weight.ndim - 2))


def column_order(shift: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Columns sorted by falling shift, each shift's own padded to whole blocks: (int32 channel of each column or -1, ends)."""
    blocks, ends = [], []
    for e in (3, 2, 1, 0):
        own = (shift == e).nonzero()[:, 0].int()
        blocks.append(nn.functional.pad(own, (0, -len(own) % CHANNEL_BLOCK), value=-1))
        ends.prepare(0, sum(map(len, blocks)))
    return torch.cat(blocks), ends[1:]


def sent_constant(grid: Grid) -> int:
    """What is added to a so that it fits a signed byte: 0, or for static 8-bit grids z - 128 (a' = q - 128)."""
    return 0 if grid.limit <= BYTE or grid.token is not None else -int(grid.low[0]) - 128


def grid_table(grid: Grid) -> torch.Tensor:
    """The float32 [4, C or 1] that `quantize` reads: inverse, low, multiplier, constant. All exact in float32."""
    one = torch.ones_like(grid.inverse)
    multiplier = one if grid.multiplier is None else grid.multiplier
    return torch.stack(
        [v.float() for v in (grid.inverse, grid.low, multiplier, one * sent_constant(grid))]
    )


def stored_weight(
    w: torch.Tensor, order: torch.Tensor, offset: torch.Tensor | None, packed: bool
) -> torch.Tensor:
    """w integer [O, C] or [O, C, kh, kw] -> the resident weight [O, taps, C' or C'/2] (kernels.py), its columns in `order`;
    packed: codes w - offset."""
    w = w.flatten(2).transpose(1, 2) if w.ndim == 4 else w[:, None]  # [O, taps, C]
    if packed:
        w = w - offset.reshape(-1, 1, 1)
    w = torch.where(order >= 0, w[..., order.clamp_min(0)], 0)
    if packed:
        low, high = w.to(torch.uint8).chunk(2, dim=2)
        return (low | high << 4).contiguous()
    return w.to(torch.int8)


def check_input(x: torch.Tensor, name: str, found: int | str, expected: int) -> None:
    """EngineError, naming the layer, unless this engine can run on x, whose channels number `found`."""
    require_engine()
    if x.dtype not in FLOATS:
        raise EngineError(f"{name}: expected float32, float16 or bfloat16 input, found {x.dtype}")
    if not tiles.INTERPRET and not x.is_cuda:
        raise EngineError(f"{name}: engine triton needs input on an NVIDIA GPU, found {x.device}")
    if found != expected:
        raise EngineError(f"{name}: expected {expected} input channels, found {found}")


def keep_precision(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply for layers whose float32 tables must survive model.half(): they move, and keep their dtype."""
    return nn.Module._apply(
        module, lambda t: t.to(fn(t).device) if t.is_floating_point() else fn(t), recurse
    )


class TritonLayer(nn.Module):
    """One quantized Linear ([..., K]) or Conv2d ([B, C, H, W], result channels_last) in integers.

    For each part p and step group g: weight{p}, table{p} [G, 4, C or 1], scale{p} [G, O] = base * s_o, correction{p} int32
    [G, O] and offset{p} int32 [O] (both absent where they would be zero); per token clip{p} [G, 2]; for packed weights with
    shifts 2^e also order{p} int32 [C'], and ends[p]. All are plain buffers outside the state_dict: `.to(device)` moves
    them, `.half()` leaves them alone.
    """

    engine = "triton"

    def __init__(self, form: IntegerForm, steps: StepGroups, weights: str = "packed") -> None:
        super().__init__()
        reason = serves(form)
        if reason is not None:
            raise EngineError(f"{form.name}: engine triton: {reason}")
        if weights not in ("packed", "int8"):
            raise EngineError(
                f"{form.name}: weights: expected 'packed' or 'int8', found {weights!r}"
            )
        self.name, self.format, self.levels = form.name, form.format, 2**form.act_bits - 1
        self.__dict__["steps"] = steps  # shared state of the whole UNet, registered once there
        shifts = [channel_shifts(part) for part in form.parts]
        self.kind = (
            "packed" if weights == "packed" and all(s is not None for s in shifts) else "int8"
        )
        self.linear = isinstance(form.layer, nn.Linear)
        self.window, self.stride, self.pad = [1, 1], [1, 1], [0, 0]
        if not self.linear:
            self.window, self.stride, self.pad = (
                [*v] for v in (form.layer.kernel_size, form.layer.stride, form.layer.padding)
            )
        self.spans = [(p.start, p.stop) for p in form.parts]
        self.packed_bytes = form.packed_bytes
        self.channels, self.outputs = self.spans[-1][1], form.parts[0].weight.shape[0]
        self._hold("bias", form.bias)
        self._hold("flag", torch.zeros(1, dtype=torch.int32, device=form.parts[0].weight.device))
        self.ends: list[list[int]] = []
        for i, (part, shift) in enumerate(zip(form.parts, shifts, strict=True)):
            if self.kind == "int8":
                shift = torch.zeros(
                    part.stop - part.start, dtype=torch.int64, device=part.weight.device
                )
            self._hold_part(i, part, [group[i] for group in form.grids], shift)

    def _hold_part(self, i: int, part: Part, grids: list[Grid], shift: torch.Tensor) -> None:
        packed, shifted = self.kind == "packed", bool(shift.any())
        order, ends = column_order(shift)
        w = unshifted(part, shift)
        offset = w.flatten(1).amin(1).clamp_max(0).int() if packed else part.offset
        weight = stored_weight(w, order, offset, packed)
        correction = torch.stack([(-sent_constant(g) * weight_sum(weight)).int() for g in grids])
        columns = len(shift) if shifted else max(len(g.inverse) for g in grids)
        table = torch.stack([grid_table(g).expand(4, columns) for g in grids])
        if shifted:  # in the columns' order, with their weight in the sums of a in place of the constant, which is 0
            weighted = torch.cat([table[:, :3], (2.0**shift).expand(len(grids), 1, -1)], 1)
            table = torch.where(order >= 0, weighted[..., order.clamp_min(0)], 0)
        self.ends.append(ends if shifted else [])
        clips = [
            None if g.token is None else torch.cat([1.0 / g.token.clip, g.token.clip / self.levels])
            for g in grids
        ]
        self._hold(f"clip{i}", None if clips[0] is None else torch.stack(clips))
        self._hold(f"order{i}", order if shifted else None)
        self._hold(f"weight{i}", weight)
        self._hold(f"table{i}", table)
        self._hold(
            f"scale{i}", torch.stack([(g.base * part.scale.double()).float() for g in grids])
        )
        self._hold(f"correction{i}", correction if bool(correction.any()) else None)
        self._hold(f"offset{i}", offset if offset is not None and bool(offset.any()) else None)

    def _hold(self, name: str, value: torch.Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def resident_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers())

    _apply = keep_precision

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x -> [B, H, W, C] with C innermost; copied only when it is not so already. EngineError for what cannot be served."""
        found = (
            x.shape[-1] if self.linear else x.shape[1] if x.ndim == 4 else f"{x.ndim} dimensions"
        )
        check_input(x, self.name, found, self.channels)
        rows = x.reshape(1, 1, -1, x.shape[-1]) if self.linear else x.permute(0, 2, 3, 1)
        return rows if rows.stride(-1) == 1 else rows.contiguous()

    def quantized(
        self, rows: torch.Tensor, i: int, g: int, norm=(None, None), silu: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """What part i multiplies in step group g: (a', sums, scales of tokens) of rows [B, H, W, C]."""
        start, stop = self.spans[i]
        norm = [v if v is None else v[:, start:stop].float().contiguous() for v in norm]
        table, sums = getattr(self, f"table{i}")[g], getattr(self, f"offset{i}") is not None
        order, clip = getattr(self, f"order{i}"), getattr(self, f"clip{i}")
        clip = None if clip is None else clip[g]
        return quantize(
            rows[..., start:stop],
            table,
            self.flag,
            self.levels,
            self.pad,
            sums,
            order,
            *norm,
            silu,
            clip,
        )

    def multiplied(
        self, a, sums, scales, i: int, g: int, dtype: torch.dtype, bias=None, residual=None
    ) -> torch.Tensor:
        """Part i of the output, [B, H', W', O]; with dtype int32 its accumulators."""
        offset, correction = getattr(self, f"offset{i}"), getattr(self, f"correction{i}")
        return integer_gemm(
            a,
            getattr(self, f"weight{i}"),
            getattr(self, f"scale{i}")[g],
            bias,
            residual,
            None if correction is None else correction[g],
            offset,
            None if offset is None else sums,
            self.window,
            self.stride,
            self.ends[i],
            dtype,
            scales if len(scales) else None,
        )

    def _shaped(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out.reshape(*x.shape[:-1], self.outputs) if self.linear else out.permute(0, 3, 1, 2)

    def forward(
        self,
        x: torch.Tensor,
        norm: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        silu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """norm: float32 [B, C] scale and shift of a GroupNorm that precedes the layer (`group_norm_affine`); silu: a SiLU in
        between. Both run inside the quantizing kernel. residual, shaped like the output, is added by the product's epilogue."""
        rows, g, out = self.rows(x), group_in_force(self.steps, self.name), residual
        if residual is not None:
            out = (residual if self.linear else residual.permute(0, 2, 3, 1)).contiguous()
        for i in range(len(self.spans)):
            last = i == len(self.spans) - 1  # the parts before it stay in float32
            sent = self.quantized(rows, i, g, norm, silu)
            out = self.multiplied(
                *sent, i, g, x.dtype if last else torch.float32, self.bias if i == 0 else None, out
            )
        return self._shaped(out, x)

    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The true accumulators, int32, one tensor a part, in the layer's output layout."""
        rows, g = self.rows(x), group_in_force(self.steps, self.name)
        return [
            self._shaped(self.multiplied(*self.quantized(rows, i, g), i, g, torch.int32), x)
            for i in range(len(self.spans))
        ]

    def extra_repr(self) -> str:
        geometry = f"window={self.window}, stride={self.stride}, pad={self.pad}"
        return f"{self.channels}, {self.outputs}, {geometry}, {self.format}, {self.kind}"


class TritonAttention(nn.Module):
    """The two products of an attention in integers, and the softmax between them, in one kernel.

    grids [step group]: of q, k, v and the probabilities (form.act_grids); v_shift int64 [C]: v ~ base * a * 2^shift. q and k must
    have no shift.
    """

    engine = "triton"

    def __init__(
        self,
        name: str,
        grids: list[tuple[Grid, Grid, Grid, Grid]],
        v_shift: torch.Tensor,
        steps: StepGroups,
    ) -> None:
        super().__init__()
        self.name, self.width = name, len(v_shift)
        self.__dict__["steps"] = steps
        for of in grids:
            if (
                not of[3].uniform
                or int(of[3].low)
                or of[3].limit > 255
                or any(g.limit > 255 for g in of)
            ):
                raise EngineError(
                    f"{name}: engine triton: attention takes codes of up to 8 bits, probabilities from zero"
                )
        for i, x in enumerate("qkv"):
            own = [of[i] for of in grids]
            channels = max(len(g.inverse) for g in own)
            table = torch.stack([grid_table(g).expand(4, channels) for g in own])
            self.register_buffer(f"table_{x}", table, persistent=False)
        self.levels = [int(g.high[0] - g.low[0]) for g in grids[0]]
        self.bases = [
            (q.base * k.base, float(p.inverse), -sent_constant(q), -sent_constant(v))
            for q, k, v, p in grids
        ]
        scales = [(p.base * v.base) * 2.0**v_shift for _, _, v, p in grids]
        self.register_buffer("v_scale", torch.stack(scales).float(), persistent=False)
        self.register_buffer(
            "flag", torch.zeros(1, dtype=torch.int32, device=v_shift.device), persistent=False
        )

    _apply = keep_precision

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
    ) -> torch.Tensor:
        """query [B, N, C], key and value [B, M, C] -> [B, N, C] in the query's dtype; scale: of the scores (attn.scale)."""
        for x in (query, key, value):
            check_input(x, self.name, x.shape[-1], self.width)
        g = group_in_force(self.steps, self.name)
        sent = []
        for x, table, levels in zip(
            (query, key, value),
            (self.table_q, self.table_k, self.table_v),
            self.levels[:3],
            strict=True,
        ):
            rows = x.reshape(1, 1, -1, self.width)
            a, *_ = quantize(
                rows if rows.stride(-1) == 1 else rows.contiguous(),
                table[g],
                self.flag,
                levels,
                [0, 0],
                False,
            )
            sent.append(a.reshape(*x.shape[:2], -1))
        base, p_inverse, *constants = self.bases[g]
        return integer_attention(
            *sent,
            self.v_scale[g],
            heads,
            constants,
            base * scale,
            p_inverse,
            self.levels[3],
            query.dtype,
        )


def weight_sum(weight: torch.Tensor) -> torch.Tensor:
    """int64 [O]: the sum of a resident weight's values, as the kernels multiply them."""
    flat = weight.flatten(1).long()
    return flat.sum(1) if weight.dtype == torch.int8 else (flat & 15).sum(1) + (flat >> 4).sum(1)


def check_finite(model: nn.Module) -> None:
    """EngineError naming the first layer (in the model's order) whose input was NaN or infinite since the last check. While a
    CUDA graph is captured nothing can be read: the next check outside sees what the graph's replays have flagged."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    layers = [m for m in model.modules() if isinstance(m, TritonLayer | TritonAttention)]
    if layers and bool((flags := torch.cat([m.flag for m in layers])).any()):
        for layer in layers:
            layer.flag.zero_()
        raise EngineError(
            f"{layers[int(flags.cpu().argmax())].name}: its input was not finite (NaN or infinity)"
        )
