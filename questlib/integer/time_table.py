"""Time-embedding layers depend on the timestep alone: each timestep's row is computed once."""

from __future__ import annotations

import torch
from diffusers.models.normalization import AdaLayerNormSingle, AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.denoisers import TRANSFORMERS
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.time_path import depends_on_time_alone


class TimeTable(nn.Module):
    """A layer of the time path that computes each timestep's row once, for every batch and run.

    Bit-identical to the layer itself: integer sums do not depend on the batch, and their rescaling
    is element by element.
    """

    def __init__(self, layer: nn.Module, steps: StepGroups) -> None:
        super().__init__()
        self.layer = layer
        self.rows: dict[float, torch.Tensor] = {}  # timestep -> [1, O]
        self.__dict__["steps"] = steps  # shared by the whole UNet, and registered once there

    def _apply(self, *args, **kwargs):
        # The rows are of the device and the precision that the module had until now.
        self.rows.clear()
        return super()._apply(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        """x [B, C] -> [B, O]. A batch of several timesteps is computed as it stands."""
        t = self.steps.timestep
        if t is None:
            return self.layer(x, *args)
        if t not in self.rows:
            self.rows[t] = self.layer(x[:1], *args)
        return self.rows[t].expand(x.shape[0], -1)


def tabulate_time(unet: nn.Module) -> None:
    """Put the layers of the time path into tables, in place; a conditional embedding stays.

    A transformer's embedding of the timestep is a module of its own, beside that of conditions.
    """
    if isinstance(unet, TRANSFORMERS):
        _tabulate_norms(unet)
        return
    if not depends_on_time_alone(unet):
        return
    unet.time_embedding = TimeTable(unet.time_embedding, unet.quest_steps)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            module.time_emb_proj = TimeTable(module.time_emb_proj, unet.quest_steps)


def _tabulate_norms(transformer: nn.Module) -> None:
    """The same for a transformer's adaptive norms."""
    steps = transformer.quest_steps
    for norm in transformer.modules():
        if not isinstance(norm, AdaLayerNormZero | AdaLayerNormSingle):
            continue
        norm.emb.timestep_embedder = TimeTable(norm.emb.timestep_embedder, steps)
        if depends_on_time_alone(transformer):
            norm.linear = TimeTable(norm.linear, steps)
