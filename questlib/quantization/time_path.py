"""The time path of a UNet: the layers that see the timestep alone (paper, Sec. 3.2, Property 1)."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def run_time_layers(unet: nn.Module, t: torch.Tensor) -> None:
    """Run only the layers that map timesteps to the embedding and to its projections.

    Their outputs are what hooks on them record (`questlib.capture.capture_outputs`). In a quantized
    UNet the activation scales are those of each timestep's step group.

    Args:
        unet: a diffusers UNet, quantized or not.
        t: timesteps int64 [T], one a row.
    """
    steps = getattr(unet, "quest_steps", None)
    if steps is not None:
        steps.select(t)
    embedding = unet.time_embedding(unet.time_proj(t).to(unet.dtype))  # [T, 4 * width]
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            x = embedding if block.skip_time_act else block.nonlinearity(embedding)
            block.time_emb_proj(x)
