"""Table 3, LSUN: five methods, QuEST as three presets, at W8A8, W4A8 and W4A4; FID.

Two tables here: Bedrooms, with min-max PTQ as one more row, and Churches.
"""

from __future__ import annotations

from reproduce.tables.base import FAILED, Number, Table
from reproduce.tables.methods import (
    QUEST,
    SOURCES,
    W4A4,
    W4A8,
    W8A8,
    Bits,
    all_rows,
    full_precision,
)

BEDROOMS: dict[Bits, dict[str, tuple[Number]]] = {
    W8A8: {
        "ptq4dm": (4.75,),
        "q-diffusion": (4.53,),
        "ptq-d": (3.75,),
        "efficientdm": (FAILED,),
        QUEST: (3.03,),
    },
    W4A8: {
        "ptq4dm": (FAILED,),
        "q-diffusion": (5.37,),
        "ptq-d": (5.94,),
        "efficientdm": (15.15,),
        QUEST: (3.26,),
    },
    W4A4: {
        "ptq4dm": (FAILED,),
        "q-diffusion": (FAILED,),
        "ptq-d": (FAILED,),
        "efficientdm": (10.60,),
        QUEST: (5.64,),
    },
}
CHURCHES: dict[Bits, dict[str, tuple[Number]]] = {
    W8A8: {
        "ptq4dm": (63.93,),
        "q-diffusion": (6.94,),
        "ptq-d": (10.76,),
        "efficientdm": (FAILED,),
        QUEST: (6.55,),
    },
    W4A8: {
        "ptq4dm": (FAILED,),
        "q-diffusion": (7.80,),
        "ptq-d": (7.33,),
        "efficientdm": (9.29,),
        QUEST: (7.33,),
    },
    W4A4: {
        "ptq4dm": (FAILED,),
        "q-diffusion": (FAILED,),
        "ptq-d": (FAILED,),
        "efficientdm": (14.34,),
        QUEST: (11.76,),
    },
}
BEDROOMS_MB = {32: 1045.6, 8: 279.1, 4: 148.4}
CHURCHES_MB = {32: 1125.4, 8: 330.6, 4: 189.9}
NOTE = "The paper reports FID only; N/A: generation failed. "


TABLE3 = Table(
    name="table3",
    title="Table 3: LSUN-Bedrooms 256x256, LDM-4",
    notebook="table03_bedrooms.ipynb",
    rows=(
        full_precision("bedrooms", {"fid": 2.95}, BEDROOMS_MB[32]),
        *all_rows("bedrooms", BEDROOMS, ["fid"], sizes=BEDROOMS_MB, extra=["minmax"]),
    ),
    picture=("bedrooms-fp", "bedrooms-w4a4-q-diffusion", "bedrooms-w4a4-quest"),
    note=f"{NOTE}EfficientDM: run again by the paper's authors. {SOURCES}",
)
TABLE3_CHURCHES = Table(
    name="table3-churches",
    title="Table 3: LSUN-Churches 256x256, LDM-8",
    notebook="table03_churches.ipynb",
    rows=(
        full_precision("churches", {"fid": 4.02}, CHURCHES_MB[32]),
        *all_rows("churches", CHURCHES, ["fid"], sizes=CHURCHES_MB),
    ),
    picture=("churches-fp", "churches-w4a4-q-diffusion", "churches-w4a4-quest"),
    note=f"{NOTE}PTQ4DM, PTQ-D and EfficientDM: run again by the paper's authors. {SOURCES}",
)
