"""GPU memory of finetuning full-size models, counted without a GPU.

    python benchmarks/finetune_memory.py [--models sd14,ldm4-imagenet] [--batches 4]

A step runs on fake tensors, which have sizes but no values. Every tensor that lives is counted:
teacher, student, quantized weights, activations, gradients (the peak over one step of stage CMA,
forward and backward, float32), and Adam's two moments of what is trained. The teacher's targets are
counted too, though `save_memory` keeps them off the GPU. What a GPU adds, its context and
fragmentation, is not counted: allow a tenth.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser_of, write_json
from cpu_unet import TIMESTEPS
from diffusers import UNet2DConditionModel
from full_size import MODELS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from questlib.calls import Batch
from questlib.config import QuantConfig
from questlib.finetuning.loop import release_full_weights
from questlib.finetuning.losses import stage_losses
from questlib.finetuning.stages import select_parameters, select_stages
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.preparation import prepare
from reproduce.provenance import provenance

RESULT = RESULTS / "finetune_memory.json"


class Living(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def without_values(module: nn.Module, mode: FakeTensorMode, living: Living) -> None:
    """Put fake tensors in the places of a module's own."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, value in table.items():
                if value is None:
                    continue
                with mode:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                living.add(fake)
                if table is owner._parameters:
                    fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                table[name] = fake


def count(model: str, batch_size: int, save_memory: bool) -> int:
    """Bytes of one finetuning step."""
    settings = MODELS[model].unet
    config = QuantConfig.preset("quest", 4, 4, weight_range="minmax", save_memory=save_memory)
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**settings)
    # Its weights are never touched, so that they take no memory.
    teacher = teacher.to_empty(device="cpu").eval().requires_grad_(False)
    student = prepare(teacher, config, TIMESTEPS)
    mode = FakeTensorMode()
    living = Living()
    stage = select_stages(student, config)[-1]
    trained = [p for group in select_parameters(student, stage, config) for p in group["params"]]
    moments = 2 * 4 * sum(p.numel() for p in trained)
    # The step group is looked up in values, which fake tensors lack.
    student.quest_hook.remove()
    for quantizer in act_quantizers(student):
        quantizer._ready = True
    without_values(teacher, mode, living)
    without_values(student, mode, living)
    if save_memory:
        student.enable_gradient_checkpointing()
    with mode, living:
        selected = {id(layer) for layer in stage.layers.values()}
        others = [layer for layer in quant_layers(student).values() if id(layer) not in selected]
        for layer in others:
            layer.freeze()
            # One at a time: the peak to be counted is the step's.
            release_full_weights([layer] if save_memory else [])
        size = settings["sample_size"]
        x = torch.empty(batch_size, settings.get("in_channels", 4), size, size)
        context = torch.empty(batch_size, *MODELS[model].context)
        t = torch.zeros(batch_size, dtype=torch.int64)
        batch = Batch.plain(x, t, x, context)
        local, total = stage_losses(student, teacher, stage, config, batch, None, {})
        (local + config.finetuning.global_weight * total).backward()
    return living.peak + moments


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="4", help="the release finetunes with 4")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for model in args.models.split(","):
        found[model] = [
            {"batch_size": batch, "save_memory": save, "bytes": count(model, batch, save)}
            for batch in map(int, args.batches.split(","))
            for save in (False, True)
        ]
        print(model, found[model], flush=True)
    result = {
        "command": "python benchmarks/finetune_memory.py",
        "models": found,
        "provenance": provenance(),
    }
    write_json(args.out, result)


if __name__ == "__main__":
    main()
