"""Ablation of `quest` at W4A4, which the paper does not have: what each of its parts does."""

from __future__ import annotations

from typing import Any

from reproduce.tables.base import Row, Table

GROUPS = 4  # step groups of the `quest` preset
EVERY_STEP = 1000  # step groups: as many as the sampler has steps
ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("one-group", "quest, one step group", "quest", dict(step_groups=1)),
    ("tensor", "quest, scales per tensor", "quest", dict(act_granularity="tensor")),
    (
        "channel",
        "quest, free scales per channel (no integer form)",
        "quest",
        dict(act_granularity="channel"),
    ),
    ("token", "quest, a grid a token", "quest", dict(act_granularity="token")),
    ("norm4", "quest, ranges by the fourth power of the error", "quest", dict(range_norm=4.0)),
    ("all-steps", "quest, scales for each step", "quest", dict(step_groups=EVERY_STEP)),
    ("all-layers", "quest, all layers finetuned", "quest", dict(cma_layers="all")),
    ("cma-global", "quest, CMA on the global loss alone", "quest", dict(cma_local_loss=False)),
    ("global", "quest, TLA and CMA on the global loss alone", "quest", dict(local_loss=False)),
    ("global-2", "quest, global loss at the paper's weight, 2", "quest", dict(global_weight=2.0)),
    ("bf16-targets", "quest, targets of CMA in bfloat16", "quest", dict(teacher_autocast=True)),
    ("long", "quest, 600 iterations of CMA", "quest", dict(cma_iters=600)),
    ("softmax-16", "quest, softmax not quantized", "quest", dict(softmax_bits=16)),
    ("softmax-4", "quest, softmax at 4 bits", "quest", dict(softmax_bits=4)),
    (
        "first-last-4",
        "quest, inputs of the first and last layer at 4 bits",
        "quest",
        dict(first_last_act_bits=4),
    ),
    ("calib-16", "quest, ranges from 16 samples a step group", "quest", dict(calib_batch=16)),
    ("not-finetuned", "quest, not finetuned", "quest", dict(tla_iters=0, cma_iters=0)),
    (
        "norm4-not-finetuned",
        "quest, not finetuned, ranges by the fourth power",
        "quest",
        dict(tla_iters=0, cma_iters=0, range_norm=4.0),
    ),
    ("nearest", "quest, weights rounded to nearest", "quest", dict(adaround=False)),
    ("q-diffusion", "Q-Diffusion", "q-diffusion", {}),
    (
        "q-diffusion-groups",
        f"Q-Diffusion, {GROUPS} step groups",
        "q-diffusion",
        dict(step_groups=GROUPS),
    ),
    ("minmax", "min-max PTQ", "minmax", {}),
    ("minmax-groups", f"min-max PTQ, {GROUPS} step groups", "minmax", dict(step_groups=GROUPS)),
)

# Another sampler or number of steps than calibrated: quest against full precision that is drawn in
# the same way.
DRAWN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("steps-10", "DDIM 10 steps", dict(num_inference_steps=10)),
    ("steps-50", "DDIM 50 steps", dict(num_inference_steps=50)),
    ("plms", "PLMS", dict(sampler="plms")),
    ("dpm", "DPM-Solver++", dict(sampler="dpm-solver++")),
)
NOTE = "the paper has no such row"
BASE = "w4a4-quest"

ABLATION = Table(
    name="ablation",
    title="Ablation: what the parts of `quest` do at W4A4",
    notebook="30_ablation.ipynb",
    in_paper=False,
    rows=(
        Row(id="fp", label="full precision", preset=None, note=NOTE),
        Row(
            id=BASE,
            label="quest",
            preset="quest",
            weight_bits=4,
            act_bits=4,
            against="fp",
            note=NOTE,
        ),
        *(
            Row(
                id=f"w4a4-{name}",
                label=label,
                preset=preset,
                weight_bits=4,
                act_bits=4,
                overrides=overrides,
                against=BASE,
                note=NOTE,
            )
            for name, label, preset, overrides in ROWS
        ),
        *(
            row
            for name, label, how in DRAWN
            for row in (
                Row(
                    id=f"fp-{name}",
                    label=f"full precision, {label}",
                    preset=None,
                    sampling=how,
                    note=NOTE,
                ),
                Row(
                    id=f"w4a4-{name}",
                    label=f"quest, drawn by {label}",
                    preset="quest",
                    weight_bits=4,
                    act_bits=4,
                    sampling=how,
                    against=f"fp-{name}",
                    note=NOTE,
                ),
            )
        ),
    ),
    picture=("fp", BASE, "w4a4-one-group", "w4a4-q-diffusion-groups"),
    note="The paper has no such table; `quest-paper` and `quest-release` at W4A4 stand in Table 3. "
    "Each row differs from `quest`, or from a baseline, by what its name says.",
)
