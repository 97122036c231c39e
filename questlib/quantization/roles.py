"""What each layer of a diffusers UNet is for: its role, found by structure."""

from __future__ import annotations

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

TIME_ROLES = ("time_embed", "time_proj")


def layer_roles(unet: nn.Module) -> dict[str, str]:
    """Role of each Linear and Conv2d, by the module that owns it:

    first, last | time_embed (t -> embedding) | time_proj (embedding -> ResBlock) | qkv, attn_out | context_kv (keys and values
    of cross-attention) | feed_forward | shortcut | conv | linear
    """
    owned: dict[int, str] = {id(unet.conv_in): "first", id(unet.conv_out): "last"}
    for module in unet.modules():
        if isinstance(module, TimestepEmbedding):
            owned |= {id(m): "time_embed" for m in module.modules() if isinstance(m, nn.Linear)}
        elif isinstance(module, ResnetBlock2D):
            owned[id(module.time_emb_proj)] = "time_proj"
            owned[id(module.conv_shortcut)] = "shortcut"
        elif isinstance(module, Attention):
            kv = "context_kv" if module.is_cross_attention else "qkv"
            owned |= {
                id(module.to_q): "qkv",
                id(module.to_k): kv,
                id(module.to_v): kv,
                id(module.to_out[0]): "attn_out",
            }
        elif isinstance(module, FeedForward):
            owned |= {id(m): "feed_forward" for m in module.modules() if isinstance(m, nn.Linear)}
    roles = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            roles[name] = owned.get(
                id(module), "conv" if isinstance(module, nn.Conv2d) else "linear"
            )
    return roles


def skip_splits(unet: nn.Module) -> dict[str, int]:
    """For each layer that sees a raw concatenation [hidden, skip] (the shortcuts of the up blocks): the channels of `hidden`."""
    names = {id(m): n for n, m in unet.named_modules()}
    channels = (
        unet.mid_block.resnets[-1].out_channels
        if unet.mid_block is not None
        else unet.config.block_out_channels[-1]
    )
    splits = {}
    for block in unet.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None and resnet.in_channels > channels:
                splits[names[id(resnet.conv_shortcut)]] = channels
            channels = resnet.out_channels
    return splits


def layer_kind(layer: nn.Module, role: str) -> str:
    """feed_forward, linear (all other Linears) or conv: the kinds of the paper's Fig. 3."""
    return (
        "conv"
        if isinstance(layer, nn.Conv2d)
        else "feed_forward"
        if role == "feed_forward"
        else "linear"
    )


def sees_tokens(layer: nn.Module) -> bool:
    """Whether each output comes from one token (or pixel) alone, so that a scale of its own can be put on after the sum."""
    if isinstance(layer, nn.Linear):
        return True
    shape = (*layer.kernel_size, *layer.stride, layer.groups)
    return set(shape) == {1} and layer.padding in (0, (0, 0))
