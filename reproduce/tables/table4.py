"""Table 4, ImageNet 256x256, LDM-4: FID, sFID and IS at W8A8, W4A8, W4A4."""

from __future__ import annotations

from reproduce.tables import FAILED, Number, Table
from reproduce.tables.methods import QUEST, SOURCES, W4A4, W4A8, W8A8, Bits, full_precision, rows

METRICS = ("fid", "sfid", "inception_score")
PAPER: dict[Bits, dict[str, tuple[Number, Number, Number]]] = {
    W8A8: {
        "q-diffusion": (10.60, 9.29, 350.93),
        "ptq-d": (10.05, 9.01, 359.78),
        "efficientdm": (11.38, 8.04, 362.34),
        QUEST: (10.43, 6.07, 365.12),
    },
    W4A8: {
        "q-diffusion": (9.29, 9.29, 336.80),
        "ptq-d": (8.74, 7.98, 344.72),
        "efficientdm": (9.93, 7.34, 353.83),
        QUEST: (8.48, 6.55, 354.97),
    },
    W4A4: {
        "q-diffusion": (FAILED, FAILED, FAILED),
        "ptq-d": (FAILED, FAILED, FAILED),
        "efficientdm": (6.97, 9.28, 199.96),
        QUEST: (5.98, 7.93, 202.45),
    },
}
SIZES_MB = {8: 428.7, 4: 237.5}
EFFICIENTDM_MB = {8: 435.0, 4: 243.8}

TABLE4 = Table(
    name="table4",
    title="Table 4: ImageNet 256x256, LDM-4",
    notebook=None,
    cells=(
        full_precision("imagenet", dict(zip(METRICS, (11.28, 7.70, 364.73), strict=True)), 1529.7),
        *(
            cell
            for bits, numbers in PAPER.items()
            for cell in rows(
                "imagenet",
                bits,
                {method: dict(zip(METRICS, values, strict=True)) for method, values in numbers.items()},
                sizes=dict.fromkeys(numbers, SIZES_MB[bits[0]]) | {"efficientdm": EFFICIENTDM_MB[bits[0]]},
            )
        ),
    ),
    picture=("imagenet-fp", "imagenet-w4a4-q-diffusion", "imagenet-w4a4-quest"),
    note="The paper says itself that FID is not valid here (it falls as bits fall): judge on sFID and IS. "
    f"N/A: generation failed. EfficientDM: run again by the paper's authors. {SOURCES}",
    claim="sfid",
)
