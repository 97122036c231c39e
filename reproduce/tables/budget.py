"""What iterations buy at W4A4, which the paper does not have: each method at three budgets."""

from __future__ import annotations

from reproduce.tables.base import Row, Table
from reproduce.tables.methods import (
    FP,
    LABELS,
    NOT_IN_PAPER,
    QUEST_PRESETS,
    W4A4,
    full_precision,
    name,
)

DATASET = "bedrooms"
METHODS = ("q-diffusion", "efficientdm", "full-finetune", "quest-paper", "quest")

# Factors on the scale's iterations, by what the row's id and its label say of them.
FACTORS: dict[str, tuple[str, float]] = {
    "tenth": ("a tenth", 0.1),
    "": ("", 1.0),
    "tenfold": ("ten times", 10.0),
}


def row_id(method: str, budget: str) -> str:
    """The id of a method's row; at the scale's own budget it is that of Table 3."""
    base = name(DATASET, W4A4, method)
    return f"{base}-{budget}" if budget else base


def _rows() -> tuple[Row, ...]:
    """A method's other budgets are compared with the scale's own."""
    labels = LABELS | QUEST_PRESETS
    return tuple(
        Row(
            id=row_id(method, budget),
            label=f"{labels[method]}, {words}" if words else labels[method],
            preset=method,
            weight_bits=W4A4[0],
            act_bits=W4A4[1],
            budget=factor,
            dataset=DATASET,
            against=row_id(method, "") if budget else f"{DATASET}-{FP}",
            note=NOT_IN_PAPER,
        )
        for method in METHODS
        for budget, (words, factor) in FACTORS.items()
    )


BUDGET = Table(
    name="budget",
    title="Budget: what iterations buy at W4A4",
    notebook="31_budget.ipynb",
    in_paper=False,
    rows=(full_precision(DATASET, None), *_rows()),
    picture=(
        f"{DATASET}-{FP}",
        row_id("quest-paper", "tenth"),
        row_id("quest-paper", "tenfold"),
        row_id("quest", "tenfold"),
    ),
    note="The paper has no such table. Rows without a factor are those of Table 3, and of Table 8 "
    "for full finetuning. In the others every stage that trains has a tenth or ten times the "
    "scale's iterations, but no more than the method's own; the learning rates of AdaRound and of "
    "Q-Diffusion's scales change the other way.",
)
