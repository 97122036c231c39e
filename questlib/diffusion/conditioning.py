"""What a UNet is told beside (x_t, t): nothing, a class label, or a prompt.

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, Eq. 6) in the form of the CompVis
samplers: eps = eps_u + g (eps_c - eps_u), from one call of the UNet on [uncond; cond].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from questlib.errors import ConfigError
from questlib.quantization.time_path import CONDITIONS


@dataclass(frozen=True)
class Condition:
    """The condition of one batch.

    Args:
        context: [N, L, D] for the UNet's cross-attention; None: unconditional.
        null: [N, L, D], the context that stands for "no condition".
        guidance_scale: g above; with 1 the UNet sees `context` alone.
    """

    context: torch.Tensor | None = None
    null: torch.Tensor | None = None
    guidance_scale: float = 1.0

    @property
    def halves(self) -> int:
        """Inputs of the UNet per sample and step: 2 under guidance, the unconditional one first."""
        return 1 if self.context is None or self.guidance_scale == 1 else 2

    def predict(self, unet: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The guided noise prediction for x [N, C, h, w] at timestep t."""
        if self.context is None:
            return unet(x, t).sample
        if self.halves == 1:
            return unet(x, t, encoder_hidden_states=self.context.to(x)).sample
        context = torch.cat([self.null, self.context]).to(x)  # [2 N, L, D]
        eps = unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample
        eps_u, eps_c = eps.chunk(2)  # [2 N, C, h, w] -> twice [N, C, h, w]
        return eps_u + self.guidance_scale * (eps_c - eps_u)


class Conditioning:
    """The conditions of a run: `at(indices)` gives the Condition of these samples.

    It depends on the pipeline, the choices and the index alone. A class-conditional pipeline has a
    `class_embedder` (labels int64 [N] -> [N, 1, D]); sample i gets labels[i % len(labels)], by
    default all classes in turn. A text pipeline has `tokenizer` and `text_encoder`; sample i gets
    prompts[i % len(prompts)].

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
        self.guidance_scale = guidance_scale
        self.embedder = getattr(pipe, "class_embedder", None)
        self.takes_text = getattr(pipe, "text_encoder", None) is not None
        self._check_pipeline()
        self._check_use(labels, prompts)
        self.choices: list[Any] = []
        if self.embedder is not None:
            self.choices = self._known_labels(labels)
        elif self.takes_text:
            self.choices = list(prompts or [])
        if (self.embedder is not None or self.takes_text) and not self.choices:
            kind = "prompts" if self.takes_text else "labels"
            raise ConfigError(f"{kind}: {type(pipe).__name__} needs at least one")
        if shuffle is not None and self.choices:
            generator = torch.Generator().manual_seed(shuffle)
            order = torch.randperm(len(self.choices), generator=generator)
            self.choices = [self.choices[i] for i in order]
        self._null: torch.Tensor | None = None

    def _check_pipeline(self) -> None:
        """ConfigError where the UNet needs more than a label or a prompt can give."""
        name = type(self.pipe).__name__
        needs_context = isinstance(self.pipe.unet, UNet2DConditionModel)
        if needs_context and self.embedder is None and not self.takes_text:
            raise ConfigError(
                f"{name}: its UNet needs a context, but it has neither class_embedder nor "
                "text_encoder"
            )
        config = self.pipe.unet.config
        more = [f"{key} = {config[key]}" for key in CONDITIONS[:3] if config.get(key) is not None]
        received, given = config.in_channels, config.out_channels
        if given not in (received, 2 * received):  # twice: noise and variance
            more.append(f"in_channels = {received}, out_channels = {given}")
        if more:
            raise ConfigError(
                f"{name}: its UNet needs more than noise, a label or a prompt ({'; '.join(more)}); "
                "let the pipeline run itself, as in questlib.calibrate(pipe, calls=[...])"
            )

    def _check_use(self, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> None:
        """ConfigError for a choice that the pipeline has no use for."""
        name = type(self.pipe).__name__
        if labels is not None and self.embedder is None:
            raise ConfigError(f"labels: {name} is not class-conditional")
        if prompts is not None and not self.takes_text:
            raise ConfigError(f"prompts: {name} has no text encoder")
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of texts, found one text")
        unconditional = self.embedder is None and not self.takes_text
        if unconditional and self.guidance_scale != 1:
            raise ConfigError(
                f"guidance_scale: {name} is unconditional; expected 1, found {self.guidance_scale}"
            )

    def _known_labels(self, labels: Sequence[int] | None) -> list[int]:
        assert self.embedder is not None
        classes = self.embedder.config.num_classes
        known = list(range(classes)) if labels is None else [int(i) for i in labels]
        unknown = [i for i in known if not 0 <= i < classes]
        if unknown:
            raise ConfigError(f"labels: expected 0..{classes - 1}, found {unknown[0]}")
        return known

    @property
    def about(self) -> dict[str, Any]:
        """What tells this conditioning from another, for the record of a run."""
        kind = "labels" if self.embedder is not None else "prompts"
        chosen = {kind: self.choices} if self.choices else {}
        return {"guidance_scale": self.guidance_scale, **chosen}

    @torch.no_grad()
    def at(self, indices: Sequence[int]) -> Condition:
        """The condition of the samples with these indices."""
        if not self.choices:
            return Condition()
        context = self._encode([self.choices[i % len(self.choices)] for i in indices])
        if self.guidance_scale == 1:
            return Condition(context)
        if self._null is None:
            self._null = self._encode([""] if self.embedder is None else [self.embedder.null_class])
        null = self._null.expand(len(context), -1, -1)  # [1, L, D] -> [N, L, D]
        return Condition(context, null, self.guidance_scale)

    def _encode(self, choices: list[Any]) -> torch.Tensor:
        """Labels or prompts -> context [N, L, D]."""
        if self.embedder is not None:
            return self.embedder(torch.tensor(choices, device=self.pipe.unet.device))
        context, _ = self.pipe.encode_prompt(
            choices,
            device=self.pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return context
