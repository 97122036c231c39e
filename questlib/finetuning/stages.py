"""The stages of QuEST's finetuning (paper, Sec. 3.3): the layers that each selects, what of them is trained, and Adam over it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from questlib.config import OFF, QuantConfig
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.roles import TIME_ROLES

CMA_ROLES = {
    "attention": (
        "qkv",
        "context_kv",
        "attn_out",
        "feed_forward",
    ),  # the paper: all attention-related layers
    "qkv": ("qkv", "context_kv"),  # the release on LSUN
    "no_context": (
        "qkv",
        "feed_forward",
    ),  # the release on ImageNet: feed-forward, to_q, self-attention's to_k and to_v
    "feed_forward": ("feed_forward",),  # the release on Stable Diffusion
    "none": (),
}  # "all": every layer


@dataclass
class Stage:
    name: str  # "tla" | "cma"
    iters: int
    layers: dict[
        str, QuantLayer
    ]  # whose weights are trained and whose outputs the local loss compares
    local: bool
    lr_scale: float
    rank: int = 0  # of low-rank updates in place of the weights


def stages(unet: nn.Module, config: QuantConfig) -> list[Stage]:
    """The stages that `config` asks for, with the layers of this UNet that each selects."""
    layers = quant_layers(unet)
    te_roles = {"all": TIME_ROLES, "projections": ("time_proj",)}[config.finetuning.te_layers]
    found = []
    if config.te == "finetune" and config.finetuning.tla_iters:
        te = {n: m for n, m in layers.items() if m.role in te_roles}
        lr = (
            config.finetuning.lr_scale
            if config.finetuning.lr_scale_tla is None
            else config.finetuning.lr_scale_tla
        )
        found.append(
            Stage("tla", config.finetuning.tla_iters, te, config.finetuning.local_loss, lr)
        )
    if config.finetuning.cma_iters and config.finetuning.cma_layers != "none":
        cma = {
            n: m
            for n, m in layers.items()
            if config.finetuning.cma_layers == "all"
            or m.role in CMA_ROLES[config.finetuning.cma_layers]
        }
        found.append(
            Stage(
                "cma",
                config.finetuning.cma_iters,
                cma,
                config.finetuning.local_loss and config.finetuning.cma_local_loss,
                config.finetuning.lr_scale,
                config.finetuning.lora_rank,
            )
        )
    return found


def trainable(unet: nn.Module, stage: Stage, config: QuantConfig) -> list[dict]:
    """Adam's parameter groups: the stage's weights, then every activation scale; gradients are switched on for just these."""
    unet.requires_grad_(False)
    groups = []
    for layer in stage.layers.values():
        layer.thaw()
        if parametrize.is_parametrized(
            layer, "weight"
        ):  # in units of the quantization step already
            update = layer.parametrizations.weight[0].requires_grad_(True)
            groups.append(
                {
                    "params": list(update.parameters()),
                    "lr": config.finetuning.lr_weight,
                    "positive": False,
                }
            )
            continue
        layer.weight.requires_grad_(True)
        unit = (
            layer.weight_quantizer.scale.mean().item()
            if config.finetuning.lr_relative and layer.weight_quantizer is not None
            else 1.0
        )
        groups.append(
            {"params": [layer.weight], "lr": config.finetuning.lr_weight * unit, "positive": False}
        )
    frozen_te = (
        config.finetuning.te_layers == "projections"
    )  # the release never trains the scales of the two time_embed layers
    skip = {
        id(m.input_quantizer)
        for m in quant_layers(unet).values()
        if frozen_te and m.role == "time_embed"
    }
    for q in act_quantizers(unet):
        if q.enabled and q.bits != OFF and id(q) not in skip:
            q.scale.requires_grad_(True)
            unit = q.scale.detach().mean().item() if config.finetuning.lr_relative else 1.0
            groups.append({"params": [q.scale], "lr": stage.lr_scale * unit, "positive": True})
    return groups
