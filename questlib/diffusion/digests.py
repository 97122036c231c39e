"""Digests that tell one model from another."""

from __future__ import annotations

import copy
import hashlib
import json

from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import nn

from questlib.denoisers import PARTS, unet_of


def model_digest(model: DiffusionPipeline | nn.Module) -> str:
    """sha256 of the denoiser's weights in float32: the same for it and for its pipeline."""
    unet = model if isinstance(model, nn.Module) else unet_of(model)
    if any(tensor.is_meta for tensor in unet.parameters()):
        # accelerate has offloaded the weights; a copy without its hooks has them.
        unet = remove_hook_from_module(copy.deepcopy(unet), recurse=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def parts_digest(pipe: DiffusionPipeline) -> str:
    """sha256 of what decides a pipeline's images beside its denoiser's weights (`model_digest`).

    That is the config of every component, the weights of the other ones, and a tokenizer's
    vocabulary.
    """
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if part is None:
            continue
        config = getattr(part, "config", None) or {}
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # Private entries are paths and versions: they do not change an image.
        about = {
            k: str(v)
            for k, v in config.items()
            if not k.startswith("_") and k != "transformers_version"
        }
        about |= part.get_vocab() if hasattr(part, "get_vocab") else {}
        digest.update(json.dumps([name, type(part).__name__, about], sort_keys=True).encode())
        if isinstance(part, nn.Module) and name not in PARTS:
            digest.update(model_digest(part).encode())
    return digest.hexdigest()
