"""CompVis's names: where the tensors of diffusers' UNets and autoencoders lie in a checkpoint."""

from __future__ import annotations

import re
from typing import NamedTuple

from questlib.errors import ConfigError


class CompvisTensor(NamedTuple):
    """A tensor of a checkpoint, or a third of one.

    Args:
        key: its name without the component's prefix.
        qkv: 0, 1 or 2 for q, k or v of a joint weight, whose rows are ordered [head, qkv, channel];
            None: the whole tensor.
        heads: number of heads of a joint weight.
    """

    key: str
    qkv: int | None = None
    heads: int = 1


# ResBlock and AttentionBlock of openaimodel.py. Transformer2DModel and its blocks have CompVis's
# own names.
UNET_LEAVES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
}
UNET_MODULES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

# module, layer inside it (or nothing), parameter
UNET_KEY = re.compile(
    r"((?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|time_embedding\.\w+|conv_\w+)"
    r"\.(?:(.+)\.)?(\w+)"
)

# Patterns of diffusers' names and what CompVis has instead, applied in this order.
VAE_RENAMES = [
    (r"\b(encoder|decoder)\.mid_block\.attentions\.0", r"\1.mid.attn_1"),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.down_blocks\.(\d+)", r".down.\1"),
    (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0", r".\1sample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    (r"\.to_([qkv])\b", r".\1"),
    (r"\.to_out\.0", ".proj_out"),
]


def unet_modules(levels: int, layers: int) -> dict[str, str]:
    """diffusers module -> CompVis module.

    CompVis counts the residual blocks and resamplings of all levels in one sequence.
    """
    modules = dict(UNET_MODULES)
    i = 1
    for level in range(levels):
        for j in range(layers):
            modules[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{i}.0"
            modules[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{i}.1"
            i += 1
        modules[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{i}.0"
        i += 1
    for level in range(levels):
        for j in range(layers + 1):
            i = level * (layers + 1) + j
            modules[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{i}.0"
            modules[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{i}.1"
    return modules


def unet_origins(
    targets: list[str], levels: int, layers: int, heads: dict[str, int]
) -> dict[str, CompvisTensor]:
    """diffusers key -> the checkpoint's tensor.

    Args:
        targets: diffusers' keys.
        heads: number of heads of each attention whose q, k, v are one weight in CompVis.
    """
    modules = unet_modules(levels, layers)
    # An upsampling stands after the last residual block of its level, and after the attention
    # there if the level has one.
    for level in range(levels - 1):
        attention = any(t.startswith(f"up_blocks.{level}.attentions.") for t in targets)
        block = (level + 1) * (layers + 1) - 1
        upsampler = f"up_blocks.{level}.upsamplers.0"
        modules[upsampler] = f"output_blocks.{block}.{1 + attention}"
    return {target: _unet_origin(target, modules, heads) for target in targets}


def _unet_origin(target: str, modules: dict[str, str], heads: dict[str, int]) -> CompvisTensor:
    match = UNET_KEY.fullmatch(target)
    if match is None:
        raise ConfigError(f"unet_config: CompVis's UNet has nothing like {target}")
    module, leaf, parameter = match.groups()
    if module in heads and leaf in ("to_q", "to_k", "to_v"):
        key = f"{modules[module]}.qkv.{parameter}"
        return CompvisTensor(key, "qkv".index(leaf[-1]), heads[module])
    if "downsamplers" in module and leaf == "conv":
        leaf = "op"
    else:
        leaf = UNET_LEAVES.get(leaf, leaf)
    return CompvisTensor(".".join(x for x in (modules[module], leaf, parameter) if x))


def vae_origins(targets: list[str], levels: int) -> dict[str, CompvisTensor]:
    """diffusers key -> the checkpoint's tensor, for VQModel and AutoencoderKL.

    CompVis counts the decoder's levels from the finest.
    """

    def mirrored(match: re.Match[str]) -> str:
        return f".up.{levels - 1 - int(match[1])}"

    origins = {}
    for target in targets:
        key = re.sub(r"\.up_blocks\.(\d+)", mirrored, target)
        for pattern, replacement in VAE_RENAMES:
            key = re.sub(pattern, replacement, key)
        origins[target] = CompvisTensor(key)
    return origins
