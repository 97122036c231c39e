"""Table 11 (supplement): CIFAR-10 32x32, pixel-space DDIM; FID."""

from __future__ import annotations

from reproduce.tables.base import FAILED, Number, Table
from reproduce.tables.methods import QUEST, W4A4, W8A8, Bits, all_rows, full_precision

PAPER: dict[Bits, dict[str, tuple[Number]]] = {
    W8A8: {"q-diffusion": (3.75,), "efficientdm": (3.75,), QUEST: (3.71,)},
    W4A4: {"q-diffusion": (FAILED,), "efficientdm": (10.48,), QUEST: (9.37,)},
}

TABLE11 = Table(
    name="table11",
    title="Table 11: CIFAR-10 32x32",
    notebook="table11_cifar10.ipynb",
    rows=(
        full_precision("cifar10", None),
        *all_rows("cifar10", PAPER, ["fid"]),
    ),
    picture=("cifar10-fp", "cifar10-w4a4-q-diffusion", "cifar10-w4a4-quest"),
    note="N/A: generation failed. The paper does not state the number of steps: 100 at paper "
    "scale, this project's choice. FID is always taken with Inception features; at smoke "
    "scale none is taken.",
)
