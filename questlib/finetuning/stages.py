"""The stages of QuEST's finetuning (paper, Sec. 3.3): which layers each selects and trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import nn
from torch.nn.utils import parametrize

from questlib.config import OFF, QuantConfig
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.roles import TIME_ROLES

# Roles that `finetuning.te_layers` selects.
TE_ROLES: dict[str, tuple[str, ...]] = {
    "all": TIME_ROLES,  # the paper
    "projections": ("time_proj",),  # the release
}

# Roles that `finetuning.cma_layers` selects; "all" selects every layer.
CMA_ROLES: dict[str, tuple[str, ...]] = {
    # the paper: all attention-related layers
    "attention": ("qkv", "context_kv", "attn_out", "feed_forward"),
    # the release on LSUN
    "qkv": ("qkv", "context_kv"),
    # the release on ImageNet: feed-forward, to_q, and to_k and to_v of self-attention
    "no_context": ("qkv", "feed_forward"),
    # the release on Stable Diffusion
    "feed_forward": ("feed_forward",),
    "none": (),
}


@dataclass
class Stage:
    """One stage: TLA for the time-embedding layers, CMA for the attention-related ones."""

    name: Literal["tla", "cma"]
    iters: int
    layers: dict[str, QuantLayer]
    """Selected layers by name: their weights are trained, and the local loss compares their
    outputs."""
    local: bool
    """Whether the stage has its local loss, L_TLA or L_CMA, beside L_G."""
    lr_scale: float
    """Learning rate of the activation scales."""
    batch_size: int
    """Calls of the UNet in one iteration."""
    samples: int | None
    """Trajectories that are drawn from; None: all."""
    order: Literal["joint", "sequential", "rounds"]
    """Order of the steps, see `FinetuningConfig.tla_order` and `cma_order`."""
    rank: int = 0
    """Rank of low-rank updates that are trained in place of the weights; 0: the weights."""


class ParameterGroup(TypedDict):
    """A parameter group of `StageAdam`."""

    params: list[nn.Parameter]
    lr: float
    positive: bool
    """Whether this is a table of activation scales [G, P], which must stay positive."""


def select_stages(unet: nn.Module, config: QuantConfig) -> list[Stage]:
    """The stages that `config` asks for, with the layers of this UNet that each selects."""
    layers = quant_layers(unet)
    choices = config.finetuning
    found = []
    if config.te == "finetune" and choices.tla_iters:
        roles = TE_ROLES[choices.te_layers]
        lr = choices.lr_scale if choices.lr_scale_tla is None else choices.lr_scale_tla
        found.append(
            Stage(
                name="tla",
                iters=choices.tla_iters,
                layers={name: layer for name, layer in layers.items() if layer.role in roles},
                local=choices.local_loss,
                lr_scale=lr,
                batch_size=choices.tla_batch_size or config.batch_size,
                samples=choices.tla_samples,
                order=choices.tla_order,
            )
        )
    if choices.cma_iters and choices.cma_layers != "none":
        if choices.cma_layers != "all":
            roles = CMA_ROLES[choices.cma_layers]
            layers = {name: layer for name, layer in layers.items() if layer.role in roles}
        found.append(
            Stage(
                name="cma",
                iters=choices.cma_iters,
                layers=layers,
                local=choices.local_loss and choices.cma_local_loss,
                lr_scale=choices.lr_scale,
                batch_size=choices.cma_batch_size or config.batch_size,
                samples=choices.cma_samples,
                order=choices.cma_order,
                rank=choices.lora_rank,
            )
        )
    return found


def select_parameters(unet: nn.Module, stage: Stage, config: QuantConfig) -> list[ParameterGroup]:
    """Switch on the gradients of what a stage trains, and of nothing else.

    Trained are the weights of the stage's layers (or their low-rank updates) and the scales of all
    activations, which the stages share (paper, Sec. 3.3). `FinetuningConfig.train_biases` and
    `scale_layers` say what the release does instead.

    Returns:
        A group for each layer's weight, with its bias if that is trained, then one for each table
        of activation scales. Under `lr_relative` each has a learning rate in units of its own
        quantization step.
    """
    unet.requires_grad_(False)
    weights = [_weight_group(layer, config) for layer in stage.layers.values()]
    scales = [
        _scale_group(quantizer.scale, stage.lr_scale, config)
        for quantizer in _trained_quantizers(unet, stage, config)
        if quantizer.enabled and quantizer.bits != OFF
    ]
    return weights + scales


def _trained_quantizers(
    unet: nn.Module, stage: Stage, config: QuantConfig
) -> Iterator[ActQuantizer]:
    """The activation quantizers whose scales a stage trains, in the order of the model's modules.

    Own (release): TLA has those of its own layers, CMA those outside of the time path.
    """
    if config.finetuning.scale_layers == "all":
        return act_quantizers(unet)
    own = {layer.input_quantizer for layer in stage.layers.values()}
    if stage.name == "tla":
        return (quantizer for quantizer in act_quantizers(unet) if quantizer in own)
    layers = quant_layers(unet).values()
    time_path = {layer.input_quantizer for layer in layers if layer.role in TIME_ROLES}
    return (quantizer for quantizer in act_quantizers(unet) if quantizer not in time_path)


def _weight_group(layer: QuantLayer, config: QuantConfig) -> ParameterGroup:
    layer.thaw()
    lr = config.finetuning.lr_weight
    if parametrize.is_parametrized(layer, "weight"):
        # A low-rank update: it is in units of the quantization step already.
        update = layer.parametrizations.weight[0].requires_grad_(True)
        return {"params": list(update.parameters()), "lr": lr, "positive": False}
    trained = [layer.weight.requires_grad_(True)]
    if config.finetuning.train_biases and layer.bias is not None:
        trained.append(layer.bias.requires_grad_(True))
    if config.finetuning.lr_relative and layer.weight_quantizer is not None:
        lr = lr * layer.weight_quantizer.scale.mean().item()
    return {"params": trained, "lr": lr, "positive": False}


def _scale_group(scale: nn.Parameter, lr: float, config: QuantConfig) -> ParameterGroup:
    scale.requires_grad_(True)
    if config.finetuning.lr_relative:
        lr = lr * scale.detach().mean().item()
    return {"params": [scale], "lr": lr, "positive": True}
