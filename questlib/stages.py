"""The stages of QuEST's finetuning (paper, Sec. 3.3): the layers that each selects, what of them is trained, and Adam over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from questlib.config import OFF, QuantConfig
from questlib.layers import QuantLayer
from questlib.model import TIME_ROLES, act_quantizers, quant_layers

CMA_ROLES = {
    "attention": ("qkv", "context_kv", "attn_out", "feed_forward"),  # the paper: all attention-related layers
    "qkv": ("qkv", "context_kv"),  # the release on LSUN
    "no_context": ("qkv", "feed_forward"),  # the release on ImageNet: feed-forward, to_q, self-attention's to_k and to_v
    "feed_forward": ("feed_forward",),  # the release on Stable Diffusion
    "none": (),
}  # "all": every layer


@dataclass
class Stage:
    name: str  # "tla" | "cma"
    iters: int
    layers: dict[str, QuantLayer]  # whose weights are trained and whose outputs the local loss compares
    local: bool
    lr_scale: float
    rank: int = 0  # of low-rank updates in place of the weights


def stages(unet: nn.Module, config: QuantConfig) -> list[Stage]:
    """The stages that `config` asks for, with the layers of this UNet that each selects."""
    layers = quant_layers(unet)
    te_roles = {"all": TIME_ROLES, "projections": ("time_proj",)}[config.te_layers]
    found = []
    if config.te == "finetune" and config.tla_iters:
        te = {n: m for n, m in layers.items() if m.role in te_roles}
        lr = config.lr_scale if config.lr_scale_tla is None else config.lr_scale_tla
        found.append(Stage("tla", config.tla_iters, te, config.local_loss, lr))
    if config.cma_iters and config.cma_layers != "none":
        cma = {n: m for n, m in layers.items() if config.cma_layers == "all" or m.role in CMA_ROLES[config.cma_layers]}
        found.append(
            Stage("cma", config.cma_iters, cma, config.local_loss and config.cma_local_loss, config.lr_scale, config.lora_rank)
        )
    return found


def trainable(unet: nn.Module, stage: Stage, config: QuantConfig) -> list[dict]:
    """Adam's parameter groups: the stage's weights, then every activation scale; gradients are switched on for just these."""
    unet.requires_grad_(False)
    groups = []
    for layer in stage.layers.values():
        layer.thaw()
        if parametrize.is_parametrized(layer, "weight"):  # in units of the quantization step already
            update = layer.parametrizations.weight[0].requires_grad_(True)
            groups.append({"params": list(update.parameters()), "lr": config.lr_weight, "positive": False})
            continue
        layer.weight.requires_grad_(True)
        unit = layer.wq.scale.mean().item() if config.lr_relative and layer.wq is not None else 1.0
        groups.append({"params": [layer.weight], "lr": config.lr_weight * unit, "positive": False})
    frozen_te = config.te_layers == "projections"  # the release never trains the scales of the two time_embed layers
    skip = {id(m.act) for m in quant_layers(unet).values() if frozen_te and m.role == "time_embed"}
    for q in act_quantizers(unet):
        if q.enabled and q.bits != OFF and id(q) not in skip:
            q.scale.requires_grad_(True)
            unit = q.scale.detach().mean().item() if config.lr_relative else 1.0
            groups.append({"params": [q.scale], "lr": stage.lr_scale * unit, "positive": True})
    return groups


class StageAdam(torch.optim.Adam):
    """Adam in which every step group's scales, a row of `scale` [G, P], have moments and a count of their own.

    A batch that does not visit a group leaves its scales alone. One Adam over the whole table would let them coast on the
    momentum of their last visit, far enough to ruin the small scales of 8 bits where one step is trained after another.
    """

    def __init__(self, groups: list[dict]) -> None:
        """groups: as `trainable` gives them."""
        self.tables: list[tuple[nn.Parameter, list[nn.Parameter]]] = []  # scales, and their rows: parameters in the same memory
        split = []
        for group in groups:
            if group["positive"] and len(group["params"][0]) > 1:
                rows = [nn.Parameter(row) for row in group["params"][0].data]
                self.tables.append((group["params"][0], rows))
                group = group | {"params": rows, "foreach": True}
            split.append(group)
        super().__init__(split)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for table, rows in self.tables:
            if table.grad is None:
                continue
            visited = (table.grad != 0).any(1).tolist()
            for row, grad, seen in zip(rows, table.grad, visited, strict=True):
                row.grad = grad if seen else None
        super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for table, _ in self.tables:
            table.grad = None
