"""What a CompVis YAML describes: empty diffusers models, and where their tensors lie.

Each component of a pipeline (UNet, autoencoder, condition) is made without weights. Beside it
stands, for each of its tensors, the tensor of the checkpoint that it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import CheckpointError, ConfigError
from reproduce.models.compvis_names import CompvisTensor, unet_origins, vae_origins
from reproduce.models.pipelines import ClassEmbedder

# Prefixes of the components' keys in a checkpoint.
UNET = "model.diffusion_model."
VAE = "first_stage_model."
COND = "cond_stage_model."

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

# They change neither the weights nor the outputs of these models.
UNET_NO_EFFECT = {"image_size", "use_checkpoint", "legacy"}


class Component(NamedTuple):
    """A component of a pipeline.

    Args:
        model: without memory for its weights.
        prefix: of its keys in the checkpoint.
        origins: the checkpoint's tensor for each of the model's own.
    """

    model: nn.Module
    prefix: str
    origins: dict[str, CompvisTensor]


def unet_component(params: Mapping[str, Any], sample_size: int) -> Component:
    """UNetModel of openaimodel.py.

    It is a UNet2DConditionModel where a condition enters, a FixedHeadsUNet2DModel where the number
    of heads is fixed, else a UNet2DModel.

    Args:
        params: of the YAML's unet_config.
        sample_size: height and width of the latents.
    """
    unknown = set(params) - UNET_KEYS - UNET_NO_EFFECT
    if unknown:
        raise ConfigError(f"unet_config: not supported: {', '.join(sorted(unknown))}")
    widths = [params["model_channels"] * m for m in params["channel_mult"]]
    attention = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    conditional = params.get("use_spatial_transformer", False)
    resample = params.get("resblock_updown", False)
    head_width = params.get("num_head_channels", -1)  # -1: num_heads at every width
    if conditional and (resample or params.get("transformer_depth", 1) != 1):
        raise ConfigError(
            "unet_config: expected no resblock_updown and transformer_depth 1 beside "
            "use_spatial_transformer"
        )
    scale_shift = params.get("use_scale_shift_norm")
    config = {
        "sample_size": sample_size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": tuple(widths),
        "layers_per_block": params["num_res_blocks"],
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "dropout": params.get("dropout", 0.0),
    }
    if conditional:
        unet_class = UNet2DConditionModel
        kinds = {True: "CrossAttn{}Block2D", False: "{}Block2D"}
        config["cross_attention_dim"] = params["context_dim"]
        # For this class it is the number of heads, whatever its name.
        config["attention_head_dim"] = tuple(
            params["num_heads"] if head_width == -1 else w // head_width for w in widths
        )
    else:
        unet_class = FixedHeadsUNet2DModel if head_width == -1 else UNet2DModel
        kinds = {True: "Attn{}Block2D", False: "Resnet{}sampleBlock2D" if resample else "{}Block2D"}
        config["attention_head_dim"] = params["num_heads"] if head_width == -1 else head_width
        config["downsample_type"] = "resnet" if resample else "conv"
        config["upsample_type"] = config["downsample_type"]
        # By default the middle block's attention would have no norm beside scale_shift.
        config["attn_norm_num_groups"] = 32
    config["down_block_types"] = tuple(kinds[a].format("Down") for a in attention)
    config["up_block_types"] = tuple(kinds[a].format("Up") for a in reversed(attention))
    model = _empty(unet_class, config)
    joint: dict[str, int] = {}
    if not conditional:
        joint = {n: m.heads for n, m in model.named_modules() if isinstance(m, Attention)}
    origins = unet_origins(list(model.state_dict()), len(widths), params["num_res_blocks"], joint)
    return Component(model, UNET, origins)


def vae_component(
    params: Mapping[str, Any], scale: float, codebook: torch.Tensor | None
) -> Component:
    """VQModelInterface or AutoencoderKL of autoencoder.py.

    A KL autoencoder has two outputs for each channel (double_z), a VQ autoencoder has one.

    Args:
        params: of the YAML's first_stage_config.
        scale: latents are multiplied with it.
        codebook: the checkpoint's [codes, D], which tells the number of codes where `params` does
            not.
    """
    dd = params["ddconfig"]
    dim = params["embed_dim"]
    if dd.get("attn_resolutions") or not (dd["z_channels"] == dim or not dd["double_z"]):
        raise ConfigError(
            "first_stage_config: expected attn_resolutions [] and, for a KL autoencoder, "
            "z_channels = embed_dim"
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
    return Component(model, VAE, vae_origins(list(model.state_dict()), levels))


def condition_component(
    params: Mapping[str, Any] | str | None, state: Mapping[str, torch.Tensor]
) -> Component | None:
    """The class embedder or the CLIP text encoder; None where the config has neither.

    Args:
        params: the YAML's cond_stage_config.
    """
    if params in (None, "__is_unconditional__"):
        return None
    if isinstance(params, Mapping):
        target = params.get("target", "")
        if target.endswith(".ClassEmbedder"):
            return _class_embedder(params["params"])
        if target.endswith(".FrozenCLIPEmbedder"):
            return _text_encoder(state)
    raise ConfigError(
        "cond_stage_config: expected ClassEmbedder, FrozenCLIPEmbedder or __is_unconditional__, "
        f"found {params!r}"
    )


def _class_embedder(params: Mapping[str, Any]) -> Component:
    classes = params.get("n_classes", 1000) - 1  # without the null class
    model = _empty(ClassEmbedder, {"num_classes": classes, "embed_dim": params["embed_dim"]})
    return Component(model, COND, {k: CompvisTensor(k) for k in model.state_dict()})


def _text_encoder(state: Mapping[str, torch.Tensor]) -> Component:
    prefix = f"{COND}transformer."
    model = _empty(CLIPTextModel, {"config": _clip_config(state, f"{prefix}text_model.")})
    origins = {}
    for key in model.state_dict():
        # Some versions of transformers lack the `text_model.` that the checkpoints' keys have.
        named = key if key.startswith("text_model.") else f"text_model.{key}"
        origins[key] = CompvisTensor(named)
    return Component(model, prefix, origins)


def _clip_config(state: Mapping[str, torch.Tensor], prefix: str) -> CLIPTextConfig:
    """CLIP's text transformer by the shapes in the checkpoint.

    Its heads are 64 wide in all of OpenAI's models.
    """
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


def _empty(model_class: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """The model without memory for its weights. ConfigError where diffusers refuses the config."""
    try:
        with init_empty_weights(include_buffers=False):
            return model_class(**config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{model_class.__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
