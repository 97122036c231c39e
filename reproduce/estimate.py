"""A dry run: what each cell of a plan is, would take and would lack, without weights and without running anything.

Operations are counted on the model's architecture (meta device, no memory): the original's config at `paper` scale, the embedded
or given folder's otherwise. Hours and memory follow from them and from the constants below, which are assumptions: see `ABOUT`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from questlib.diffusion.unets import FixedHeadsUNet2DModel
from reproduce.datasets import DATASETS, Dataset, Setting
from reproduce.models.compvis import config_names, load_config
from reproduce.models.compvis_parts import unet_part
from reproduce.models.loading import MINI
from reproduce.plan import Plan
from reproduce.reporting.report import sampling_words
from reproduce.tables.base import Cell

RATE = {
    "smoke": 0.3e12,
    "mini": 0.3e12,
    "paper": 40e12,
}  # operations a second: two CPU cores; one GPU of A100 class
SIMULATED = 2.0  # time of simulated quantization over full precision
KEPT = 5.0  # what simulated quantization keeps for the backward pass, over what the plain model keeps (mini-ldm4: 5)
TRAINED = 0.07  # share of the weights that finetuning trains (the paper: under 7% of LDM-4's)
ABOUT = f"""Estimates, not measurements; each cell by itself (cells share calibration, AdaRound and full-precision samples).
Operations: of the UNet alone, two a multiply-add, counted on its architecture; a backward pass is two forward passes.
Hours: operations / {RATE["paper"] / 1e12:g}e12 a second for one GPU of A100 class, {RATE["mini"] / 1e12:g}e12 for two CPU cores (smoke, mini); {SIMULATED:g} times as long in
  simulated quantization. Without autoencoder, range search and metrics.
Memory: float32 weights three times (teacher, student, its rounded weights), gradients and Adam's moments of {TRAINED:.0%} of them (full finetuning: all), and
  {KEPT:g} times the activations that the plain model keeps for a backward pass of one batch (under gradient checkpointing: of its
  largest block, and all blocks' inputs)."""  # noqa: E501
# google/ddpm-cifar10-32, unet/config.json: the DDPM of Ho et al. 2020 (35.7 M weights)
CIFAR = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    attention_head_dim=None,
    flip_sin_to_cos=False,
    freq_shift=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    downsample_padding=0,
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
CONTEXT_TOKENS = {"sd": 77}  # of a prompt; a class label is one
UNETS = (UNet2DModel, UNet2DConditionModel, FixedHeadsUNet2DModel)


@dataclass(frozen=True)
class Architecture:
    """Of one UNet and one input."""

    weight_bytes: int  # float32
    operations: int  # of one evaluation
    kept_bytes: int  # for the backward pass
    largest_kept_bytes: int  # of that, in the block (residual or attention) that keeps most
    boundary_bytes: int  # under gradient checkpointing, between the blocks


@dataclass(frozen=True)
class Estimate:
    samples: int
    evaluations: int  # of the UNet, to sample
    hours: dict[str, float]  # by stage
    memory_bytes: float


def unet_of(dataset: Dataset, setting: Setting) -> nn.Module | None:
    """The UNet on the meta device: the folder's, else the original's; None: of an embedded model that does not exist."""
    folder = next(
        (
            p
            for p in (MINI / (setting.model or ""), Path(setting.model or ""))
            if (p / "unet/config.json").is_file()
        ),
        None,
    )
    if folder is not None:
        config = json.loads((folder / "unet/config.json").read_text())
        kind = {c.__name__: c for c in UNETS}[config["_class_name"]]
        with torch.device("meta"):
            return kind.from_config(config)
    if setting.model in {s.model for s in dataset.settings.values()} - {None}:
        return None
    if dataset.config in config_names():
        params = load_config(dataset.config)
        return unet_part(params["unet_config"]["params"], params["image_size"]).model.to("meta")
    with torch.device("meta"):
        return UNet2DModel(**CIFAR)


def measure(unet: nn.Module, context_tokens: int = 1) -> Architecture:
    """Count one evaluation at batch 1 with shapes alone."""
    config, kept = unet.config, []
    x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    given = {}
    if isinstance(unet, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.empty(
            1, context_tokens, config.cross_attention_dim, device="meta"
        )
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}

    def forward() -> None:
        kept.clear()
        with saved_tensors_hooks(lambda v: (kept.append(v), v)[1], lambda v: v):
            unet(x, torch.empty(1, dtype=torch.int64, device="meta"), **given)

    def size(tensors: list[torch.Tensor]) -> int:
        storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in tensors}
        return sum(n for key, n in storages.items() if key not in weights)

    blocks, starts = [0], {}
    handles = []
    for m in unet.modules():
        if isinstance(m, (ResnetBlock2D, Attention, Transformer2DModel)):
            handles.append(
                m.register_forward_pre_hook(lambda m, a: starts.__setitem__(m, len(kept)))
            )
            handles.append(
                m.register_forward_hook(lambda m, a, out: blocks.append(size(kept[starts[m] :])))
            )
    with FlopCounterMode(display=False) as counter:
        forward()
    total = size(kept)
    for handle in handles:
        handle.remove()
    unet.enable_gradient_checkpointing()
    forward()
    return Architecture(
        weight_bytes=sum(4 * p.numel() for p in unet.parameters()),
        operations=counter.get_total_flops(),
        kept_bytes=total,
        largest_kept_bytes=max(blocks),
        boundary_bytes=size(kept),
    )


@cache
def _architecture(dataset: str, scale: str, model: str | None) -> Architecture | None:
    setting = DATASETS[dataset].setting(scale, model)
    unet = unet_of(DATASETS[dataset], setting)
    return None if unet is None else measure(unet, CONTEXT_TOKENS.get(dataset, 1))


def estimate(cell: Cell, plan: Plan) -> Estimate | None:
    """What the cell would take; None when its architecture is not known (see `unet_of`)."""
    setting = plan.setting(cell)
    model = _architecture(cell.dataset, plan.scale.name, setting.model)
    if model is None:
        return None
    seeds = len(plan.seeds)
    samples = setting.samples_per_seed * seeds
    evaluations = samples * plan.drawing(cell).evaluations
    passes = {
        "sample": evaluations * (1.0 if cell.preset is None else SIMULATED)
    }  # forward passes of one input
    memory = model.weight_bytes + setting.sample_batch * model.largest_kept_bytes
    if cell.preset is not None:
        c = plan.config(cell, plan.seeds[0])
        student = 3 * SIMULATED  # forward and backward
        passes["calibrate"] = seeds * setting.calib_samples * setting.evaluations
        rows = seeds * min(c.batch_size, c.adaround.samples)
        passes["reconstruct"] = (
            student
            * rows
            * (c.adaround.enabled * c.adaround.iters + c.act_recon.enabled * c.act_recon.iters)
        )
        again = (
            SIMULATED if c.save_memory else 0.0
        )  # gradient checkpointing computes the forward pass again
        tla, cma = (
            (c.te == "finetune") * c.finetuning.tla_iters,
            (c.finetuning.cma_layers != "none") * c.finetuning.cma_iters,
        )
        teacher = float(c.finetuning.local_loss and c.finetuning.cma_local_loss)
        passes["finetune"] = (
            seeds * c.batch_size * (tla * (student + again) + cma * (student + again + teacher))
        )
        kept = (
            model.largest_kept_bytes * KEPT + model.boundary_bytes
            if c.save_memory
            else model.kept_bytes * KEPT
        )
        forward = c.forward_batch * model.largest_kept_bytes
        batch = c.batch_size * (kept if tla + cma else model.largest_kept_bytes * KEPT)
        share = 1.0 if c.finetuning.cma_layers == "all" and not c.finetuning.lora_rank else TRAINED
        trained = 3 * share * model.weight_bytes if tla + cma else 0
        memory = (
            3 * model.weight_bytes
            + trained
            + max(batch, forward, setting.sample_batch * model.largest_kept_bytes)
        )
    hours = {
        stage: n * model.operations / RATE[plan.scale.name] / 3600 for stage, n in passes.items()
    }
    return Estimate(samples, evaluations, hours, memory)


def command(cell: Cell, plan: Plan) -> str:
    """What to type for this cell alone; what is not given stands as the environment variable that can hold it."""
    dataset, own = DATASETS[cell.dataset], DATASETS[cell.dataset].settings[plan.scale.name]
    words = [
        "python",
        "-m",
        "reproduce",
        plan.table.name,
        "--scale",
        plan.scale.name,
        "--cells",
        cell.id,
    ]
    words += ["--seeds", ",".join(map(str, plan.seeds))] if plan.seeds != plan.scale.seeds else []
    words += ["--features", plan.features] if plan.features else []
    words += ["--engine", plan.engine] if plan.engine != "fake" else []
    text = shlex.join(words)
    for option, given, standing, env, used in (
        ("--model", plan.model, own.model, dataset.model_env, True),
        (
            "--reference",
            plan.reference,
            own.reference,
            dataset.reference_env,
            dataset.has_reference,
        ),
        ("--captions", plan.captions, own.captions, dataset.captions_env, dataset.has_captions),
    ):
        if given is not None:
            text += f" {option} {shlex.quote(given)}"
        elif standing is None and used:
            text += f' {option} "${env}"'
    return text


def lines(cell: Cell, plan: Plan) -> list[str]:
    """The cell in words, one fact a line."""
    setting, found = plan.setting(cell), estimate(cell, plan)
    how = sampling_words(vars(plan.drawing(cell)))
    stand_in = "" if plan.scale.name == "paper" else f"{setting.model} for "
    preset = "full precision" if cell.preset is None else f"preset {cell.preset}"
    text = [
        f"{cell.id}: {cell.label}, {cell.bits}, {preset}",
        f"  {command(cell, plan)}",
        f"  {stand_in}{DATASETS[cell.dataset].title}: {how}; {setting.samples_per_seed} samples for each of seeds "
        f"{', '.join(map(str, plan.seeds))}",
        "  paper: "
        + (
            ", ".join(f"{k} {'not reported' if v is None else v}" for k, v in cell.paper.items())
            or "no such row"
        ),
    ]
    if cell.independent:
        again = (
            f"{source} " + ", ".join(f"{k} {v}" for k, v in values.items())
            for source, values in cell.independent.items()
        )
        text.append("  independent: " + "; ".join(again))
    if found is None:
        text.append("  estimate: none")
    else:
        stages = " + ".join(f"{stage} {h:.2g}" for stage, h in found.hours.items() if h)
        unit = "GPU hours" if plan.scale.name == "paper" else "hours"
        total = f"{sum(found.hours.values()):.2g} {unit} ({stages})"
        counts = f"{found.samples:,} samples, {found.evaluations:,} UNet evaluations"
        text.append(f"  estimate: {counts}; {total}; {found.memory_bytes / 1e9:.1f} GB")
    return text + [f"  not run: {reason}" for reason in [plan.missing(cell)] if reason is not None]


def dry_run(plan: Plan) -> str:
    """Every cell of the plan."""
    return "\n".join(
        [plan.table.title, ABOUT, ""] + [line for cell in plan.cells for line in lines(cell, plan)]
    )
