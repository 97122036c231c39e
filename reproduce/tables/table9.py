"""Table 9 (supplement): QuEST against TFMQ-DM on Bedrooms and ImageNet; FID."""

from __future__ import annotations

from reproduce.tables.base import Table
from reproduce.tables.methods import QUEST, SOURCES, W4A8, W8A8, all_rows, full_precision

PAPER = {  # FID
    "bedrooms": {
        W8A8: {"tfmq-dm": (3.14,), QUEST: (3.03,)},
        W4A8: {"tfmq-dm": (3.68,), QUEST: (3.26,)},
    },
    "imagenet": {
        W8A8: {"tfmq-dm": (10.79,), QUEST: (10.43,)},
        W4A8: {"tfmq-dm": (10.29,), QUEST: (8.48,)},
    },
}

TABLE9 = Table(
    name="table9",
    title="Table 9: against TFMQ-DM",
    notebook="table09_tfmq_dm.ipynb",
    rows=tuple(
        row
        for dataset, numbers in PAPER.items()
        for row in (
            full_precision(dataset, None),
            *all_rows(dataset, numbers, ["fid"], base="tfmq-dm", reference=False),
        )
    ),
    picture=("bedrooms-fp", "bedrooms-w4a8-tfmq-dm", "bedrooms-w4a8-quest"),
    note=f"The paper reports FID only. {SOURCES}",
)
