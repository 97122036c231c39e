"""What a denoiser is told beside (x_t, t): nothing, a class label, or a prompt.

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, Eq. 6) in the form of the CompVis
samplers: eps = eps_u + g (eps_c - eps_u), from one call on [uncond; cond].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn

from questlib.denoisers import null_label, output_channels, predict, takes_labels, unet_of
from questlib.errors import ConfigError
from questlib.quantization.time_path import CONDITIONS


@dataclass(frozen=True)
class Condition:
    """The condition of one batch.

    Args:
        context: what the denoiser is told of N samples: [N, L, D] for a UNet's cross-attention,
            or labels int64 [N]; None: unconditional.
        null: shaped like it, what stands for "no condition".
        guidance_scale: g above; with 1 the denoiser sees `context` alone.
        argument: the denoiser's name for the context.
    """

    context: torch.Tensor | None = None
    null: torch.Tensor | None = None
    guidance_scale: float = 1.0
    argument: str = "encoder_hidden_states"

    @property
    def halves(self) -> int:
        """Inputs of the denoiser per sample and step: 2 under guidance, the null one first."""
        return 1 if self.context is None or self.guidance_scale == 1 else 2

    def predict(self, denoiser: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The guided noise prediction for x [N, C, h, w] at timestep t.

        A learned variance, which is a second C channels, is that of the condition.
        """
        if self.context is None:
            return predict(denoiser, x, t)
        if self.halves == 1:
            return predict(denoiser, x, t, **{self.argument: self._as(x, self.context)})
        context = self._as(x, torch.cat([self.null, self.context]))  # [2 N, L, D] or [2 N]
        eps = predict(denoiser, torch.cat([x, x]), t, **{self.argument: context})
        eps_u, eps_c = eps.chunk(2)  # [2 N, C, h, w] -> twice [N, C, h, w]
        channels = x.shape[1]
        variance = eps_c[:, channels:]
        eps_u, eps_c = eps_u[:, :channels], eps_c[:, :channels]
        guided = eps_u + self.guidance_scale * (eps_c - eps_u)
        return guided if variance.shape[1] == 0 else torch.cat([guided, variance], 1)

    @staticmethod
    def _as(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The context on the device of x, and in its precision where it is no label."""
        return context.to(x) if context.is_floating_point() else context.to(x.device)


class Conditioning:
    """The conditions of a run: `at(indices)` gives the Condition of these samples.

    It depends on the pipeline, the choices and the index alone. A class-conditional pipeline has a
    `class_embedder` (labels int64 [N] -> [N, 1, D]), or a transformer that takes labels; sample i
    gets labels[i % len(labels)], by default all classes in turn. A text pipeline has `tokenizer`
    and `text_encoder`; sample i gets prompts[i % len(prompts)].

    Args:
        shuffle: a seed that permutes the labels or prompts first, so that fewer samples than
            classes still are a fair choice of them.

    Raises:
        ConfigError: labels, prompts or a guidance scale that the pipeline has no use for, missing
            prompts, or unknown labels.

    Example:
        >>> conditioning = Conditioning(pipe, guidance_scale=3.0, labels=[0, 1])
        >>> eps = conditioning.at(range(4)).predict(pipe.unet, x, t)
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        guidance_scale: float = 1.0,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        shuffle: int | None = None,
    ) -> None:
        self.pipe = pipe
        self.denoiser = unet_of(pipe)
        self.guidance_scale = guidance_scale
        self.embedder = getattr(pipe, "class_embedder", None)
        self.takes_labels = self.embedder is not None or takes_labels(self.denoiser)
        self.takes_text = getattr(pipe, "text_encoder", None) is not None
        self._check_pipeline()
        self._check_use(labels, prompts)
        self.choices: list[Any] = []
        if self.takes_labels:
            self.choices = self._known_labels(labels)
        elif self.takes_text:
            self.choices = list(prompts or [])
        if (self.takes_labels or self.takes_text) and not self.choices:
            kind = "labels" if self.takes_labels else "prompts"
            raise ConfigError(f"{kind}: {type(pipe).__name__} needs at least one")
        if shuffle is not None and self.choices:
            generator = torch.Generator().manual_seed(shuffle)
            order = torch.randperm(len(self.choices), generator=generator)
            self.choices = [self.choices[i] for i in order]
        self._null: torch.Tensor | None = None

    def _check_pipeline(self) -> None:
        """ConfigError where the denoiser needs more than a label or a prompt can give."""
        name = type(self.pipe).__name__
        needs_context = isinstance(self.denoiser, UNet2DConditionModel)
        if needs_context and self.embedder is None and not self.takes_text:
            raise ConfigError(
                f"{name}: its UNet needs a context, but it has neither class_embedder nor "
                "text_encoder"
            )
        config = self.denoiser.config
        more = [f"{key} = {config[key]}" for key in CONDITIONS[:3] if config.get(key) is not None]
        received, given = config.in_channels, output_channels(self.denoiser)
        if given not in (received, 2 * received):  # twice: noise and variance
            more.append(f"in_channels = {received}, out_channels = {given}")
        if isinstance(self.denoiser, PixArtTransformer2DModel):
            more.append("a text of its own encoder and a mask of it")
        if more:
            raise ConfigError(
                f"{name}: its denoiser needs more than noise, a label or a prompt "
                f"({'; '.join(more)}); let the pipeline run itself, as in "
                "questlib.calibrate(pipe, calls=[...])"
            )

    def _check_use(self, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> None:
        """ConfigError for a choice that the pipeline has no use for."""
        name = type(self.pipe).__name__
        if labels is not None and not self.takes_labels:
            raise ConfigError(f"labels: {name} is not class-conditional")
        if prompts is not None and not self.takes_text:
            raise ConfigError(f"prompts: {name} has no text encoder")
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of texts, found one text")
        unconditional = not self.takes_labels and not self.takes_text
        if unconditional and self.guidance_scale != 1:
            raise ConfigError(
                f"guidance_scale: {name} is unconditional; expected 1, found {self.guidance_scale}"
            )

    def _known_labels(self, labels: Sequence[int] | None) -> list[int]:
        classes = self._null_label
        known = list(range(classes)) if labels is None else [int(i) for i in labels]
        unknown = [i for i in known if not 0 <= i < classes]
        if unknown:
            raise ConfigError(f"labels: expected 0..{classes - 1}, found {unknown[0]}")
        return known

    @property
    def argument(self) -> str:
        """The denoiser's name for the context."""
        return "class_labels" if takes_labels(self.denoiser) else "encoder_hidden_states"

    @property
    def _null_label(self) -> int:
        """The label of no class; those before it are the classes."""
        return null_label(self.denoiser) if self.embedder is None else self.embedder.null_class

    @property
    def about(self) -> dict[str, Any]:
        """What tells this conditioning from another, for the record of a run."""
        kind = "labels" if self.takes_labels else "prompts"
        chosen = {kind: self.choices} if self.choices else {}
        return {"guidance_scale": self.guidance_scale, **chosen}

    @torch.no_grad()
    def at(self, indices: Sequence[int]) -> Condition:
        """The condition of the samples with these indices."""
        if not self.choices:
            return Condition()
        context = self._encode([self.choices[i % len(self.choices)] for i in indices])
        if self.guidance_scale == 1:
            return Condition(context, argument=self.argument)
        if self._null is None:
            self._null = self._encode([self._null_label] if self.takes_labels else [""])
        null = self._null.expand_as(context)  # [1, L, D] -> [N, L, D], or [1] -> [N]
        return Condition(context, null, self.guidance_scale, self.argument)

    def _encode(self, choices: list[Any]) -> torch.Tensor:
        """Labels or prompts -> context [N, L, D], or labels [N] for a transformer."""
        if self.takes_labels:
            labels = torch.tensor(choices)
            if self.embedder is None:
                return labels
            return self.embedder(labels.to(self.denoiser.device))
        context, _ = self.pipe.encode_prompt(
            choices,
            device=self.pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return context
