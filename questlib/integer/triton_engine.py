"""The Triton engine: quantized layers on NVIDIA GPUs; on CPU tensors with TRITON_INTERPRET=1 (set before triton is imported).

Torch operators, so that torch.compile and CUDA graphs keep working: `questlib::quantize` (float -> int8) and
`questlib::integer_gemm` (int8 x int8 or packed 4 bit -> float, or int32 accumulators). Layouts: kernels.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from questlib.errors import EngineError
from questlib.integer.form import BYTE, INT32, Grid, IntegerForm, Part
from questlib.timesteps import StepGroups

try:
    import triton
    import triton.language as tl

    from questlib.integer import kernels
except ImportError:  # CPU builds of torch come without triton
    triton = kernels = None

# the interpreter must be chosen before triton is first imported: its own library functions are decorated then
INTERPRET = (
    triton is not None and not isinstance(kernels.gemm, triton.JITFunction) and not isinstance(tl.zeros, triton.JITFunction)
)
CHANNEL_BLOCK = 64  # channels are padded to a multiple, so that no loop over them needs a mask
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TUNE = True  # time the candidates at the first call of a shape class; False: the first candidate that fits


def require_engine() -> None:
    """EngineError unless the kernels can run here."""
    if triton is None:
        raise EngineError("engine triton: expected the package triton (it comes with CUDA builds of torch), found none")
    if not INTERPRET and not torch.cuda.is_available():
        raise EngineError(
            "engine triton needs an NVIDIA GPU, found none; for tests set TRITON_INTERPRET=1 before triton is imported"
        )


# ---- tile configurations, chosen by timing and remembered on disk ----
class Config(NamedTuple):
    bm: int  # output pixels a tile
    bn: int  # output channels a tile
    bk: int  # bytes of w a step
    warps: int
    stages: int
    split: int = 1  # programs that share one tile's reduction


CANDIDATES = [
    Config(128, 256, 64, 8, 3), Config(256, 128, 64, 8, 3), Config(256, 128, 128, 8, 3), Config(128, 128, 128, 8, 3),
    Config(128, 128, 64, 8, 4), Config(128, 128, 64, 4, 4), Config(128, 64, 64, 4, 4), Config(64, 128, 128, 8, 3),
    Config(64, 64, 128, 4, 4), Config(64, 64, 64, 4, 4), Config(32, 64, 64, 4, 5), Config(16, 64, 128, 4, 4),
    Config(16, 64, 64, 4, 5), Config(128, 256, 32, 8, 4), Config(256, 128, 32, 8, 4), Config(128, 128, 32, 8, 5),
    Config(128, 64, 32, 4, 5), Config(64, 64, 32, 4, 5), Config(16, 64, 32, 4, 5),
]  # fmt: skip
SPLITS = (2, 4, 8)
TRIALS = 6  # the candidates of least estimated time are timed
INTERPRETED = [Config(64, 64, 64, 4, 1), Config(64, 64, 32, 4, 1)]


def fitting(m: int, o: int, span: int, taps: int, packed: bool, sms: int, bk: int = 128) -> list[Config]:
    """Candidates for m pixels and o channels, best estimates first. sms: the GPU's multiprocessors; bk: the longest step."""
    planes = 2 if packed else 1  # bytes of a for one byte of w

    def cycles(c: Config) -> float:
        """A wave of tiles: its steps, bound by arithmetic (4096 products a cycle), by the L2 cache (28 bytes) or by latency, then
        its stores; a split reduction adds to memory and needs a second kernel."""
        step = 60 + max(c.bm * c.bn * planes * c.bk / 4096, (c.bm * planes + c.bn) * c.bk / 28, 150)
        waves = -(-(-(-m // c.bm) * -(-o // c.bn) * c.split) // sms)
        store = 1500 + (c.bm * c.bn / 4 if c.split > 1 else 0)
        return waves * (taps * span / c.bk / c.split * step + store) + (3000 + m * o / 300 if c.split > 1 else 0)

    whole = [c for c in CANDIDATES if span % c.bk == 0 and c.bk <= bk]
    split = [c._replace(split=n) for c in whole for n in SPLITS if taps * span >= 4 * n * c.bk]
    return sorted(whole + split, key=cycles)[:TRIALS]


class ConfigCache:
    """Chosen configurations by shape class, kept in the user's cache folder, one file for each GPU model, triton and kernels."""

    def __init__(self) -> None:
        self.chosen: dict[str, Config] = {}
        self.path: Path | None = None

    def load(self) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
        source = hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()[:8]  # other kernels are tuned anew
        self.path = root / "questlib" / f"triton-{triton.__version__}-{source}-{gpu}.json"
        if self.path.exists():
            try:
                self.chosen = {key: Config(*values) for key, values in json.loads(self.path.read_text()).items()} | self.chosen
            except (ValueError, TypeError, AttributeError) as error:
                warnings.warn(f"{self.path}: not readable ({error}); the kernels are tuned again", stacklevel=2)

    def choose(self, key: str, candidates: Callable[[], list[Config]], run: Callable[[Config], object]) -> Config:
        if self.path is None:
            self.load()
        if key not in self.chosen:
            found = candidates()
            if len(found) == 1 or not TUNE or torch.cuda.is_current_stream_capturing():
                return found[0]
            self.chosen[key] = min(found, key=lambda c: self.seconds(c, run))
            self.save()
        return self.chosen[key]

    def seconds(self, config: Config, run: Callable[[Config], object]) -> float:
        try:
            return triton.testing.do_bench(lambda: run(config), warmup=2, rep=10, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    def save(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(self.chosen))
            draft.replace(self.path)
        except OSError as error:
            warnings.warn(f"{self.path}: not written ({error}); the next process tunes its kernels again", stacklevel=2)


CACHE = ConfigCache()


# ---- operators ----
def _on(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.library.custom_op("questlib::quantize", mutates_args={"flag"})
def quantize(
    x: torch.Tensor, table: torch.Tensor, flag: torch.Tensor, levels: int, pad: list[int], sums: bool,
    order: torch.Tensor | None = None, norm_scale: torch.Tensor | None = None, norm_shift: torch.Tensor | None = None,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [B, H, W, C] -> a' int8 [B, H + 2 pad_y, W + 2 pad_x, C'] and the sums of a, int32 (empty unless asked for).

    table float32 [4, C or 1] as grid_table makes it, or [4, C'] with order int32 [C']: the channel of each column, -1 for none;
    levels 2^bits - 1; flag int32 [1].
    norm_scale, norm_shift float32 [B, C]: x * scale + shift first, then SiLU.
    """
    a, total = quantize_outputs(x, table, flag, levels, pad, sums, order)
    (_, height, width, channels), padded = x.shape, a.shape[-1]
    if a.numel():
        rows = a.numel() // padded
        block, columns = (8, 256) if sums else (32, CHANNEL_BLOCK)  # rows with sums: one warp a row, all its channels
        block = 128 if INTERPRET else block  # interpreted programs cost by their number, not by their size
        grid = (triton.cdiv(rows, block), 1 if sums else padded // columns)
        norm, unused = norm_scale is not None, flag  # a kernel takes a pointer even where it reads none
        with _on(x):
            kernels.quantize[grid](
                x, table, unused if order is None else order, a, total if sums else unused, flag,
                norm_scale if norm else table, norm_shift if norm else table,
                float(levels), rows, height, width, *pad, *x.stride()[:3], channels, padded,
                UNIFORM=table.shape[1] == 1, ORDERED=order is not None, HAS_SUMS=sums, NORM=norm, SILU=silu,
                BR=block, BC=columns, num_warps=4,
            )  # fmt: skip
    return a, total


@quantize.register_fake
def quantize_outputs(x, table, flag, levels, pad, sums, order=None, norm_scale=None, norm_shift=None, silu=False):
    b, height, width, channels = x.shape
    shape = (b, height + 2 * pad[0], width + 2 * pad[1])
    padded = -(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK if order is None else len(order)
    a = torch.empty(*shape, padded, dtype=torch.int8, device=x.device)
    return a, torch.empty(shape if sums else (0,), dtype=torch.int32, device=x.device)


@torch.library.custom_op("questlib::group_norm_affine", mutates_args=())
def group_norm_affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, C, H, W] -> scale and shift, float32 [B, C], with which GroupNorm(x) = x * scale + shift: `norm` of TritonLayer."""
    scale, shift = group_norm_outputs(x, weight, bias, groups, eps)
    rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    if rows.stride(3) != 1 or rows.stride(1) != rows.shape[2] * rows.stride(2):
        rows = rows.contiguous()
    b, pixels, channels = len(rows), rows.shape[1] * rows.shape[2], rows.shape[3]
    if not rows.numel():
        return scale, shift
    shares = min(64, triton.cdiv(pixels, 32))
    sums = torch.empty(b, shares, 2, channels, dtype=torch.float32, device=x.device)
    with _on(x):
        kernels.moments[(shares, triton.cdiv(channels, 64), b)](
            rows, sums, pixels, channels, triton.cdiv(pixels, shares), rows.stride(0), rows.stride(2), BR=32, BC=64
        )
        kernels.group_affine[(groups, b)](
            sums, weight, bias, scale, shift, channels, shares, float(pixels * (channels // groups)), eps,
            BS=triton.next_power_of_2(shares), BC=triton.next_power_of_2(channels // groups),
        )  # fmt: skip
    return scale, shift


@group_norm_affine.register_fake
def group_norm_outputs(x, weight, bias, groups, eps):
    return tuple(torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))


@torch.library.custom_op("questlib::integer_gemm", mutates_args=())
def integer_gemm(
    a: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    correction: torch.Tensor | None, offset: torch.Tensor | None, sums: torch.Tensor | None,
    window: list[int], stride: list[int], ends: list[int], dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """a' [B, H, W, C'] (padded already), w int8 [O, taps, C'] or uint8 [O, taps, C'/2] -> [B, H', W', O] of `dtype`.

    out = float(acc) * scale_o + bias_o + residual; acc = dot + correction_o + offset_o * (window sums of `sums`).
    ends: empty, or where the columns of packed w with shifts of at least 1, 2 and 3 end. dtype int32: acc itself, and scale, bias
    and residual are ignored. All vectors [O]; residual shaped like the output.
    """
    out = gemm_output(a, w, scale, bias, residual, correction, offset, sums, window, stride, ends, dtype)
    if not out.numel():
        return out
    o, span, padded = w.shape[0], w.shape[2], a.shape[3]
    m, raw = out.numel() // o, dtype == torch.int32
    if max(a.numel(), out.numel(), w.numel()) >= 2**31:
        raise EngineError(f"engine triton: tensors of {max(a.numel(), out.numel())} elements are too large for 32-bit indices")
    point = window == [1, 1] and stride == [1, 1]

    def given(t: torch.Tensor | None) -> torch.Tensor:  # a kernel takes a pointer even where it reads none
        return scale if t is None else t

    def run(c: Config) -> torch.Tensor:
        partial = torch.zeros_like(out, dtype=torch.int32) if c.split > 1 else out
        grid = (triton.cdiv(m, c.bm) * triton.cdiv(o, c.bn), c.split)
        kernels.gemm[grid](
            a, w, partial, scale, given(bias), given(residual), given(correction), given(offset), given(sums),
            m, o, span, padded, *window, a.shape[1], a.shape[2], out.shape[1], out.shape[2], *stride, *(ends or (0, 0, 0)),
            POINT=point, PACKED=w.dtype == torch.uint8, SHIFTED=bool(ends), ASM=not INTERPRET, RAW=raw,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            HAS_CORRECTION=correction is not None, HAS_OFFSET=offset is not None,
            BM=c.bm, BN=c.bn, BK=c.bk, ATOMIC=c.split > 1, GROUP=8, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        if c.split == 1 or raw:
            return partial
        kernels.finish[(triton.cdiv(m, 16), triton.cdiv(o, 128))](
            partial, out, scale, given(bias), given(residual), m, o,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, BM=16, BN=128,
        )  # fmt: skip
        return out

    if INTERPRET:
        return run(next(c for c in INTERPRETED if span % c.bk == 0))
    with _on(a):
        sms, taps = torch.cuda.get_device_properties(a.device).multi_processor_count, window[0] * window[1]
        key = f"{w.dtype}-{bool(ends)}-{dtype}-{window}-{stride}-{o}-{span}-{1 << (m - 1).bit_length()}"
        return run(CACHE.choose(key, lambda: fitting(m, o, span, taps, w.dtype == torch.uint8, sms, 64 if ends else 128), run))


@integer_gemm.register_fake
def gemm_output(a, w, scale, bias, residual, correction, offset, sums, window, stride, ends, dtype):
    high, wide = ((n - k) // s + 1 for n, k, s in zip(a.shape[1:3], window, stride, strict=True))
    return torch.empty(a.shape[0], high, wide, w.shape[0], dtype=dtype, device=a.device)


@torch.library.custom_op("questlib::integer_attention", mutates_args=())
def integer_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_scale: torch.Tensor, heads: int, constants: list[int],
    factor: float, p_inverse: float, p_levels: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """a' int8 of q [B, N, C'], k, v [B, M, C'] -> [B, N, C] = v_scale_c * sum_m p_m v_mc, p the codes 0..p_levels (at most 255)
    round(softmax(factor * q k^T) * p_inverse). constants: a - a' of q and v. v_scale float32 [C]."""
    out = attention_output(q, k, v, v_scale, heads, constants, factor, p_inverse, p_levels, dtype)
    (batch, queries, width), keys, dim = out.shape, k.shape[1], out.shape[2] // heads
    if not out.numel():
        return out
    # the tensor core wants the index that is summed over innermost
    transposed = v.new_zeros(batch, width, -(-keys // 16) * 16)
    transposed[..., :keys] = v[..., :width].transpose(1, 2)
    q_constant, v_constant = constants
    key_sum, shift = transposed, 0  # not read
    if q_constant:
        key_sum = k[..., :width].unflatten(-1, (heads, dim)).sum(-1, dtype=torch.int32).transpose(1, 2).contiguous()
    if p_levels > BYTE:
        shift = 128
    v_sum = transposed.sum(-1, dtype=torch.int32) if shift else transposed
    bd, small = max(32, triton.next_power_of_2(dim)), INTERPRET or queries < 128
    bq, bk = (64, 64) if small or dim > 128 else (128, 64)
    with _on(q):
        kernels.attention[(triton.cdiv(queries, bq), batch * heads)](
            q, k, transposed, out, key_sum, v_sum, v_scale, queries, keys, transposed.shape[2], heads, dim, q.shape[2],
            q_constant, v_constant, factor / math.log(2), p_inverse, float(p_levels),
            HAS_Q=q_constant != 0, HAS_V=v_constant != 0, P_CONSTANT=shift, EVEN=keys % bk == 0, ASM=not INTERPRET,
            BQ=bq, BK=bk, BD=bd, num_warps=4 if bq == 64 else 8, num_stages=3,
        )  # fmt: skip
    return out


@integer_attention.register_fake
def attention_output(q, k, v, v_scale, heads, constants, factor, p_inverse, p_levels, dtype):
    return torch.empty(*q.shape[:2], len(v_scale), dtype=dtype, device=q.device)


# ---- layers ----
def serves(form: IntegerForm) -> str | None:
    """None when TritonLayer can run this layer, otherwise the reason why not."""
    if not isinstance(form.layer, nn.Linear | nn.Conv2d):
        return f"expected a Linear or Conv2d, found {type(form.layer).__name__}"
    if isinstance(form.layer, nn.Conv2d):
        if form.layer.groups != 1:
            return f"expected one group, found a convolution with {form.layer.groups}"
        if tuple(form.layer.dilation) != (1, 1):
            return f"expected no dilation, found {tuple(form.layer.dilation)}"
    if not all(g.limit <= (BYTE if g.multiplier is not None else 255) for group in form.grids for g in group):
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
        ends.insert(0, sum(map(len, blocks)))
    return torch.cat(blocks), ends[1:]


def sent_constant(grid: Grid) -> int:
    """What is added to a so that it fits a signed byte: 0, or for 8-bit grids z - 128 (a' = q - 128)."""
    return 0 if grid.limit <= BYTE else -int(grid.low[0]) - 128


def grid_table(grid: Grid) -> torch.Tensor:
    """The float32 [4, C or 1] that `quantize` reads: inverse, low, multiplier, constant. All exact in float32."""
    one = torch.ones_like(grid.inverse)
    multiplier = one if grid.multiplier is None else grid.multiplier
    return torch.stack([v.float() for v in (grid.inverse, grid.low, multiplier, one * sent_constant(grid))])


def stored_weight(w: torch.Tensor, order: torch.Tensor, offset: torch.Tensor | None, packed: bool) -> torch.Tensor:
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


def group_in_force(steps: StepGroups, name: str) -> int:
    if not isinstance(steps.current, int):
        raise EngineError(f"{name}: integer execution takes one step group a call, found timesteps of several groups")
    return steps.current


def check_input(x: torch.Tensor, name: str, found: int | str, expected: int) -> None:
    """EngineError, naming the layer, unless this engine can run on x, whose channels number `found`."""
    require_engine()
    if x.dtype not in FLOATS:
        raise EngineError(f"{name}: expected float32, float16 or bfloat16 input, found {x.dtype}")
    if not INTERPRET and not x.is_cuda:
        raise EngineError(f"{name}: engine triton needs input on an NVIDIA GPU, found {x.device}")
    if found != expected:
        raise EngineError(f"{name}: expected {expected} input channels, found {found}")


def keep_precision(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply for layers whose float32 tables must survive model.half(): they move, and keep their dtype."""
    return nn.Module._apply(module, lambda t: t.to(fn(t).device) if t.is_floating_point() else fn(t), recurse)


class TritonLayer(nn.Module):
    """One quantized Linear ([..., K]) or Conv2d ([B, C, H, W], result channels_last) in integers.

    For each part p and step group g: weight{p}, table{p} [G, 4, C or 1], scale{p} [G, O] = base * s_o, correction{p} int32
    [G, O] and offset{p} int32 [O] (both absent where they would be zero); for packed weights with shifts 2^e also order{p} int32
    [C'], and ends[p]. All are plain buffers outside the state_dict: `.to(device)` moves them, `.half()` leaves them alone.
    """

    engine = "triton"

    def __init__(self, form: IntegerForm, steps: StepGroups, weights: str = "packed") -> None:
        super().__init__()
        reason = serves(form)
        if reason is not None:
            raise EngineError(f"{form.name}: engine triton: {reason}")
        if weights not in ("packed", "int8"):
            raise EngineError(f"{form.name}: weights: expected 'packed' or 'int8', found {weights!r}")
        self.name, self.format, self.levels = form.name, form.format, 2**form.act_bits - 1
        self.__dict__["steps"] = steps  # shared state of the whole UNet, registered once there
        shifts = [channel_shifts(part) for part in form.parts]
        self.kind = "packed" if weights == "packed" and all(s is not None for s in shifts) else "int8"
        self.linear = isinstance(form.layer, nn.Linear)
        self.window, self.stride, self.pad = [1, 1], [1, 1], [0, 0]
        if not self.linear:
            self.window, self.stride, self.pad = ([*v] for v in (form.layer.kernel_size, form.layer.stride, form.layer.padding))
        self.spans = [(p.start, p.stop) for p in form.parts]
        self.packed_bytes = -(-form.layer.weight.numel() * (4 if form.weight_bits <= 4 else 8) // 8)  # in the checkpoint
        self.channels, self.outputs = self.spans[-1][1], form.parts[0].weight.shape[0]
        self._hold("bias", form.bias)
        self._hold("flag", torch.zeros(1, dtype=torch.int32, device=form.parts[0].weight.device))
        self.ends: list[list[int]] = []
        for i, (part, shift) in enumerate(zip(form.parts, shifts, strict=True)):
            if self.kind == "int8":
                shift = torch.zeros(part.stop - part.start, dtype=torch.int64, device=part.weight.device)
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
        self._hold(f"order{i}", order if shifted else None)
        self._hold(f"weight{i}", weight)
        self._hold(f"table{i}", table)
        self._hold(f"scale{i}", torch.stack([(g.base * part.scale.double()).float() for g in grids]))
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
        found = x.shape[-1] if self.linear else x.shape[1] if x.ndim == 4 else f"{x.ndim} dimensions"
        check_input(x, self.name, found, self.channels)
        rows = x.reshape(1, 1, -1, x.shape[-1]) if self.linear else x.permute(0, 2, 3, 1)
        return rows if rows.stride(-1) == 1 else rows.contiguous()

    def quantized(self, rows: torch.Tensor, i: int, g: int, norm=(None, None), silu: bool = False) -> tuple[torch.Tensor, ...]:
        """What part i multiplies in step group g: (a', sums) of rows [B, H, W, C]."""
        start, stop = self.spans[i]
        norm = [v if v is None else v[:, start:stop].float().contiguous() for v in norm]
        table, sums = getattr(self, f"table{i}")[g], getattr(self, f"offset{i}") is not None
        order = getattr(self, f"order{i}")
        return quantize(rows[..., start:stop], table, self.flag, self.levels, self.pad, sums, order, *norm, silu)

    def multiplied(self, a, sums, i: int, g: int, dtype: torch.dtype, bias=None, residual=None) -> torch.Tensor:
        """Part i of the output, [B, H', W', O]; with dtype int32 its accumulators."""
        offset, correction = getattr(self, f"offset{i}"), getattr(self, f"correction{i}")
        return integer_gemm(
            a, getattr(self, f"weight{i}"), getattr(self, f"scale{i}")[g], bias, residual,
            None if correction is None else correction[g], offset, None if offset is None else sums,
            self.window, self.stride, self.ends[i], dtype,
        )  # fmt: skip

    def _shaped(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out.reshape(*x.shape[:-1], self.outputs) if self.linear else out.permute(0, 3, 1, 2)

    def forward(
        self, x: torch.Tensor, norm: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None), silu: bool = False
    ) -> torch.Tensor:
        """norm: float32 [B, C] scale and shift of a GroupNorm that precedes the layer (`group_norm_affine`); silu: a SiLU in
        between. Both run inside the quantizing kernel."""
        rows, g, out = self.rows(x), group_in_force(self.steps, self.name), None
        for i in range(len(self.spans)):
            last = i == len(self.spans) - 1  # the parts before it stay in float32
            a, sums = self.quantized(rows, i, g, norm, silu)
            out = self.multiplied(a, sums, i, g, x.dtype if last else torch.float32, self.bias if i == 0 else None, out)
        return self._shaped(out, x)

    def accumulators(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The true accumulators, int32, one tensor a part, in the layer's output layout."""
        rows, g = self.rows(x), group_in_force(self.steps, self.name)
        return [self._shaped(self.multiplied(*self.quantized(rows, i, g), i, g, torch.int32), x) for i in range(len(self.spans))]

    def extra_repr(self) -> str:
        geometry = f"window={self.window}, stride={self.stride}, pad={self.pad}"
        return f"{self.channels}, {self.outputs}, {geometry}, {self.format}, {self.kind}"


class TritonAttention(nn.Module):
    """The two products of an attention in integers, and the softmax between them, in one kernel.

    grids [step group]: of q, k, v and the probabilities (form.act_grids); v_shift int64 [C]: v ~ base * a * 2^shift. q and k must
    have no shift.
    """

    engine = "triton"

    def __init__(self, name: str, grids: list[tuple[Grid, Grid, Grid, Grid]], v_shift: torch.Tensor, steps: StepGroups) -> None:
        super().__init__()
        self.name, self.width = name, len(v_shift)
        self.__dict__["steps"] = steps
        for of in grids:
            if not of[3].uniform or int(of[3].low) or of[3].limit > 255 or any(g.limit > 255 for g in of):
                raise EngineError(f"{name}: engine triton: attention takes codes of up to 8 bits, probabilities from zero")
        for i, x in enumerate("qkv"):
            own = [of[i] for of in grids]
            channels = max(len(g.inverse) for g in own)
            table = torch.stack([grid_table(g).expand(4, channels) for g in own])
            self.register_buffer(f"table_{x}", table, persistent=False)
        self.levels = [int(g.high[0] - g.low[0]) for g in grids[0]]
        self.bases = [(q.base * k.base, float(p.inverse), -sent_constant(q), -sent_constant(v)) for q, k, v, p in grids]
        scales = [(p.base * v.base) * 2.0**v_shift for _, _, v, p in grids]
        self.register_buffer("v_scale", torch.stack(scales).float(), persistent=False)
        self.register_buffer("flag", torch.zeros(1, dtype=torch.int32, device=v_shift.device), persistent=False)

    _apply = keep_precision

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
        """query [B, N, C], key and value [B, M, C] -> [B, N, C] in the query's dtype; scale: of the scores (attn.scale)."""
        for x in (query, key, value):
            check_input(x, self.name, x.shape[-1], self.width)
        g = group_in_force(self.steps, self.name)
        sent = []
        for x, table, levels in zip(
            (query, key, value), (self.table_q, self.table_k, self.table_v), self.levels[:3], strict=True
        ):
            rows = x.reshape(1, 1, -1, self.width)
            a, _ = quantize(rows if rows.stride(-1) == 1 else rows.contiguous(), table[g], self.flag, levels, [0, 0], False)
            sent.append(a.reshape(*x.shape[:2], -1))
        base, p_inverse, *constants = self.bases[g]
        return integer_attention(
            *sent, self.v_scale[g], heads, constants, base * scale, p_inverse, self.levels[3], query.dtype
        )  # fmt: skip


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
        raise EngineError(f"{layers[int(flags.cpu().argmax())].name}: its input was not finite (NaN or infinity)")
