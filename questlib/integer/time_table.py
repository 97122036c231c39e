"""Time-embedding layers depend on the timestep alone: each row is computed once."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

# ---- time-embedding layers: their output depends on the timestep alone ----


class TimeTable(nn.Module):
    """Stands in for a layer of the time path: computes each timestep's row once and repeats it, for every batch and every run.

    Bit-identical to the layer itself: integer sums do not depend on the batch, and their rescaling is element by element.
    """

    def __init__(self, layer: nn.Module, steps: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.rows: dict[float, torch.Tensor] = {}
        self.__dict__["steps"] = steps

    def _apply(self, *args, **kwargs):
        self.rows.clear()  # of another device, or in another precision
        return super()._apply(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        t = self.steps.timestep
        if t is None:  # a batch of several timesteps
            return self.layer(x, *args)
        if t not in self.rows:
            self.rows[t] = self.layer(x[:1], *args)
        return self.rows[t].expand(x.shape[0], -1)


def depends_on_time_alone(unet: nn.Module) -> bool:
    """Whether nothing but the timestep enters the embedding (no labels, no added conditions)."""
    keys = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim")
    return all(unet.config.get(key) is None for key in keys)


def _tabulate_time(unet: nn.Module) -> None:
    if not depends_on_time_alone(unet):
        return
    unet.time_embedding = TimeTable(unet.time_embedding, unet.quest_steps)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            module.time_emb_proj = TimeTable(module.time_emb_proj, unet.quest_steps)
