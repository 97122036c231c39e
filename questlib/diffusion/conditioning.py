"""What a UNet is told beside (x_t, t): nothing, a class label, or a prompt; and classifier-free guidance.

Guidance (Ho & Salimans, arXiv 2207.12598, Eq. 6, in the form of the CompVis samplers): eps = eps_u + g (eps_c - eps_u), from one
call of the UNet on [uncond; cond].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from questlib.errors import ConfigError


@dataclass(frozen=True)
class Condition:
    """Of one batch: context, null [N, L, D] (None: unconditional). Guidance scale 1: the UNet sees `context` alone."""

    context: torch.Tensor | None = None
    null: torch.Tensor | None = None
    guidance_scale: float = 1.0

    @property
    def halves(self) -> int:
        """Calls of the UNet per sample and step, joined in one batch: 2 under guidance, unconditional first."""
        return 1 if self.context is None or self.guidance_scale == 1 else 2

    def predict(self, unet, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The guided noise prediction for x [N, C, h, w] at timestep t."""
        if self.context is None:
            return unet(x, t).sample
        if self.halves == 1:
            return unet(x, t, encoder_hidden_states=self.context.to(x)).sample
        out = unet(
            torch.cat([x, x]), t, encoder_hidden_states=torch.cat([self.null, self.context]).to(x)
        ).sample
        eps_u, eps_c = out.chunk(2)
        return eps_u + self.guidance_scale * (eps_c - eps_u)


class Conditioning:
    """Of a run: `at(indices)` is the Condition of these samples, which depends on the pipeline, the choices and the index alone.

    Class-conditional pipelines have a `class_embedder` (labels int64 [N] -> [N, 1, D]); sample i gets labels[i % len(labels)],
    all classes in turn by default. Text pipelines have `tokenizer` and `text_encoder`; sample i gets prompts[i % len(prompts)].
    shuffle: a seed that permutes the labels or prompts first, so that fewer samples than classes still are a fair choice of them.
    ConfigError for labels, prompts or a guidance scale that the pipeline has no use for, missing prompts, unknown labels.
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
        self.pipe, self.guidance_scale = pipe, guidance_scale
        self.embedder = getattr(pipe, "class_embedder", None)
        text = getattr(pipe, "text_encoder", None) is not None
        name = type(pipe).__name__
        if self.embedder is None and not text and isinstance(pipe.unet, UNet2DConditionModel):
            raise ConfigError(
                f"{name}: its UNet needs a context, but it has neither class_embedder nor text_encoder"
            )
        if text and getattr(pipe.unet.config, "addition_embed_type", None) is not None:
            raise ConfigError(
                f"{name}: its UNet needs more than a prompt's context ({pipe.unet.config.addition_embed_type})"
            )
        if labels is not None and self.embedder is None:
            raise ConfigError(f"labels: {name} is not class-conditional")
        if prompts is not None and not text:
            raise ConfigError(f"prompts: {name} has no text encoder")
        if self.embedder is None and not text and guidance_scale != 1:
            raise ConfigError(
                f"guidance_scale: {name} is unconditional; expected 1, found {guidance_scale}"
            )
        if self.embedder is not None:
            classes = self.embedder.config.num_classes
            self.choices: list[Any] = (
                list(range(classes)) if labels is None else [int(i) for i in labels]
            )
            bad = [i for i in self.choices if not 0 <= i < classes]
            if bad:
                raise ConfigError(f"labels: expected 0..{classes - 1}, found {bad[0]}")
        elif text:
            if isinstance(prompts, str):
                raise ConfigError("prompts: expected a list of texts, found one text")
            self.choices = list(prompts or [])
        else:
            self.choices = []
        if (self.embedder is not None or text) and not self.choices:
            raise ConfigError(f"{'prompts' if text else 'labels'}: {name} needs at least one")
        if shuffle is not None and self.choices:
            order = torch.randperm(
                len(self.choices), generator=torch.Generator().manual_seed(shuffle)
            )
            self.choices = [self.choices[i] for i in order]
        self._null: torch.Tensor | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What tells this conditioning from another, for the record of a run."""
        kind = "labels" if self.embedder is not None else "prompts"
        return {"guidance_scale": self.guidance_scale} | (
            {kind: self.choices} if self.choices else {}
        )

    @torch.no_grad()
    def at(self, indices: Sequence[int]) -> Condition:
        if not self.choices:
            return Condition()
        context = self._encode([self.choices[i % len(self.choices)] for i in indices])
        if self.guidance_scale == 1:
            return Condition(context)
        if self._null is None:
            self._null = self._encode([""] if self.embedder is None else [self.embedder.null_class])
        return Condition(context, self._null.expand(len(context), -1, -1), self.guidance_scale)

    def _encode(self, choices: list[Any]) -> torch.Tensor:
        """Labels or prompts -> context [N, L, D]."""
        if self.embedder is not None:
            return self.embedder(torch.tensor(choices, device=self.pipe.unet.device))
        context, _ = self.pipe.encode_prompt(
            choices, self.pipe.text_encoder.device, 1, do_classifier_free_guidance=False
        )
        return context
