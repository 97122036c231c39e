"""Table 5, Stable Diffusion v1.4 at 512x512: CLIP score on 10,000 COCO 2014 validation prompts."""

from __future__ import annotations

from reproduce.tables.base import FAILED, Number, Table
from reproduce.tables.methods import QUEST, W4A4, W4A8, W8A8, Bits, all_rows, full_precision

PAPER: dict[Bits, dict[str, tuple[Number]]] = {
    W8A8: {"q-diffusion": (31.43,), QUEST: (31.47,)},
    W4A8: {"q-diffusion": (31.39,), QUEST: (31.50,)},
    W4A4: {"q-diffusion": (FAILED,), QUEST: (28.85,)},
}
SIZES_MB = {8: 949.0, 4: 539.1}

TABLE5 = Table(
    name="table5",
    title="Table 5: Stable Diffusion v1.4, 512x512",
    notebook="table05_stable_diffusion.ipynb",
    rows=(
        full_precision("sd", {"clip_score": 31.50}, 3279.1),
        *all_rows("sd", PAPER, ["clip_score"], sizes=SIZES_MB),
    ),
    picture=("sd-fp", "sd-w4a4-q-diffusion", "sd-w4a4-quest"),
    note="The paper: CLIP ViT-B/16 score x100; N/A: generation failed. Prompts: one caption an "
    "image, see reproduce.evaluation.clip_score.",
    claim="clip_score",
)
