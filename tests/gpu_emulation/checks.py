"""One layer, attention or normalization through the engine, compared with the int64 oracle."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from ptx import PtxError
from torch import nn

from questlib.integer.oracle import attention_scores, carry
from questlib.integer.synthetic import random_layer
from questlib.integer.triton.tiles import Config
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.step_groups import StepGroups

Parts = SimpleNamespace
Make = Callable[[], nn.Module]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class LayerJob(NamedTuple):
    """A layer in one format under one tile."""

    make: Make
    size: tuple[int, ...]
    w_bits: int
    a_bits: int
    kind: str
    tile: Config
    extra: dict[str, Any] = {}
    residual: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def name(self) -> str:
        layer = self.make()
        tile = "x".join(map(str, self.tile[:3])) + f" w{self.tile.warps} split {self.tile.split}"
        what = f"{type(layer).__name__} {tuple(layer.weight.shape)} W{self.w_bits}A{self.a_bits}"
        return f"{what} {self.kind} {self.extra or ''} {tile}"

    def run(self, parts: Parts) -> list[str]:
        """What is wrong with the results."""
        torch.manual_seed(len(self.size) + self.size[-1])
        layer, mine = self.subject(parts)
        x = (torch.randn(self.size) * 2).to(self.dtype)
        if x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        expected, sums = parts.layer_forward(layer, x.float())
        parts.use(self.tile)
        wrong = []
        for i, (found, sum_) in enumerate(zip(mine.accumulators(x), sums, strict=True)):
            different = int((found.long() != sum_).sum())
            if different:
                wrong.append(f"{different} of {sum_.numel()} accumulators of part {i} are wrong")
        residual = torch.randn(expected.shape).to(self.dtype) if self.residual else None
        if residual is not None:
            expected = expected + residual.float()
        error = relative(mine(x, residual=residual), expected)
        if not error <= TOLERANCE[self.dtype]:
            wrong.append(f"output {self.dtype} is off by {error:.1e}")
        if int(mine.flag):
            wrong.append("finite input was flagged")
        x[(-1,) * x.ndim] = float("nan")
        parts.driver.emulated = "quantize"
        mine(x, residual=residual)
        parts.driver.emulated = None
        if not int(mine.flag):
            wrong.append("NaN was not flagged")
        return wrong

    def subject(self, parts: Parts) -> tuple[Any, Any]:
        """(the quantized layer, the engine's layer)

        How many columns a layer with shifts has depends on its random shifts; they are drawn anew
        until the tile serves them.
        """
        extra = {k: v for k, v in self.extra.items() if k != "shift" or self.a_bits <= 4}
        for seed in range(self.tile.bm + self.size[-1], 10_000):
            layer, steps = random_layer(
                self.make(), self.w_bits, self.a_bits, carrier=self.a_bits <= 4, seed=seed, **extra
            )
            mine = parts.TritonLayer(parts.integer_form(layer, "layer"), steps, self.kind)
            if all(part.weight.shape[2] % self.tile.bk == 0 for part in mine.parts):
                steps.select_group(seed % 2)
                return layer, mine
            if "shift" not in extra:
                break
        raise ValueError(f"{self.name}: the tile does not serve this layer")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


class NormJob(NamedTuple):
    """A GroupNorm and a SiLU inside the quantization of a convolution."""

    channels: int
    channels_last: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"GroupNorm and SiLU into a convolution of {self.channels} {layout} {self.dtype}"

    def run(self, parts: Parts) -> list[str]:
        """What is wrong with the results."""
        torch.manual_seed(self.channels)
        norm = nn.GroupNorm(2, self.channels).requires_grad_(False)
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias)
        x = (torch.randn(2, self.channels, 7, 6) * 3 + 1).to(self.dtype)
        x = x.to(memory_format=torch.channels_last) if self.channels_last else x
        own = norm.to(self.dtype)
        scale, shift = parts.group_norm_affine(x, own.weight, own.bias, 2, norm.eps)
        norm = norm.float()
        wrong = []
        normed = x.float() * scale[..., None, None] + shift[..., None, None]
        error = relative(normed, norm(x.float()))
        if not error <= 1e-5:
            wrong.append(f"GroupNorm is off by {error:.1e}")
        conv = nn.Conv2d(self.channels, 20, 3, padding=1)
        layer, steps = random_layer(conv, 4, 4, carrier=True, shift=True, seed=1)
        steps.select_group(0)
        mine = parts.TritonLayer(parts.integer_form(layer, "layer"), steps)
        residual = torch.randn(2, 20, 7, 6).to(self.dtype)
        parts.use(Config(32, 64, 64, 4, 5))
        found = mine(x, norm=(scale, shift), silu=True, residual=residual).float()
        expected = layer(nn.functional.silu(normed)) + residual.float()
        return wrong + flipped(found, expected)


def flipped(found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """What is wrong, but for codes on an edge of rounding: exp is not the CPU's to the last bit."""
    error = (found - expected).abs() / expected.abs().max()
    if (error > 2e-3).float().mean() > 0.02 or error.max() > 0.05:
        return [f"the fused layer is off by {error.max():.1e}"]
    return []


class GatedJob(NamedTuple):
    """A GEGLU inside the quantization of a linear, and a shift of each picture behind it."""

    features: int
    tile: Config
    dtype: torch.dtype

    @property
    def name(self) -> str:
        split = f"split {self.tile.split}"
        return f"GEGLU of {self.features} into a linear with a shift, {split} {self.dtype}"

    def run(self, parts: Parts) -> list[str]:
        """What is wrong with the results."""
        torch.manual_seed(self.features)
        layer, steps = random_layer(nn.Linear(self.features, 40), 4, 4, carrier=True, seed=2)
        steps.select_group(0)
        mine = parts.TritonLayer(parts.integer_form(layer, "layer"), steps)
        x = (torch.randn(2, 40, 2 * self.features) * 2).to(self.dtype)
        shift = torch.randn(2, 40).to(self.dtype)
        values, gates = x.float().chunk(2, dim=-1)
        parts.use(self.tile)
        found = mine(x, gated=True, shift=shift).float()
        expected = layer(values * nn.functional.gelu(gates)) + shift.float()[:, None]
        return flipped(found, expected)


class CodesJob(NamedTuple):
    """A linear whose outputs are written as codes, in rows or transposed."""

    outputs: int
    tile: Config
    transposed: bool
    pixels: int = 37

    @property
    def name(self) -> str:
        how = "transposed" if self.transposed else "in rows"
        return f"codes of {self.outputs} outputs {how} split {self.tile.split}"

    def run(self, parts: Parts) -> list[str]:
        """What is wrong with the codes: they are those of the layer's own outputs."""
        torch.manual_seed(self.outputs)
        layer, steps = random_layer(nn.Linear(200, self.outputs), 4, 4, carrier=True, seed=3)
        steps.select_group(1)
        mine = parts.TritonLayer(parts.integer_form(layer, "layer"), steps)
        x = torch.randn(2, self.pixels, 200)
        parts.use(self.tile)
        out = mine(x)
        multiplier = torch.randint(1, 9, (self.outputs,)).float()
        inverse = 15 / multiplier / out.abs().max()
        low = torch.full((self.outputs,), -7.0)
        table = torch.stack([inverse, low, multiplier, torch.zeros(self.outputs)])
        expected = ((out * inverse).clamp(-7.0, 8.0).round() * multiplier).to(torch.int8)
        found = mine(x, codes=parts.Codes(table, 15, self.transposed))
        if self.transposed:
            found = found[..., : self.pixels].transpose(1, 2)
        different = int((found[..., : self.outputs] != expected).sum())
        return [f"{different} of {expected.numel()} codes are wrong"] if different else []


class TogetherJob(NamedTuple):
    """Linears that take the same rows, quantized on a grid for each in one pass."""

    channels: int
    results: int
    bits: int
    shift: bool
    layer_norm: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        norm = "LayerNorm" if self.layer_norm else "GroupNorm"
        return f"{norm} of {self.channels} into {self.results} linears, A{self.bits} {self.dtype}"

    def run(self, parts: Parts) -> list[str]:
        """What is wrong with their outputs."""
        torch.manual_seed(self.channels)
        x = (torch.randn(2, 19, self.channels) * 2 + 1).to(self.dtype)
        weight, bias = torch.rand(2, self.channels) + 0.5, torch.randn(2, self.channels)
        if self.layer_norm:
            norm = nn.LayerNorm(self.channels).requires_grad_(False)
            norm.weight.copy_(weight[0])
            norm.bias.copy_(bias[0])
            norm = norm.to(self.dtype)
            normed = nn.functional.layer_norm(
                x.float(), (self.channels,), norm.weight.float(), norm.bias.float(), norm.eps
            )
        else:
            norm = (weight, bias)
            normed = x.float() * weight[:, None] + bias[:, None]
        layers, mine = [], []
        for seed in range(self.results):
            layer, steps = random_layer(
                nn.Linear(self.channels, 32),
                4,
                self.bits,
                carrier=self.bits <= 4,
                shift=self.shift,
                seed=seed,
            )
            steps.select_group(0)
            layers.append(layer)
            mine.append(parts.TritonLayer(parts.integer_form(layer, "layer"), steps))
        assert parts.can_share(mine)
        parts.use(Config(64, 64, 32, 4, 5))
        wrong = []
        for layer, own, sent in zip(
            layers, mine, parts.quantized_together(mine, x, norm), strict=True
        ):
            wrong += flipped(own(x, sent=sent).float(), layer(normed))
        if int(mine[0].flag):
            wrong.append("finite input was flagged")
        x[1, 18, self.channels - 1] = float("inf")
        parts.quantized_together(mine, x, norm)
        if not int(mine[0].flag):
            wrong.append("infinity was not flagged")
        return wrong


class AttentionJob(NamedTuple):
    """Attention of one head width."""

    bits: int
    p_bits: int
    dim: int
    queries: int
    keys: int
    heads: int = 2

    @property
    def name(self) -> str:
        return (
            f"attention A{self.bits} P{self.p_bits} {self.heads} heads of {self.dim} "
            f"{self.queries} x {self.keys}"
        )

    def run(self, parts: Parts) -> list[str]:
        """What is wrong with the results.

        Scores and products are the oracle's integers; the softmax is computed in float64. A row
        with a probability close to an edge of rounding can have another code there, and is left
        out.
        """
        torch.manual_seed(self.dim)
        acts, steps = self.grids()
        form = parts.attention_form(QuantAttnProcessor(*acts), "attention")
        mine = parts.TritonAttention(form.name, form.grids, form.v_shift, steps)
        width = self.heads * self.dim
        wrong = []
        for group in range(2):
            steps.select_group(group)
            query, key, value = (
                torch.randn(2, n, width) for n in (self.queries, self.keys, self.keys)
            )
            q, k, v = (carry(x, a) for x, a in zip((query, key, value), acts, strict=False))
            scores = attention_scores(q, k, self.heads).double() * self.dim**-0.5
            step = acts[3].scale[group].double()
            share = scores.softmax(-1) / step
            codes = share.round().clamp_max(2**self.p_bits - 1)
            near = ((share - share.floor() - 0.5).abs() < 2e-3) & (share < 2**self.p_bits)
            values = (v.values << v.shift).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            sums = (codes.long() @ values).double()  # [B, heads, N, d]
            expected = (sums * step * v.base.double()).float()
            found = mine.attend(query, key, value, self.heads, self.dim**-0.5)
            found = found.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            clear = ~near.any(-1)
            if clear.float().mean() < 0.3:
                wrong.append("too few rows can be compared")
            error = (found - expected).abs() / expected.abs().max()
            if not error[clear].max() <= 1e-6:
                wrong.append(f"group {group}: off by {error[clear].max():.1e} in clear rows")
            if not error.max() <= 0.05:
                wrong.append(f"group {group}: off by {error.max():.1e}")
        return wrong

    def grids(self) -> tuple[list[ActQuantizer], StepGroups]:
        """Random grids of q, k, v and the probabilities; up to 4 bits v has shifts."""
        steps = StepGroups(torch.arange(4), torch.tensor([0, 0, 1, 1]))
        width = self.heads * self.dim
        kind = "carrier" if self.bits <= 4 else "tensor"
        acts = [ActQuantizer(x, self.bits, steps, width, -1, kind, shifts=x == "v") for x in "qkv"]
        acts.append(ActQuantizer("probs", self.p_bits, steps, 1, -1, unsigned=True))
        e = torch.where(torch.arange(width) < 16, 0, 1)
        for group in range(2):
            for act in acts[:3]:
                ratio = shift = None
                if act.carrier:
                    ratio = torch.randint(1, 9, (width,)).float()
                if act.carrier and act is acts[2]:
                    ratio = torch.where(e == 0, ratio, ratio.clamp_min(5) * 2)
                    shift = e
                zero = torch.full((width,), float(2 ** (self.bits - 1) + group - 1))
                scale = torch.full((1,), (0.15 if self.bits <= 4 else 4.0) / 2**self.bits)
                act.set_group(group, scale, zero, ratio, shift)
            probs = torch.full((1,), 0.15 / (2**self.p_bits - 1))
            acts[3].set_group(group, probs, torch.zeros(1))
        for act in acts:
            act.calibrated.fill_(True)
        return acts, steps


class BrokenJob(NamedTuple):
    """A job whose code is made wrong: the emulation must notice."""

    job: LayerJob
    pattern: str
    replacement: str

    @property
    def name(self) -> str:
        return f"{self.pattern} broken: {self.job.name}"

    def run(self, parts: Parts) -> list[str]:
        """What is wrong: that nothing was found to be."""
        parts.driver.alter = lambda ptx: re.sub(self.pattern, self.replacement, ptx)
        try:
            found = self.job.run(parts)
        except PtxError as error:
            found = [str(error)]
        finally:
            parts.driver.alter = str
            parts.driver.emulated = None
        return [] if found else ["broken code was not noticed"]


Job = LayerJob | NormJob | GatedJob | CodesJob | TogetherJob | AttentionJob | BrokenJob
