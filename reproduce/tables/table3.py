"""Table 3, LSUN-Bedrooms: full precision, min-max PTQ, Q-Diffusion and QuEST (three presets) at W8A8, W4A8, W4A4."""

from __future__ import annotations

from reproduce.tables import FAILED, Cell, Number, Table

SIZES_MB = {32: 1045.6, 8: 279.1, 4: 148.4}
SURVEY = "survey"  # Diffusion Model Quantization: A Review, arXiv 2505.05215; QuEST run again by its authors
USER = "QuEST issue 20"  # a user of the official code, hatchetProject/QuEST issue 20
Q_DIFFUSION: dict[tuple[int, int], Number] = {(8, 8): 4.53, (4, 8): 5.37, (4, 4): FAILED}
QUEST: dict[tuple[int, int], float] = {(8, 8): 3.03, (4, 8): 3.26, (4, 4): 5.64}
QUEST_AGAIN: dict[tuple[int, int], dict[str, dict[str, float]]] = {
    (8, 8): {SURVEY: {"fid": 4.52, "sfid": 9.31}, USER: {"fid": 2.93}},
    (4, 8): {SURVEY: {"fid": 6.54, "sfid": 10.06}, USER: {"fid": 3.40}},
    (4, 4): {SURVEY: {"fid": 8.92, "sfid": 13.21}, USER: {"fid": 11.36}},
}
QUEST_PRESETS = {
    "quest-paper": "QuEST, as the paper says",
    "quest-release": "QuEST, as the official release does",
    "quest": "QuEST, runs in integers (ours)",
}


def _cells() -> tuple[Cell, ...]:
    cells = [
        Cell(
            id="bedrooms-fp",
            label="full precision",
            preset=None,
            paper={"fid": 2.95},
            independent={SURVEY: {"fid": 3.03, "sfid": 7.03}, USER: {"fid": 3.03}},
            paper_size_mb=SIZES_MB[32],
        )
    ]
    for weight_bits, act_bits in QUEST:
        bits = (weight_bits, act_bits)
        name = f"bedrooms-w{weight_bits}a{act_bits}"
        common = dict(weight_bits=weight_bits, act_bits=act_bits)
        cells.append(
            Cell(
                id=f"{name}-minmax",
                label="min-max PTQ",
                preset="minmax",
                note="the paper has no such row",
                against="bedrooms-fp",
                **common,
            )
        )
        cells.append(
            Cell(
                id=f"{name}-q-diffusion",
                label="Q-Diffusion",
                preset="q-diffusion",
                paper={"fid": Q_DIFFUSION[bits]},
                paper_size_mb=SIZES_MB[weight_bits],
                against="bedrooms-fp",
                **common,
            )
        )
        for preset, label in QUEST_PRESETS.items():
            cells.append(
                Cell(
                    id=f"{name}-{preset}",
                    label=label,
                    preset=preset,
                    paper={"fid": QUEST[bits]},
                    independent=QUEST_AGAIN[bits],
                    paper_size_mb=SIZES_MB[weight_bits],
                    against=f"{name}-q-diffusion",
                    note="the paper has one QuEST row; its number stands beside all three presets",
                    **common,
                )
            )
    return tuple(cells)


TABLE3 = Table(
    name="table3",
    title="Table 3: LSUN-Bedrooms 256x256, LDM-4",
    notebook="table03_bedrooms.ipynb",
    cells=_cells(),
    picture=("bedrooms-fp", "bedrooms-w4a4-q-diffusion", "bedrooms-w4a4-quest"),
    note="The paper reports FID only; N/A: generation failed. "
    "PTQ4DM, PTQ-D and EfficientDM, which the paper also has, are not rebuilt here. "
    "survey: arXiv 2505.05215, QuEST run again by its authors; QuEST issue 20: a user of the official code.",
)
