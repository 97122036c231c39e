"""GPU memory of finetuning full-size models, counted without a GPU: a step on fake tensors, which have sizes but no values.

    python benchmarks/finetune_memory.py [--models sd14,ldm4-imagenet] [--batches 4]

Counted is every tensor that lives: teacher, student, quantized weights, activations, gradients (the peak over one step of stage
CMA, forward and backward, float32), and Adam's two moments of what is trained. The teacher's targets are counted too, though
`save_memory` keeps them off the GPU. What a GPU adds, its context and fragmentation, is not counted: allow a tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from cpu_unet import TIMESTEPS  # noqa: E402
from full_size import MODELS  # noqa: E402

from questlib.calibration import Batch  # noqa: E402
from questlib.config import QuantConfig  # noqa: E402
from questlib.finetuning.loop import settle  # noqa: E402
from questlib.finetuning.losses import losses
from questlib.finetuning.stages import stages, trainable  # noqa: E402
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.preparation import prepare
from reproduce.provenance import provenance  # noqa: E402

RESULT = Path(__file__).parent / "results" / "finetune_memory.json"


class Living(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
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
                if value is not None:
                    with mode:
                        fake = torch.empty(value.shape, dtype=value.dtype)
                    living.add(fake)
                    grad = value.requires_grad
                    table[name] = (
                        nn.Parameter(fake, requires_grad=grad)
                        if table is owner._parameters
                        else fake
                    )


def count(model: str, batch_size: int, save_memory: bool) -> int:
    """Bytes of one finetuning step."""
    settings, _, shape, _ = MODELS[model]
    config = QuantConfig.preset("quest", 4, 4, weight_range="minmax", save_memory=save_memory)
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**settings)
    teacher = (
        teacher.to_empty(device="cpu").eval().requires_grad_(False)
    )  # never touched, so it takes no memory
    student, mode, living = prepare(teacher, config, TIMESTEPS), FakeTensorMode(), Living()
    stage = stages(student, config)[-1]
    trained = [p for group in trainable(student, stage, config) for p in group["params"]]
    moments = 2 * 4 * sum(p.numel() for p in trained)
    student.quest_hook.remove()  # the step group: looked up in values, which fake tensors lack
    for quantizer in act_quantizers(student):
        quantizer._ready = True
    without_values(teacher, mode, living), without_values(student, mode, living)
    if save_memory:
        student.enable_gradient_checkpointing()
    with mode, living:
        selected = {id(layer) for layer in stage.layers.values()}
        others = [layer for layer in quant_layers(student).values() if id(layer) not in selected]
        for layer in others:
            layer.freeze()
            settle([layer] if save_memory else [])  # at once: the peak to be counted is the step's
        channels, size = settings.get("in_channels", 4), settings["sample_size"]
        x, context = (torch.empty(batch_size, *s) for s in ((channels, size, size), shape))
        t = torch.zeros(batch_size, dtype=torch.int64)
        local, total = losses(student, teacher, stage, config, Batch(x, t, x, context), t, {})
        (local + config.finetuning.global_weight * total).backward()
    return living.peak + moments


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python benchmarks/finetune_memory.py",
        "models": found,
        "provenance": provenance(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
