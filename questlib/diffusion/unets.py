"""The UNet of LDM-8, which diffusers lacks."""

from __future__ import annotations

import functools

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from questlib.errors import ConfigError


class FixedHeadsUNet2DModel(UNet2DModel):
    """A UNet2DModel with the same number of attention heads at every width, as LDM-8 has (8 heads; 24 to 96 channels a head).

    As in UNet2DConditionModel, `attention_head_dim` is, whatever its name, the number of heads. The weights are those of a
    UNet2DModel, whose own `attention_head_dim` is one width of a head for all levels and cannot express this.
    """

    @functools.wraps(
        UNet2DModel.__init__
    )  # the same signature: from_config reads the expected keys from it
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        heads = self.config.attention_head_dim
        for attention in (m for m in self.modules() if isinstance(m, Attention)):
            if (
                attention.inner_dim != attention.query_dim
            ):  # the parent has rounded it to a multiple of `heads`
                raise ConfigError(
                    f"attention of width {attention.query_dim} cannot have {heads} heads"
                )
            attention.heads = attention.sliceable_head_dim = heads
            attention.scale = (attention.inner_dim // heads) ** -0.5
