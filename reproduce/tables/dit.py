"""QuEST on a transformer, which the paper does not have: DiT at W8A8, W4A8, W4A4."""

from __future__ import annotations

from reproduce.tables.base import Row, Table
from reproduce.tables.methods import (
    FP,
    LABELS,
    NOT_IN_PAPER,
    QUEST_PRESETS,
    W4A4,
    W4A8,
    W8A8,
    full_precision,
    name,
)

DATASET = "dit"
BASE = "q-diffusion"
METHODS = (BASE, "efficientdm", "quest-paper", "quest")


def _rows() -> tuple[Row, ...]:
    """QuEST is compared with Q-Diffusion, the others with full precision."""
    labels = LABELS | QUEST_PRESETS
    return tuple(
        Row(
            id=name(DATASET, bits, method),
            label=labels[method],
            preset=method,
            weight_bits=bits[0],
            act_bits=bits[1],
            dataset=DATASET,
            against=name(DATASET, bits, BASE) if method in QUEST_PRESETS else f"{DATASET}-{FP}",
            note=NOT_IN_PAPER,
        )
        for bits in (W8A8, W4A8, W4A4)
        for method in METHODS
    )


DIT = Table(
    name="dit",
    title="DiT: the methods on a transformer",
    notebook="40_dit.ipynb",
    in_paper=False,
    rows=(full_precision(DATASET, None), *_rows()),
    picture=(f"{DATASET}-{FP}", f"{DATASET}-w4a4-{BASE}", f"{DATASET}-w4a4-quest"),
    note="The paper has no transformer: there is no number of it to compare with. The time layers "
    "are the embedders of timestep and class and the linear layers of the adaptive norms. At mini "
    "scale labels are drawn evenly, but the classes of the reference images are not equally "
    "frequent: every row's FID has that in it, full precision's too.",
)
