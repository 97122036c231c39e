"""The paper's latent diffusion pipelines, unconditional and class-conditional.

diffusers' own LDMPipeline takes the noise of eta > 0 from no generator, and knows no classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
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

from questlib.denoisers import null_label, unet_of
from questlib.diffusion.conditioning import Condition
from questlib.diffusion.sampling import choose_scheduler, denoise, sample_shape
from questlib.errors import ConfigError

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
Output: TypeAlias = ImagePipelineOutput | tuple[torch.Tensor]


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Class labels to cross-attention context.

    One learned vector for each class, and a last one for "no class".
    """

    @register_to_config
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)

    @property
    def null_class(self) -> int:
        """The label that stands for no class in classifier-free guidance."""
        return self.config.num_classes

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """labels int64 [N] -> context [N, 1, embed_dim]."""
        return self.embedding(labels)[:, None]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Unconditional latent diffusion: LDM-4 (VQModel) and LDM-8 (AutoencoderKL).

    Example:
        >>> pipe = load_pipeline("mini-ldm8")
        >>> images = pipe(batch_size=4, num_inference_steps=20).images
    """

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
    ) -> Output:
        """Draw images.

        Args:
            latents: [N, C, h, w] in place of the noise that `generator` would give.
            output_type: "pil", "np", "pt", or "latent" for what the autoencoder would decode.

        Raises:
            ConfigError: eta > 0 with a scheduler that has none.
        """
        return self._sample(
            Condition(),
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
        condition: Condition,
        batch_size: int,
        steps: int,
        eta: float,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
    ) -> Output:
        """x_T -> x_0 -> images."""
        device = self._execution_device
        denoiser = unet_of(self)
        if latents is None:
            shape = (batch_size, denoiser.config.in_channels, *sample_shape(denoiser))
            latents = randn_tensor(shape, generator, device, denoiser.dtype)
        x = denoise(
            denoiser,
            choose_scheduler(self, eta=eta),
            latents.to(device, denoiser.dtype),
            steps,
            eta=eta,
            generators=generator,
            condition=condition,
            track=self.progress_bar,
        )
        if output_type != "latent":
            x = self.vae.decode(x / self.vae.config.scaling_factor).sample
            x = VaeImageProcessor().postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x) if return_dict else (x,)


class ClassConditionalPipeline(LatentDiffusionPipeline):
    """Class-conditional latent diffusion: LDM-4 on ImageNet.

    The context of `class_embedder` enters the UNet by cross-attention.

    Example:
        >>> pipe = load_pipeline("mini-cin")
        >>> images = pipe([0, 1, 2], guidance_scale=3.0).images
    """

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

    @property
    def _null_class(self) -> int:
        return self.class_embedder.null_class

    def _condition(self, labels: torch.Tensor, null: torch.Tensor, scale: float) -> Condition:
        return Condition(self.class_embedder(labels), self.class_embedder(null), scale)

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
    ) -> Output:
        """Draw one image for each label; see LatentDiffusionPipeline for the other arguments.

        Args:
            class_labels: each in 0..num_classes; num_classes itself is the null class.
            guidance_scale: s in eps = eps_null + s (eps_label - eps_null); both predictions come
                from one call of the denoiser.

        Raises:
            ConfigError: other labels, or eta > 0 with a scheduler that has none.
        """
        labels = torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1)
        labels = labels.to(self._execution_device)
        null = self._null_class
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) > null:
            raise ConfigError(
                f"class_labels: expected one or more labels in 0..{null} ({null}: no class), "
                f"found {labels.tolist()}"
            )
        condition = self._condition(labels, torch.full_like(labels, null), guidance_scale)
        return self._sample(
            condition,
            len(labels),
            num_inference_steps,
            eta,
            generator,
            latents,
            output_type,
            return_dict,
        )


class ClassTransformerPipeline(ClassConditionalPipeline):
    """Class-conditional latent diffusion with a DiT, for any number of classes.

    diffusers' own DiTPipeline takes label 1000 for "no class", and no `eta`.

    Example:
        >>> pipe = load_pipeline("mini-dit")
        >>> images = pipe([0, 1, 2], guidance_scale=3.0).images
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: VQModel | AutoencoderKL,
        transformer: DiTTransformer2DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)

    @property
    def _null_class(self) -> int:
        return null_label(self.transformer)

    def _condition(self, labels: torch.Tensor, null: torch.Tensor, scale: float) -> Condition:
        return Condition(labels, null, scale, argument="class_labels")


PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "LatentDiffusionPipeline": LatentDiffusionPipeline,
    "ClassConditionalPipeline": ClassConditionalPipeline,
    "ClassTransformerPipeline": ClassTransformerPipeline,
}
