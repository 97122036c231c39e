"""Methods that came after the paper at W4A4, alone and with QuEST's finetuning on top."""

from __future__ import annotations

from reproduce.tables.base import Row, Table
from reproduce.tables.methods import (
    FP,
    LABELS,
    NOT_IN_PAPER,
    QUEST,
    QUEST_PRESETS,
    W4A4,
    full_precision,
    name,
)

DATASETS = ("bedrooms", "sd")
BASE = "q-diffusion"
LATER = {
    "svdquant": "SVDQuant",
    "rotation": "Hadamard rotation",
    "mixdq": "MixDQ",
}


def with_quest(method: str) -> str:
    """The preset that finetunes a later method's layers as QuEST does."""
    return f"{method}-{QUEST}"


def _row(dataset: str, preset: str, label: str, against: str) -> Row:
    return Row(
        id=name(dataset, W4A4, preset),
        label=label,
        preset=preset,
        weight_bits=W4A4[0],
        act_bits=W4A4[1],
        dataset=dataset,
        against=against,
        note=NOT_IN_PAPER,
    )


def _rows(dataset: str) -> tuple[Row, ...]:
    """Later methods are compared with QuEST, and so is QuEST's finetuning on top of each."""
    quest = name(dataset, W4A4, QUEST)
    base = name(dataset, W4A4, BASE)
    return (
        full_precision(dataset, None),
        _row(dataset, BASE, LABELS[BASE], f"{dataset}-{FP}"),
        _row(dataset, QUEST, QUEST_PRESETS[QUEST], base),
        *(_row(dataset, method, label, quest) for method, label in LATER.items()),
        *(
            _row(dataset, with_quest(method), f"{label} + QuEST", quest)
            for method, label in LATER.items()
        ),
    )


AFTER_PAPER = Table(
    name="after-paper",
    title="After the paper: later methods at W4A4",
    notebook="41_after_the_paper.ipynb",
    in_paper=False,
    rows=tuple(row for dataset in DATASETS for row in _rows(dataset)),
    picture=(
        f"bedrooms-{FP}",
        name("bedrooms", W4A4, "svdquant"),
        name("bedrooms", W4A4, "rotation"),
        name("bedrooms", W4A4, "mixdq"),
        name("bedrooms", W4A4, QUEST),
    ),
    tells_layers=True,
    note="The paper has no such table. Each later method is a preset, built from its paper's text, "
    "with AdaRound for its rounding. SVDQuant and rotation have a grid a token, the rows with "
    "QuEST have QuEST's own grids. MixDQ's 4 bits are the mean over its layers. Rows of full "
    "precision, Q-Diffusion and QuEST are those of Tables 3 and 5.",
)
