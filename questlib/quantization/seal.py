"""Nothing undoes quantization silently: what was put into a UNet is still in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from questlib.errors import QuestError


class Seal:
    """The modules of a UNet and where each has its place, to be compared with what is there.

    Adapters replace layers, and slicing, fusing or unfusing projections and other switches replace
    attention's processors. Each of them would run in full precision what should be quantized.

    Args:
        unet: a quantized UNet.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.places = [
            (f"{name}.{key}" if name else key, owner, key, module)
            for name, owner in unet.named_modules()
            for key, module in owner._modules.items()
            if module is not None
        ]

    def check(self) -> None:
        """QuestError that names the first module which is no longer in its place."""
        for name, owner, key, module in self.places:
            found = owner._modules.get(key, getattr(owner, key, None))
            if found is not module:
                raise QuestError(
                    f"{name}: {type(found).__name__} stands where {type(module).__name__} was, "
                    "and would run in full precision. Undo what replaced it (attention slicing or "
                    "processors, fused or unfused projections, adapters), or do it before the UNet "
                    "is quantized"
                )

    def hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The UNet's pre-hook."""
        if not torch.compiler.is_compiling():
            self.check()


def seal(unet: nn.Module) -> None:
    """Remember what stands where in a UNet; every call from now on checks it."""
    remove_seal(unet)
    unet.quest_seal = Seal(unet)
    unet.quest_seal_hook = unet.register_forward_pre_hook(unet.quest_seal.hook, with_kwargs=True)


def remove_seal(unet: nn.Module) -> None:
    """Take the seal off, where there is one."""
    if getattr(unet, "quest_seal", None) is not None:
        unet.quest_seal_hook.remove()
        unet.quest_seal = None


def check_whole(unet: nn.Module) -> None:
    """QuestError unless each part of a quantized UNet is in its place."""
    if getattr(unet, "quest_seal", None) is not None:
        unet.quest_seal.check()
