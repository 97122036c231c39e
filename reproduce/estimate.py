"""A dry run: what each row of a plan is, would take and lacks. No weights are needed, nothing runs.

Hours and memory follow from counts on the model's architecture and from the constants below, which
are assumptions (`ABOUT`).
"""

from __future__ import annotations

from dataclasses import dataclass

from questlib.config import QuantConfig
from reproduce.datasets import DATASETS
from reproduce.plan import Plan
from reproduce.tables.base import Row
from reproduce.unet_counts import UNetCounts, model_counts

# Operations a second: two CPU cores; one GPU of A100 class.
RATE = {
    "smoke": 0.3e12,
    "mini": 0.3e12,
    "full": 0.3e12,
    "paper": 40e12,
}
SIMULATED = 2.0  # time of simulated quantization over full precision
TRAINED = 0.07  # share of the weights that finetuning trains (the paper: under 7% of LDM-4's)
# What simulated quantization keeps for the backward pass, over what the plain model keeps
# (measured on mini-ldm4).
KEPT = 5.0
ABOUT = f"""\
Estimates, not measurements; each row by itself (rows share calibration, AdaRound and
  full-precision samples).
Operations: of the UNet alone, two a multiply-add, counted on its architecture; a backward pass is
  two forward passes.
Hours: operations / {RATE["paper"] / 1e12:g}e12 a second for one GPU of A100 class, \
{RATE["mini"] / 1e12:g}e12 for two CPU cores (the other scales);
  {SIMULATED:g} times as long in simulated quantization. Without autoencoder, range search and
  metrics.
Memory: float32 weights three times (teacher, student, its rounded weights), gradients and Adam's
  moments of {TRAINED:.0%} of them (full finetuning: all), and {KEPT:g} times the activations that
  the plain model keeps for a backward pass of one batch (under gradient checkpointing: of its
  largest block, and all blocks' inputs)."""


@dataclass(frozen=True)
class Estimate:
    """What a row would take."""

    samples: int
    evaluations: int
    """Of the UNet, to sample."""

    hours: dict[str, float]
    """By stage."""

    memory_bytes: float


def estimate(row: Row, plan: Plan) -> Estimate | None:
    """What the row would take; None when its architecture is not known."""
    setting = plan.setting(row)
    model = model_counts(row.dataset, plan.scale.name, setting.model)
    if model is None:
        return None
    samples = setting.samples_per_seed * len(plan.seeds)
    evaluations = samples * plan.drawing(row).evaluations
    sampling_memory = setting.sample_batch * model.largest_kept_bytes
    passes = {"sample": evaluations * (1.0 if row.full_precision else SIMULATED)}
    memory = float(model.weight_bytes + sampling_memory)
    if not row.full_precision:
        config = plan.config(row, plan.seeds[0])
        calibration = setting.calib_samples * setting.evaluations
        own = {"calibrate": float(calibration)} | _quantizing_passes(config)
        passes |= {stage: len(plan.seeds) * n for stage, n in own.items()}
        memory = _quantizing_memory(config, model, sampling_memory)
    seconds_a_pass = model.operations / RATE[plan.scale.name]
    hours = {stage: n * seconds_a_pass / 3600 for stage, n in passes.items()}
    return Estimate(samples, evaluations, hours, memory)


def _quantizing_passes(config: QuantConfig) -> dict[str, float]:
    """Forward passes of one input by stage, for one seed; what else is run is told in them."""
    adaround = config.adaround.iters if config.adaround.enabled else 0
    scales = config.act_recon.iters if config.act_recon.enabled else 0
    student = 3 * SIMULATED  # forward and backward
    # Gradient checkpointing computes the forward pass again.
    again = SIMULATED if config.save_memory else 0.0
    choices = config.finetuning
    tla = choices.tla_iters if config.te == "finetune" else 0
    tla_inputs = tla * (choices.tla_batch_size or config.batch_size)
    cma_inputs = (config.iterations - tla) * (choices.cma_batch_size or config.batch_size)
    teacher = float(choices.local_loss and choices.cma_local_loss)
    samples = config.adaround.samples
    rounding = adaround * min(config.adaround.batch_size, samples)
    return {
        "reconstruct": student * (rounding + scales * min(config.batch_size, samples)),
        "finetune": (tla_inputs + cma_inputs) * (student + again) + cma_inputs * teacher,
    }


def _quantizing_memory(config: QuantConfig, model: UNetCounts, sampling: float) -> float:
    """Bytes of the stage that needs most."""
    block = model.largest_kept_bytes * KEPT
    if not config.finetunes:
        kept = block
    elif config.save_memory:
        kept = block + model.boundary_bytes
    else:
        kept = model.kept_bytes * KEPT
    trains_all = config.finetuning.cma_layers == "all" and not config.finetuning.lora_rank
    share = 0.0 if not config.finetunes else 1.0 if trains_all else TRAINED
    forward = config.forward_batch * model.largest_kept_bytes
    weights = 3 * model.weight_bytes  # and gradients and moments of those that are trained
    return (
        weights + 3 * share * model.weight_bytes + max(config.batch_size * kept, forward, sampling)
    )


# ---- in words ----


def command(row: Row, plan: Plan) -> str:
    """What to type for this row alone.

    A file that is needed and was not given stands as the environment variable that can hold it.
    """
    dataset = DATASETS[row.dataset]
    own = dataset.settings[plan.scale.name]
    chosen = plan.choices
    text = plan.choose(rows=(row.id,)).command
    for option, given, variable, used in (
        ("--model", chosen.model or own.model, dataset.model_env, True),
        (
            "--reference",
            chosen.reference or own.reference,
            dataset.reference_env,
            dataset.has_reference,
        ),
        (
            "--captions",
            chosen.captions or own.captions,
            dataset.captions_env,
            dataset.has_captions,
        ),
    ):
        if given is None and used:
            text += f' {option} "${variable}"'
    return text


def _papers_words(row: Row) -> str:
    """The paper's numbers."""
    numbers = (f"{k} {'not reported' if v is None else v}" for k, v in row.paper.items())
    return ", ".join(numbers) or "no such row"


def _independent_words(row: Row) -> str:
    """Numbers of independent runs."""
    return "; ".join(
        f"{source} " + ", ".join(f"{k} {v}" for k, v in values.items())
        for source, values in row.independent.items()
    )


def _estimate_words(found: Estimate | None, unit: str) -> str:
    """Counts, hours and memory."""
    if found is None:
        return "none"
    stages = " + ".join(f"{stage} {h:.2g}" for stage, h in found.hours.items() if h)
    total = f"{sum(found.hours.values()):.2g} {unit} ({stages})"
    counts = f"{found.samples:,} samples, {found.evaluations:,} UNet evaluations"
    return f"{counts}; {total}; {found.memory_bytes / 1e9:.1f} GB"


def lines(row: Row, plan: Plan) -> list[str]:
    """The row in words, one fact a line."""
    setting = plan.setting(row)
    at_paper = plan.scale.name == "paper"
    stand_in = "" if at_paper else f"{setting.model} for "
    preset = "full precision" if row.full_precision else f"preset {row.preset}"
    how = plan.drawing(row).sampling
    seeds = ", ".join(map(str, plan.seeds))
    text = [
        f"{row.id}: {row.label}, {row.bits}, {preset}",
        f"  {command(row, plan)}",
        f"  {stand_in}{DATASETS[row.dataset].title}: {how}; "
        f"{setting.samples_per_seed} samples for each of seeds {seeds}",
        f"  paper: {_papers_words(row)}",
    ]
    if row.independent:
        text.append(f"  independent: {_independent_words(row)}")
    unit = "GPU hours" if at_paper else "hours"
    text.append(f"  estimate: {_estimate_words(estimate(row, plan), unit)}")
    reason = plan.missing(row)
    return text if reason is None else [*text, f"  not run: {reason}"]


def dry_run(plan: Plan) -> str:
    """Every row of the plan in words."""
    rows = [line for row in plan.rows for line in lines(row, plan)]
    return "\n".join([plan.table.title, ABOUT, "", *rows])
