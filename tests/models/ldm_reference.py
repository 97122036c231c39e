"""The networks of latent diffusion written out plainly: the oracle of converted checkpoints.

They are independent of the converter: names and equations follow CompVis's architecture, not the
converter's tables.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


def named(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


class ResBlock(nn.Module):
    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb: int,
        scale_shift: bool = False,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb, 2 * c_out if scale_shift else c_out)
        )
        self.out_layers = nn.Sequential(
            group_norm(c_out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: None) -> torch.Tensor:
        h = self.in_layers[:2](x)
        if self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2), F.interpolate(h, scale_factor=2)
        elif self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        h, e = self.in_layers[2](h), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class Resample(nn.Module):
    def __init__(self, channels: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.add_module(
            "conv" if up else "op",
            nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1),
        )

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: None) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2)) if self.up else self.op(x)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[..., N, d], [..., M, d], [..., M, d] -> [..., N, d]"""
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, group_norm(channels)
        self.qkv, self.proj_out = (
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: None) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = (
            self.qkv(self.norm(x.flatten(2)))
            .reshape(b, self.heads, 3, c // self.heads, h * w)
            .transpose(-1, -2)
        )
        out = softmax_attention(*qkv.unbind(2)).transpose(-1, -2).reshape(b, c, h * w)
        return x + self.proj_out(out).view_as(x)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (
            nn.Linear(context, width, bias=False),
            nn.Linear(context, width, bias=False),
        )
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = (
            CrossAttention(width, width, heads),
            CrossAttention(width, context, heads),
        )
        self.ff = named(
            net=nn.Sequential(
                named(proj=nn.Linear(width, 8 * width)), nn.Dropout(0), nn.Linear(4 * width, width)
            )
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, -1)
        return x + self.ff.net[2](value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.proj_in, self.proj_out = (
            nn.Conv2d(channels, channels, 1),
            nn.Conv2d(channels, channels, 1),
        )
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context, heads)])

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Steps(nn.ModuleList):
    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb, context)
        return x


class UNet(nn.Module):
    """UNetModel, from the `params` of its YAML."""

    def __init__(self, p: dict) -> None:
        super().__init__()
        self.width = c = p["model_channels"]
        emb, context, updown = 4 * c, p.get("context_dim"), p.get("resblock_updown", False)
        ss, factors = p.get("use_scale_shift_norm", False), p["channel_mult"]

        def attention(channels: int) -> nn.Module:
            heads = p["num_heads"] if "num_heads" in p else channels // p["num_head_channels"]
            return (
                SpatialTransformer(channels, context, heads)
                if context
                else AttentionBlock(channels, heads)
            )

        def resample(channels: int, way: str) -> nn.Module:
            return (
                ResBlock(channels, channels, emb, ss, way)
                if updown
                else Resample(channels, way == "up")
            )

        self.time_embed = nn.Sequential(nn.Linear(c, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks, skips = (
            nn.ModuleList([Steps([nn.Conv2d(p["in_channels"], c, 3, padding=1)])]),
            [c],
        )
        for level, factor in enumerate(factors):
            for _ in range(p["num_res_blocks"]):
                steps = Steps([ResBlock(c, factor * self.width, emb, ss)])
                c = factor * self.width
                if 2**level in p["attention_resolutions"]:
                    steps.append(attention(c))
                self.input_blocks.append(steps)
                skips.append(c)
            if level < len(factors) - 1:
                self.input_blocks.append(Steps([resample(c, "down")]))
                skips.append(c)
        self.middle_block = Steps([ResBlock(c, c, emb, ss), attention(c), ResBlock(c, c, emb, ss)])
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed(list(enumerate(factors))):
            for i in range(p["num_res_blocks"] + 1):
                steps = Steps([ResBlock(c + skips.pop(), factor * self.width, emb, ss)])
                c = factor * self.width
                if 2**level in p["attention_resolutions"]:
                    steps.append(attention(c))
                if level and i == p["num_res_blocks"]:
                    steps.append(resample(c, "up"))
                self.output_blocks.append(steps)
        self.out = nn.Sequential(
            group_norm(c), nn.SiLU(), nn.Conv2d(c, p["out_channels"], 3, padding=1)
        )

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor | None = None
    ) -> torch.Tensor:
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb, context)
        return self.out(x)


class VaeResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in, 1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out, 1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.nin_shortcut(x) + h


class VaeAttention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = group_norm(c, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        return x + self.proj_out(softmax_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Autoencoder(nn.Module):
    """Encoder, decoder, the convolutions between, and a codebook.

    There is no codebook where the latents are Gaussian (double_z).
    """

    def __init__(self, p: dict) -> None:
        super().__init__()
        d = p["ddconfig"]
        widths, layers, z = (
            [d["ch"] * m for m in d["ch_mult"]],
            d["num_res_blocks"],
            d["z_channels"],
        )
        top, self.kl = widths[-1], d["double_z"]

        def middle() -> nn.Module:
            return named(
                block_1=VaeResBlock(top, top),
                attn_1=VaeAttention(top),
                block_2=VaeResBlock(top, top),
            )

        down, c = nn.ModuleList(), d["ch"]
        for level, width in enumerate(widths):
            blocks = nn.ModuleList(
                [VaeResBlock(c if j == 0 else width, width) for j in range(layers)]
            )
            down.append(named(block=blocks))
            c = width
            if level < len(widths) - 1:
                down[-1].add_module("downsample", named(conv=nn.Conv2d(c, c, 3, stride=2)))
        out = 2 * z if self.kl else z
        self.encoder = named(
            conv_in=nn.Conv2d(d["in_channels"], d["ch"], 3, padding=1),
            down=down,
            mid=middle(),
            norm_out=group_norm(top, 1e-6),
            conv_out=nn.Conv2d(top, out, 3, padding=1),
        )
        up, c = [], top
        for level, width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList(
                [VaeResBlock(c if j == 0 else width, width) for j in range(layers + 1)]
            )
            up.insert(0, named(block=blocks))
            c = width
            if level:
                up[0].add_module("upsample", named(conv=nn.Conv2d(c, c, 3, padding=1)))
        self.decoder = named(
            conv_in=nn.Conv2d(z, top, 3, padding=1),
            mid=middle(),
            up=nn.ModuleList(up),
            norm_out=group_norm(c, 1e-6),
            conv_out=nn.Conv2d(c, d["out_ch"], 3, padding=1),
        )
        self.quant_conv = nn.Conv2d(out, 2 * p["embed_dim"] if self.kl else p["embed_dim"], 1)
        self.post_quant_conv = nn.Conv2d(p["embed_dim"], z, 1)
        if not self.kl:
            self.quantize = named(embedding=nn.Embedding(p["n_embed"], p["embed_dim"]))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Latents before quantization, or the mean of the Gaussian."""
        e = self.encoder
        x = e.conv_in(image)
        for level in e.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = e.mid.block_2(e.mid.attn_1(e.mid.block_1(x)))
        x = self.quant_conv(e.conv_out(F.silu(e.norm_out(x))))
        return x.chunk(2, 1)[0] if self.kl else x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        if not self.kl:
            codes = self.quantize.embedding.weight
            nearest = (z.movedim(1, -1)[..., None, :] - codes).square().sum(-1).argmin(-1)
            z = codes[nearest].movedim(-1, 1)
        d = self.decoder
        x = d.conv_in(self.post_quant_conv(z))
        x = d.mid.block_2(d.mid.attn_1(d.mid.block_1(x)))
        for level in reversed(d.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2))
        return d.conv_out(F.silu(d.norm_out(x)))


def clip_state(
    width: int, layers: int, inner: int, vocabulary: int = 49408
) -> dict[str, torch.Tensor]:
    """A CLIP text transformer under the names it has in Stable Diffusion's checkpoint."""
    p = "cond_stage_model.transformer.text_model."
    shapes = {
        f"{p}embeddings.token_embedding.weight": (vocabulary, width),
        f"{p}embeddings.position_embedding.weight": (77, width),
        f"{p}final_layer_norm.weight": (width,),
        f"{p}final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        layer = f"{p}encoder.layers.{i}"
        linear = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        shapes |= {f"{layer}.{n}.weight": s for n, s in linear.items()} | {
            f"{layer}.{n}.bias": s[:1] for n, s in linear.items()
        }
        shapes |= {
            f"{layer}.layer_norm{n}.{q}": (width,) for n in (1, 2) for q in ("weight", "bias")
        }
    state = {k: 0.1 * torch.randn(s) for k, s in shapes.items()}
    return state | {
        f"{p}embeddings.position_ids": torch.arange(77)[None]
    }  # written by transformers of that time
