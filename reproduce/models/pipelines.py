"""Latent diffusion pipelines, unconditional and class-conditional, and the two parts that diffusers lacks for the paper's models.

diffusers' LDMPipeline draws the noise of eta > 0 from no generator and knows no classes; hence the pipelines here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from questlib.diffusion.conditioning import Condition
from questlib.errors import ConfigError

Generators = torch.Generator | list[torch.Generator] | None


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Class labels to cross-attention context: one learned vector a class, and one more for "no class", the last."""

    @register_to_config
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)

    @property
    def null_class(self) -> int:
        """The label that stands for no class, in classifier-free guidance."""
        return self.config.num_classes

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """labels int64 [N] -> context [N, 1, embed_dim]"""
        return self.embedding(labels)[:, None]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Unconditional latent diffusion: `vae` VQModel (LDM-4) or AutoencoderKL (LDM-8), `unet`, `scheduler`."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self, vae: VQModel | AutoencoderKL, unet: UNet2DModel, scheduler: SchedulerMixin
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images from noise; `latents` [N, C, h, w] replaces the noise drawn from `generator`. output_type: pil, np, pt, latent.

        ConfigError when eta > 0 is asked of a scheduler that has none.
        """
        return self._sample(
            lambda x, t: self.unet(x, t).sample,
            batch_size,
            num_inference_steps,
            eta,
            generator,
            latents,
            output_type,
            return_dict,
        )

    def _sample(
        self,
        eps: Callable,
        batch_size: int,
        steps: int,
        eta: float,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
    ) -> ImagePipelineOutput | tuple:
        """x_T -> x_0 -> images; eps(x_t [N, C, h, w], t) is the predicted noise."""
        device, size = self._execution_device, self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, size, size)
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta > 0 and "eta" not in accepted:
            raise ConfigError(
                f"eta = {eta}: {type(self.scheduler).__name__} has no eta, use DDIMScheduler"
            )
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
        self.scheduler.set_timesteps(steps, device=device)
        x = (
            randn_tensor(shape, generator, device, self.unet.dtype)
            if latents is None
            else latents.to(device, self.unet.dtype)
        )
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            x = self.scheduler.step(
                eps(self.scheduler.scale_model_input(x, t), t), t, x, **extra
            ).prev_sample
        if output_type != "latent":
            x = self.vae.decode(x / self.vae.config.scaling_factor).sample
            x = VaeImageProcessor().postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)


class ClassConditionalPipeline(LatentDiffusionPipeline):
    """Class-conditional latent diffusion: LDM-4 on ImageNet. The context of `class_embedder` enters by cross-attention."""

    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(
        self,
        vae: VQModel | AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        class_embedder: ClassEmbedder,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae, unet=unet, scheduler=scheduler, class_embedder=class_embedder
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """One image a label. With guidance_scale s != 1, eps = eps_null + s (eps_label - eps_null), both from one UNet call.

        ConfigError for labels outside 0..num_classes (num_classes itself is the null class), or eta > 0 without DDIM.
        """
        labels = (
            torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1).to(self._execution_device)
        )
        null = self.class_embedder.null_class
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) > null:
            raise ConfigError(
                f"class_labels: expected one or more labels in 0..{null} ({null}: no class), found {labels.tolist()}"
            )
        condition = Condition(
            self.class_embedder(labels),
            self.class_embedder(torch.full_like(labels, null)),
            guidance_scale,
        )
        eps = functools.partial(condition.predict, self.unet)
        return self._sample(
            eps, len(labels), num_inference_steps, eta, generator, latents, output_type, return_dict
        )


PIPELINES = {c.__name__: c for c in (LatentDiffusionPipeline, ClassConditionalPipeline)}
