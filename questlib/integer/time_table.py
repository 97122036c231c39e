"""Time-embedding layers depend on the timestep alone: each timestep's row is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.normalization import AdaLayerNormSingle, AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from questlib.denoisers import TRANSFORMERS
from questlib.errors import EngineError
from questlib.integer.graph_capture import capturing
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
        self.fixed: torch.Tensor | None = None  # [1, O] in place of the timestep's row
        self.__dict__["steps"] = steps  # shared by the whole UNet, and registered once there

    def _apply(self, *args, **kwargs):
        # The rows are of the device and the precision that the module had until now.
        self.rows.clear()
        return super()._apply(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        """x [B, C] -> [B, O]. A batch of several timesteps is computed as it stands.

        Under torch.compile so is every call: a row that is looked up by its timestep would be
        compiled into the program, and each timestep be compiled anew.

        Raises:
            EngineError: a CUDA graph is being captured, and the timestep's row is not there: it
                would lie in the graph's memory, where other values take its place.
        """
        if torch.compiler.is_compiling():
            return self.layer(x, *args)
        if self.fixed is not None:
            return self.fixed.expand(x.shape[0], -1)
        t = self.steps.timestep
        if t is None:
            return self.layer(x, *args)
        if t not in self.rows:
            if capturing():
                raise EngineError(
                    f"timestep {t:g}: expected a call of the UNet before a CUDA graph is captured, "
                    "found none: what depends on the timestep alone is computed there once"
                )
            self.rows[t] = self.layer(x[:1], *args)
        return self.row().expand(x.shape[0], -1)

    def row(self) -> torch.Tensor:
        """The row of the selected timestep, [1, O], which was computed before."""
        return self.rows[self.steps.timestep]


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


def fill_rows(unet: nn.Module, tables: Sequence[TimeTable], dtype: torch.dtype) -> bool:
    """Compute the selected timestep's rows that are missing, without the rest of a UNet.

    Args:
        unet: a converted UNet.
        tables: all that it has.
        dtype: of the embedding.

    Returns:
        Whether all rows are there now; a transformer computes them in a step alone.
    """
    t = unet.quest_steps.timestep
    if not all(t in table.rows for table in tables) and hasattr(unet, "time_proj"):
        device = next(unet.parameters()).device
        x = unet.time_proj(torch.tensor([t], device=device)).to(dtype)
        x = unet.time_embedding(x)
        act = getattr(unet, "time_embed_act", None)
        x = x if act is None else act(x)
        for block in unet.modules():
            if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
                time_of(block, x)
    return all(t in table.rows for table in tables)


def time_of(block: ResnetBlock2D, temb: torch.Tensor | None) -> torch.Tensor | None:
    """What a block takes of the timestep's embedding [B, E]: [B, O], or [B, 2 O]."""
    layer = block.time_emb_proj
    if layer is None:
        return None
    inner = layer.layer if isinstance(layer, TimeTable) else layer
    if block.skip_time_act:
        return layer(temb)
    if isinstance(block.nonlinearity, nn.SiLU) and getattr(inner, "takes_silu", False):
        # The SiLU runs when the layer does: once a timestep, where there is a table.
        return layer(temb, (None, None), True)
    return layer(block.nonlinearity(temb))


def _tabulate_norms(transformer: nn.Module) -> None:
    """The same for a transformer's adaptive norms."""
    steps = transformer.quest_steps
    for norm in transformer.modules():
        if not isinstance(norm, AdaLayerNormZero | AdaLayerNormSingle):
            continue
        norm.emb.timestep_embedder = TimeTable(norm.emb.timestep_embedder, steps)
        if depends_on_time_alone(transformer):
            norm.linear = TimeTable(norm.linear, steps)
