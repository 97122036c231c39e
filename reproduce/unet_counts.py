"""Operations and activations of a denoiser, counted on its architecture (on the meta device)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from questlib.denoisers import PARTS, takes_labels
from questlib.diffusion.unets import FixedHeadsUNet2DModel
from reproduce.datasets import DATASETS, Dataset, Setting
from reproduce.models.compvis_components import unet_component
from reproduce.models.compvis_files import config_names, load_config
from reproduce.models.embedded import MINI

# google/ddpm-cifar10-32, unet/config.json: the DDPM of Ho et al. 2020 (35.7 M weights)
CIFAR: dict[str, Any] = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    attention_head_dim=None,
    flip_sin_to_cos=False,
    freq_shift=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    downsample_padding=0,
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
# facebook/DiT-XL-2-256, transformer/config.json (675 M weights)
DIT: dict[str, Any] = dict(out_channels=8, num_layers=28, sample_size=32)
CONTEXT_TOKENS = {"sd": 77}  # of a prompt; a class label is one
CLASSES = (UNet2DModel, UNet2DConditionModel, FixedHeadsUNet2DModel, DiTTransformer2DModel)


BLOCKS = (ResnetBlock2D, Attention, Transformer2DModel, BasicTransformerBlock)


@dataclass(frozen=True)
class UNetCounts:
    """Counts of one denoiser on one input."""

    weight_bytes: int
    """In float32."""

    operations: int
    """Of one evaluation."""

    kept_bytes: int
    """Activations that are kept for the backward pass."""

    largest_kept_bytes: int
    """Of these, those of the block (residual or attention) that keeps most."""

    boundary_bytes: int
    """Activations that are kept between the blocks under gradient checkpointing."""


def unet_of(dataset: Dataset, setting: Setting) -> nn.Module | None:
    """The denoiser of a model's folder, else of the data set's, on the meta device.

    Returns:
        None for an embedded model that does not exist.
    """
    places = (MINI / (setting.model or ""), Path(setting.model or ""))
    files = (place / part / "config.json" for place in places for part in PARTS)
    found = next((file for file in files if file.is_file()), None)
    if found is not None:
        config = json.loads(found.read_text(encoding="utf-8"))
        kind = {c.__name__: c for c in CLASSES}[config["_class_name"]]
        with torch.device("meta"):
            return kind.from_config(config)
    if setting.model in {s.model for s in dataset.settings.values()} - {None}:
        return None
    if dataset.config in config_names():
        params = load_config(dataset.config)
        component = unet_component(params["unet_config"]["params"], params["image_size"])
        return component.model.to("meta")
    with torch.device("meta"):
        return DiTTransformer2DModel(**DIT) if dataset.name == "dit" else UNet2DModel(**CIFAR)


class _KeptTensors:
    """Counts what a forward pass keeps for the backward pass, beside the weights."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.tensors: list[torch.Tensor] = []
        self.blocks = [0]  # bytes of each block
        self._weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        self._starts: dict[nn.Module, int] = {}

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor

    def run(self, *inputs: torch.Tensor, **given: torch.Tensor) -> None:
        """One forward pass."""
        self.tensors.clear()
        with saved_tensors_hooks(self._keep, lambda tensor: tensor):
            self.unet(*inputs, **given)

    def bytes(self, start: int = 0) -> int:
        """Of the tensors from index `start` on, each storage once."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in self.tensors[start:]}
        return sum(s.nbytes() for key, s in storages.items() if key not in self._weights)

    def _enter(self, block: nn.Module, inputs: Any) -> None:
        self._starts[block] = len(self.tensors)

    def _leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.blocks.append(self.bytes(self._starts[block]))

    def watch_blocks(self) -> list[Any]:
        """Count each block by itself; the handles end it."""
        handles = []
        for block in self.unet.modules():
            if isinstance(block, BLOCKS):
                handles.append(block.register_forward_pre_hook(self._enter))
                handles.append(block.register_forward_hook(self._leave))
        return handles


def measure(unet: Any, context_tokens: int = 1) -> UNetCounts:
    """Count one evaluation at batch 1 by shapes alone."""
    config = unet.config
    x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    t = torch.empty(1, dtype=torch.int64, device="meta")
    given = {}
    if isinstance(unet, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.empty(
            1, context_tokens, config.cross_attention_dim, device="meta"
        )
    elif takes_labels(unet):
        given["class_labels"] = torch.empty(1, dtype=torch.int64, device="meta")
    kept = _KeptTensors(unet)
    handles = kept.watch_blocks()
    with FlopCounterMode(display=False) as counter:
        kept.run(x, t, **given)
    total = kept.bytes()
    for handle in handles:
        handle.remove()
    unet.enable_gradient_checkpointing()
    kept.run(x, t, **given)
    return UNetCounts(
        weight_bytes=sum(4 * p.numel() for p in unet.parameters()),
        operations=counter.get_total_flops(),
        kept_bytes=total,
        largest_kept_bytes=max(kept.blocks),
        boundary_bytes=kept.bytes(),
    )


@cache
def model_counts(dataset: str, scale: str, model: str | None) -> UNetCounts | None:
    """Counts of a data set's model; None for an embedded model that does not exist."""
    setting = DATASETS[dataset].setting(scale, model)
    unet = unet_of(DATASETS[dataset], setting)
    return None if unet is None else measure(unet, CONTEXT_TOKENS.get(dataset, 1))
