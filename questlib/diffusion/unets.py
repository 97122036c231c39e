"""The UNet of LDM-8, which diffusers lacks."""

from __future__ import annotations

import functools
from typing import Any

# diffusers reads a saved pipeline's own classes from the module that its model_index.json names,
# and looks for their base class, ModelMixin, as an attribute of that same module.
from diffusers import ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention

from questlib.errors import ConfigError

__all__ = ["FixedHeadsUNet2DModel", "ModelMixin"]


class FixedHeadsUNet2DModel(UNet2DModel):
    """A UNet2DModel with the same number of attention heads at every width, as LDM-8 has.

    LDM-8 has 8 heads, of 24 to 96 channels each. As in UNet2DConditionModel, `attention_head_dim`
    is, whatever its name, the number of heads. The weights are those of a UNet2DModel, whose own
    `attention_head_dim` is one width of a head for all levels and cannot express this.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        heads = self.config.attention_head_dim
        for attention in (m for m in self.modules() if isinstance(m, Attention)):
            # The parent has rounded the inner width to a multiple of `heads`.
            if attention.inner_dim != attention.query_dim:
                raise ConfigError(
                    f"attention of width {attention.query_dim} cannot have {heads} heads"
                )
            attention.heads = heads
            attention.sliceable_head_dim = heads
            attention.scale = (attention.inner_dim // heads) ** -0.5


# `from_config` reads the keys that it may pass from the constructor's signature.
functools.update_wrapper(FixedHeadsUNet2DModel.__init__, UNet2DModel.__init__)
