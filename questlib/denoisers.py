"""The denoisers of diffusers' pipelines: UNets, and transformers over patches of an image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from questlib.errors import ConfigError

UNETS = (UNet2DModel, UNet2DConditionModel)
TRANSFORMERS = (DiTTransformer2DModel, PixArtTransformer2DModel)
PARTS = ("unet", "transformer")  # the denoiser's name in a pipeline


def unet_of(pipe: DiffusionPipeline) -> nn.Module:
    """The pipeline's denoiser, a UNet or a transformer.

    Raises:
        ConfigError: it has none, or one of a class that questlib does not know.
    """
    found = [part for name in PARTS if (part := getattr(pipe, name, None)) is not None]
    if not found:
        parts = ", ".join(getattr(pipe, "components", ())) or "no components"
        raise ConfigError(
            f"{type(pipe).__name__} has no UNet or transformer; expected a pipeline with one of "
            f"{names()}, found {parts}"
        )
    if isinstance(found[0], ModelMixin) and not isinstance(found[0], UNETS + TRANSFORMERS):
        raise unsupported(found[0])
    return found[0]


def is_transformer(denoiser: nn.Module) -> bool:
    """Whether it is one of `TRANSFORMERS`, also where `torch.compile` has wrapped it."""
    return isinstance(_original(denoiser), TRANSFORMERS)


def _original(denoiser: nn.Module) -> nn.Module:
    return getattr(denoiser, "_orig_mod", denoiser)


def names() -> str:
    """The classes that can be quantized."""
    return ", ".join(kind.__name__ for kind in UNETS + TRANSFORMERS)


def unsupported(denoiser: nn.Module) -> ConfigError:
    """The error for a denoiser of another class."""
    return ConfigError(
        f"a {type(denoiser).__name__} cannot be quantized; expected a diffusers model of one of "
        f"the classes {names()}"
    )


# ---- how they are called ----


def input_name(denoiser: nn.Module) -> str:
    """What a denoiser's forward calls x_t."""
    return "hidden_states" if is_transformer(denoiser) else "sample"


def timestep_of(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The timestep among the arguments of a call. PixArt has the text before it."""
    if "timestep" in kwargs:
        return kwargs["timestep"]
    return args[2 if isinstance(denoiser, PixArtTransformer2DModel) else 1]


def predict(denoiser: nn.Module, x: torch.Tensor, t: torch.Tensor, **given: Any) -> torch.Tensor:
    """A denoiser's output [B, C, h, w] for x [B, C, h, w].

    Args:
        t: timesteps [B], or [] where all are the same.
        given: its other arguments.
    """
    if is_transformer(denoiser):
        # UNets expand one timestep themselves
        return denoiser(x, timestep=t.reshape(-1).expand(len(x)), **given).sample
    return denoiser(x, t, **given).sample


# ---- class labels ----


def takes_labels(denoiser: nn.Module) -> bool:
    """Whether it embeds class labels itself."""
    return isinstance(_original(denoiser), DiTTransformer2DModel)


def null_label(denoiser: nn.Module) -> int:
    """The label that stands for no class, which comes after all classes."""
    return denoiser.config.num_embeds_ada_norm


# ---- what they give ----


def output_channels(denoiser: nn.Module) -> int:
    """Channels of its output; transformers can leave them out of their config."""
    return denoiser.config.out_channels or denoiser.config.in_channels


def learns_variance(denoiser: nn.Module) -> bool:
    """Whether it predicts C channels of noise and C of variance."""
    return output_channels(denoiser) == 2 * denoiser.config.in_channels
