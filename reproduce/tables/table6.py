"""Table 6, LSUN-Bedrooms W4A8: what the parts of QuEST add, and what they cost."""

from __future__ import annotations

from typing import Any

from reproduce.tables.base import Row, Table
from reproduce.tables.methods import full_precision

SIZE_MB = 148.4

# Id, label, preset, what the row switches off; the paper's GPU hours, memory in MB and FID; the row
# that it is compared with.
ROWS: tuple[tuple[str, str, str, dict[str, Any], tuple[float, float, float], str], ...] = (
    ("ptq", "PTQ (Q-Diffusion)", "q-diffusion", {}, (23.08, 10334, 5.37), "bedrooms-fp"),
    (
        "baseline",
        "baseline: direct quantization + AdaRound",
        "quest",
        dict(tla_iters=0, cma_iters=0),
        (11.52, 9822, 6.95),
        "ptq",
    ),
    ("tla", "+ TLA", "quest", dict(cma_iters=0), (13.13, 11862, 4.41), "baseline"),
    ("tla-cma", "+ TLA + CMA", "quest", {}, (15.25, 12178, 3.26), "tla"),
)

TABLE6 = Table(
    name="table6",
    title="Table 6: components of QuEST and their cost, LSUN-Bedrooms W4A8",
    notebook="table06_components.ipynb",
    rows=(
        full_precision("bedrooms", {"fid": 2.95}, 1045.6),
        *(
            Row(
                id=f"w4a8-{row}",
                label=label,
                preset=preset,
                weight_bits=4,
                act_bits=8,
                overrides=overrides,
                paper={"hours": hours, "memory_mb": memory, "fid": fid},
                paper_size_mb=SIZE_MB,
                against=against if against == "bedrooms-fp" else f"w4a8-{against}",
            )
            for row, label, preset, overrides, (hours, memory, fid), against in ROWS
        ),
    ),
    picture=("bedrooms-fp", "w4a8-ptq", "w4a8-baseline", "w4a8-tla-cma"),
    shares=False,
    note="The paper: 5,120 calibration samples; hours and memory of its own GPU. "
    "Ours: hours from calibration to the end of finetuning.",
)
