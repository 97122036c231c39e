"""What a CompVis YAML describes, as empty diffusers models, and where each of their tensors lies in the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import CheckpointError, ConfigError
from reproduce.models.pipelines import ClassEmbedder

UNET, VAE, COND = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
UNET_KEYS = {
    "in_channels",
    "out_channels",
    "model_channels",
    "attention_resolutions",
    "num_res_blocks",
    "channel_mult",
    "num_heads",
    "num_head_channels",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_spatial_transformer",
    "transformer_depth",
    "context_dim",
    "dropout",
}
UNET_NO_EFFECT = {
    "image_size",
    "use_checkpoint",
    "legacy",
}  # on the weights or outputs of these models


class Source(NamedTuple):
    """One CompVis tensor, or the part q, k or v (0, 1, 2) of a joint qkv weight whose rows are ordered [head, part, channel]."""

    key: str
    part: int | None = None
    heads: int = 1


class Part(NamedTuple):
    """One component of the pipeline: the empty model, the prefix of its keys in the checkpoint, and each tensor's source."""

    model: nn.Module
    prefix: str
    sources: dict[str, Source]


# ResBlock and AttentionBlock of openaimodel.py; Transformer2DModel and its blocks have CompVis's own names
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
UNET_MODULE = re.compile(
    r"((?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|time_embedding\.\w+|conv_\w+)\.(?:(.+)\.)?(\w+)"
)
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
    """diffusers module -> CompVis module. CompVis counts residual blocks and resamplings of all levels in one sequence."""
    modules, i = dict(UNET_MODULES), 1
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


def unet_sources(
    targets: list[str], levels: int, layers: int, heads: dict[str, int]
) -> dict[str, Source]:
    """diffusers key -> its source; heads: the number of heads of each attention whose q, k, v are one weight in CompVis."""
    modules, sources = unet_modules(levels, layers), {}
    for level in range(
        levels - 1
    ):  # after the last residual block of a level, and its attention if it has one
        attention = any(t.startswith(f"up_blocks.{level}.attentions.") for t in targets)
        modules[f"up_blocks.{level}.upsamplers.0"] = (
            f"output_blocks.{(level + 1) * (layers + 1) - 1}.{1 + attention}"
        )
    for target in targets:
        module, leaf, parameter = UNET_MODULE.fullmatch(target).groups()
        if module in heads and leaf in ("to_q", "to_k", "to_v"):
            source = Source(
                f"{modules[module]}.qkv.{parameter}", "qkv".index(leaf[-1]), heads[module]
            )
        else:
            leaf = (
                "op" if "downsamplers" in module and leaf == "conv" else UNET_LEAVES.get(leaf, leaf)
            )
            source = Source(".".join(x for x in (modules[module], leaf, parameter) if x))
        sources[target] = source
    return sources


def vae_sources(targets: list[str], levels: int) -> dict[str, Source]:
    """diffusers key -> its source, for VQModel and AutoencoderKL; CompVis counts the decoder's levels from the finest."""
    sources = {}
    for target in targets:
        key = re.sub(r"\.up_blocks\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", target)
        for pattern, replacement in VAE_RENAMES:
            key = re.sub(pattern, replacement, key)
        sources[target] = Source(key)
    return sources


def unet_part(params: Mapping, sample_size: int) -> Part:
    """UNetModel of openaimodel.py as UNet2DModel, FixedHeadsUNet2DModel or UNet2DConditionModel."""
    unknown = set(params) - UNET_KEYS - UNET_NO_EFFECT
    if unknown:
        raise ConfigError(f"unet_config: not supported: {', '.join(sorted(unknown))}")
    widths = [params["model_channels"] * m for m in params["channel_mult"]]
    attention = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    conditional, resample = (
        params.get("use_spatial_transformer", False),
        params.get("resblock_updown", False),
    )
    head_width = params.get("num_head_channels", -1)  # -1: num_heads at every width
    if conditional and (resample or params.get("transformer_depth", 1) != 1):
        raise ConfigError(
            "unet_config: expected no resblock_updown and transformer_depth 1 beside use_spatial_transformer"
        )
    config = {
        "sample_size": sample_size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": tuple(widths),
        "layers_per_block": params["num_res_blocks"],
        "resnet_time_scale_shift": "scale_shift"
        if params.get("use_scale_shift_norm")
        else "default",
        "dropout": params.get("dropout", 0.0),
    }
    if conditional:
        unet_class, kinds = UNet2DConditionModel, {True: "CrossAttn{}Block2D", False: "{}Block2D"}
        config["cross_attention_dim"] = params["context_dim"]
        # the number of heads, whatever its name
        config["attention_head_dim"] = tuple(
            params["num_heads"] if head_width == -1 else w // head_width for w in widths
        )
    else:
        unet_class = FixedHeadsUNet2DModel if head_width == -1 else UNet2DModel
        kinds = {True: "Attn{}Block2D", False: "Resnet{}sampleBlock2D" if resample else "{}Block2D"}
        config["attention_head_dim"] = params["num_heads"] if head_width == -1 else head_width
        config["downsample_type"] = config["upsample_type"] = "resnet" if resample else "conv"
        config["attn_norm_num_groups"] = 32  # otherwise none in the middle block beside scale_shift
    config["down_block_types"] = tuple(kinds[a].format("Down") for a in attention)
    config["up_block_types"] = tuple(kinds[a].format("Up") for a in reversed(attention))
    model = _empty(unet_class, config)
    heads = (
        {}
        if conditional
        else {n: m.heads for n, m in model.named_modules() if isinstance(m, Attention)}
    )
    return Part(
        model,
        UNET,
        unet_sources(list(model.state_dict()), len(widths), params["num_res_blocks"], heads),
    )


def vae_part(params: Mapping, scale: float, codebook: torch.Tensor | None) -> Part:
    """VQModelInterface or AutoencoderKL of autoencoder.py. A KL autoencoder has two outputs a channel (double_z), a VQ one."""
    dd, dim = params["ddconfig"], params["embed_dim"]
    if dd.get("attn_resolutions") or not (dd["z_channels"] == dim or not dd["double_z"]):
        raise ConfigError(
            "first_stage_config: expected attn_resolutions [] and, for a KL autoencoder, z_channels = embed_dim"
        )
    levels = len(dd["ch_mult"])
    config = {
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "block_out_channels": tuple(dd["ch"] * m for m in dd["ch_mult"]),
        "layers_per_block": dd["num_res_blocks"],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": dd["z_channels"],
        "sample_size": dd["resolution"],
        "scaling_factor": scale,
    }
    if dd["double_z"]:
        model = _empty(AutoencoderKL, config)
    else:
        codes = params.get("n_embed", None if codebook is None else len(codebook))
        if codes is None:
            raise ConfigError(
                "first_stage_config: a VQ autoencoder (double_z: false) needs n_embed"
            )
        model = _empty(VQModel, {**config, "num_vq_embeddings": codes, "vq_embed_dim": dim})
    return Part(model, VAE, vae_sources(list(model.state_dict()), levels))


def condition_part(params: Mapping | str | None, state: Mapping[str, torch.Tensor]) -> Part | None:
    """The class embedder or the CLIP text encoder; None where the config has neither."""
    target = params.get("target", "") if isinstance(params, Mapping) else ""
    if target.endswith(".ClassEmbedder"):
        own = params["params"]
        model = _empty(
            ClassEmbedder,
            {"num_classes": own.get("n_classes", 1000) - 1, "embed_dim": own["embed_dim"]},
        )
        return Part(model, COND, {k: Source(k) for k in model.state_dict()})
    if target.endswith(".FrozenCLIPEmbedder"):
        prefix = f"{COND}transformer."
        model = _empty(CLIPTextModel, {"config": _clip_config(state, f"{prefix}text_model.")})
        # transformers' CLIPTextModel dropped the `text_model.` of its keys in some versions; the checkpoints have it
        return Part(
            model,
            prefix,
            {
                k: Source(k if k.startswith("text_model.") else f"text_model.{k}")
                for k in model.state_dict()
            },
        )
    if params in (None, "__is_unconditional__"):
        return None
    raise ConfigError(
        f"cond_stage_config: expected ClassEmbedder, FrozenCLIPEmbedder or __is_unconditional__, found {params!r}"
    )


def _clip_config(state: Mapping[str, torch.Tensor], prefix: str) -> CLIPTextConfig:
    """CLIP's text transformer by the shapes in the checkpoint; its heads are 64 wide in all of OpenAI's models."""
    try:
        vocabulary, width = state[f"{prefix}embeddings.token_embedding.weight"].shape
        positions = len(state[f"{prefix}embeddings.position_embedding.weight"])
        inner = len(state[f"{prefix}encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise CheckpointError(
            f"the config has a CLIP text encoder, the checkpoint has none: missing {error}"
        ) from error
    layers = sum(
        k.startswith(f"{prefix}encoder.layers.") and k.endswith(".mlp.fc1.weight") for k in state
    )
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=positions,
    )


def _empty(model_class: type[nn.Module], config: dict) -> nn.Module:
    """The model without memory for its weights. ConfigError where diffusers refuses the config."""
    try:
        with init_empty_weights(include_buffers=False):
            return model_class(**config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{model_class.__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
