"""What each layer of a diffusers UNet or transformer is for: its role, found by structure."""

from __future__ import annotations

from typing import Literal

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.normalization import AdaGroupNorm, AdaLayerNormSingle, AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.denoisers import TRANSFORMERS

TIME_ROLES = ("time_embed", "time_proj")


def layer_roles(unet: nn.Module) -> dict[str, str]:
    """The role of each Linear and Conv2d by its name, from the module that owns it.

    Roles:
        first, last: conv_in and conv_out; from and to the patches of a transformer
        time_embed: from the timestep, a class or an added condition to the embedding
        time_proj: from the embedding into a ResBlock or an adaptive norm
        qkv: queries, keys and values of attention, but not context_kv
        context_kv: keys and values of cross-attention
        attn_out: the projection of attention's output
        feed_forward: of a transformer block
        shortcut: of a ResBlock
        conv, linear: all others
    """
    owned = _ends(unet)
    for condition in ("class_embedding", "add_embedding"):
        module = getattr(unet, condition, None)
        if module is not None:
            owned |= {id(m): "time_embed" for m in module.modules() if isinstance(m, nn.Linear)}
    for module in unet.modules():
        if isinstance(module, TimestepEmbedding):
            owned |= {id(m): "time_embed" for m in module.modules() if isinstance(m, nn.Linear)}
        elif isinstance(module, ResnetBlock2D):
            owned[id(module.time_emb_proj)] = "time_proj"
            owned[id(module.conv_shortcut)] = "shortcut"
        elif isinstance(module, AdaGroupNorm | AdaLayerNormZero | AdaLayerNormSingle):
            owned[id(module.linear)] = "time_proj"
        elif isinstance(module, Attention):
            kv = "context_kv" if module.is_cross_attention else "qkv"
            owned[id(module.to_q)] = "qkv"
            owned[id(module.to_k)] = kv
            owned[id(module.to_v)] = kv
            owned[id(module.add_k_proj)] = "context_kv"
            owned[id(module.add_v_proj)] = "context_kv"
            owned[id(module.to_out[0])] = "attn_out"
        elif isinstance(module, FeedForward):
            owned |= {id(m): "feed_forward" for m in module.modules() if isinstance(m, nn.Linear)}
    roles = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            other = "conv" if isinstance(module, nn.Conv2d) else "linear"
            roles[name] = owned.get(id(module), other)
    return roles


def _ends(unet: nn.Module) -> dict[int, str]:
    """The roles of a denoiser's first and last layers, by the layer's id."""
    if isinstance(unet, DiTTransformer2DModel):
        patches = {id(unet.pos_embed.proj): "first", id(unet.proj_out_2): "last"}
        return patches | {id(unet.proj_out_1): "time_proj"}  # the last norm's shift and scale
    if isinstance(unet, PixArtTransformer2DModel):
        return {id(unet.pos_embed.proj): "first", id(unet.proj_out): "last"}
    return {id(unet.conv_in): "first", id(unet.conv_out): "last"}


def skip_splits(unet: nn.Module) -> dict[str, int]:
    """Where to split the input of layers that see a raw concatenation [hidden, skip].

    These are the shortcuts of the up blocks (Q-Diffusion, Sec. 3.2).

    Returns:
        The number of channels of `hidden`, by the layer's name. Transformers have none.
    """
    if isinstance(unet, TRANSFORMERS):
        return {}
    names = {id(module): name for name, module in unet.named_modules()}
    if unet.mid_block is not None:
        channels = unet.mid_block.resnets[-1].out_channels
    else:
        channels = unet.config.block_out_channels[-1]
    splits = {}
    for block in unet.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None and resnet.in_channels > channels:
                splits[names[id(resnet.conv_shortcut)]] = channels
            channels = resnet.out_channels
    return splits


def layer_kind(layer: nn.Module, role: str) -> Literal["conv", "feed_forward", "linear"]:
    """The kind of a layer in the paper's Fig. 3; linear: all linear layers but feed_forward."""
    if isinstance(layer, nn.Conv2d):
        return "conv"
    return "feed_forward" if role == "feed_forward" else "linear"


def sees_tokens(layer: nn.Module) -> bool:
    """Whether each output comes from one token (or pixel) alone.

    A token's own scale can then be applied after the sum over channels.
    """
    if isinstance(layer, nn.Linear):
        return True
    shape = (*layer.kernel_size, *layer.stride, layer.groups)
    return set(shape) == {1} and layer.padding in (0, (0, 0))
