"""Table 9 (supplement): QuEST against TFMQ-DM on Bedrooms and ImageNet; FID."""

from __future__ import annotations

from reproduce.tables import Table
from reproduce.tables.methods import QUEST, SOURCES, W4A8, W8A8, rows

PAPER = {  # FID of TFMQ-DM, of QuEST
    "bedrooms": {W8A8: (3.14, 3.03), W4A8: (3.68, 3.26)},
    "imagenet": {W8A8: (10.79, 10.43), W4A8: (10.29, 8.48)},
}

TABLE9 = Table(
    name="table9",
    title="Table 9: against TFMQ-DM",
    notebook=None,
    cells=tuple(
        cell
        for dataset, by_bits in PAPER.items()
        for bits, (tfmq, quest) in by_bits.items()
        for cell in rows(dataset, bits, {"tfmq-dm": {"fid": tfmq}, QUEST: {"fid": quest}}, base="tfmq-dm", reference=False)
    ),
    picture=("bedrooms-w4a8-tfmq-dm", "bedrooms-w4a8-quest"),
    note=f"The paper reports FID only. {SOURCES}",
)
