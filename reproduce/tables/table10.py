"""Table 10 (supplement): more metrics on LSUN-Bedrooms; sFID and IS."""

from __future__ import annotations

from reproduce.tables.base import FAILED, UNKNOWN, Number, Table
from reproduce.tables.methods import QUEST, SOURCES, W4A4, W8A8, Bits, all_rows, full_precision

PAPER: dict[Bits, dict[str, tuple[Number, Number]]] = {
    W8A8: {
        "q-diffusion": (8.19, 2.25),
        "ptq-d": (9.89, 2.25),
        "efficientdm": (FAILED, FAILED),
        QUEST: (6.86, 2.27),
    },
    W4A4: {
        "q-diffusion": (FAILED, FAILED),
        "ptq-d": (FAILED, FAILED),
        "efficientdm": (15.15, 2.27),
        QUEST: (UNKNOWN, UNKNOWN),
    },
}

TABLE10 = Table(
    name="table10",
    title="Table 10: more metrics on LSUN-Bedrooms",
    notebook="table10_more_metrics.ipynb",
    rows=(
        full_precision("bedrooms", None),
        *all_rows("bedrooms", PAPER, ["sfid", "inception_score"], reference=False),
    ),
    picture=("bedrooms-fp", "bedrooms-w4a4-q-diffusion", "bedrooms-w4a4-quest"),
    note="N/A: generation failed. The paper's W4A4 numbers of QuEST are not available to this "
    f"project. {SOURCES}",
    claim="sfid",
)
