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
    A row whose gradient is exactly zero counts as not visited, also where it is its table's only one.
    All tables are stepped at once, as one vector: thousands of rows one by one were a tenth of a finetuning step.
    """

    def __init__(self, groups: list[dict]) -> None:
        """groups: as `trainable` gives them; those that are "positive" hold one table of scales [G, P] each."""
        scales = [group for group in groups if group["positive"]]
        self.tables: list[nn.Parameter] = [group["params"][0] for group in scales]
        others = [group for group in groups if not group["positive"]]
        if scales:
            lengths = torch.tensor([t.shape[1] for t in self.tables for _ in range(len(t))])  # of every row of every table
            self.row = torch.arange(len(lengths)).repeat_interleave(lengths).to(self.tables[0].device)  # [N]: each scale's row
            # The base class skips this vector, having no gradient, but keeps its state and schedules its lr, a factor of `rates`.
            self.vector = nn.Parameter(torch.zeros_like(self.row, dtype=torch.float32))
            others.append({"params": [self.vector], "lr": 1.0, "rates": [group["lr"] for group in scales]})
        super().__init__(others)
        if scales:
            zeros = torch.zeros_like(self.vector)
            self.state[self.vector] = {"step": torch.zeros_like(self.row), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        super().step(closure)
        if any(table.grad is not None for table in self.tables):
            self._step_scales()

    def _step_scales(self) -> None:
        """One step of Adam (Kingma and Ba 2015, Algorithm 1) for the rows whose gradient is not all zero."""
        group, state = self.param_groups[-1], self.state[self.vector]
        (beta1, beta2), count = group["betas"], state["step"].to(self.row.device)  # a loaded count is on the CPU
        sizes = [t.numel() for t in self.tables]
        lr = torch.tensor(group["rates"], dtype=torch.float64).repeat_interleave(torch.tensor(sizes)).to(count.device)  # [N]
        scale = torch.cat([t.flatten() for t in self.tables])  # [N]
        grad = torch.cat([torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten() for t in self.tables])
        hit = torch.zeros_like(self.row).index_add_(0, self.row, (grad != 0).long())[self.row] > 0
        state["step"] = count = count + hit
        mean = state["exp_avg"].lerp(grad, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(grad, grad, value=1 - beta2)
        rate = (group["lr"] * lr / (1 - beta1 ** count.double())).float()
        new = scale - rate * mean / (square.sqrt() / (1 - beta2 ** count.double()).sqrt().float() + group["eps"])
        for kept, value in (("exp_avg", mean), ("exp_avg_sq", square)):
            state[kept] = torch.where(hit, value, state[kept])
        parts = torch.where(hit, new, scale).split(sizes)
        for table, part in zip(self.tables, parts, strict=True):
            table.data.copy_(part.view_as(table))

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for table in self.tables:
            table.grad = None
