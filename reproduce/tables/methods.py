"""Rows that several tables share: the methods' names, QuEST's three presets, and independent re-runs of QuEST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reproduce.tables.base import Cell, Number

Bits = tuple[int, int]  # weights, activations
W8A8, W4A8, W4A4 = (8, 8), (4, 8), (4, 4)
SURVEY = "survey"  # Diffusion Model Quantization: A Review, arXiv 2505.05215; QuEST run again by its authors
USER = "QuEST issue 20"  # a user of the official code, hatchetProject/QuEST issue 20
LABELS = {
    "minmax": "min-max PTQ",
    "ptq4dm": "PTQ4DM",
    "q-diffusion": "Q-Diffusion",
    "ptq-d": "PTQ-D",
    "efficientdm": "EfficientDM",
    "tfmq-dm": "TFMQ-DM",
    "full-finetune": "full finetuning",
}
QUEST = "quest"  # the paper's one row, which is three here:
QUEST_PRESETS = {
    "quest-paper": "QuEST, as the paper says",
    "quest-release": "QuEST, as the official release does",
    "quest": "QuEST, runs in integers (ours)",
}
ONE_ROW = "the paper has one QuEST row; its number stands beside all three presets"
NOT_IN_PAPER = "the paper has no such row"
SOURCES = "survey: arXiv 2505.05215, QuEST run again by its authors; QuEST issue 20: a user of the official code."
Independent = Mapping[str, Mapping[str, float]]  # by source, by metric
FP = "fp"
AGAIN: dict[str, dict[Bits | str, Independent]] = {  # QuEST and full precision, by data set
    "bedrooms": {
        FP: {SURVEY: {"fid": 3.03, "sfid": 7.03}, USER: {"fid": 3.03}},
        W8A8: {SURVEY: {"fid": 4.52, "sfid": 9.31}, USER: {"fid": 2.93}},
        W4A8: {SURVEY: {"fid": 6.54, "sfid": 10.06}, USER: {"fid": 3.40}},
        W4A4: {SURVEY: {"fid": 8.92, "sfid": 13.21}, USER: {"fid": 11.36}},
    },
    "churches": {
        FP: {SURVEY: {"fid": 4.17, "sfid": 12.91}},
        W8A8: {SURVEY: {"fid": 7.14, "sfid": 13.29}},
        W4A8: {SURVEY: {"fid": 8.93, "sfid": 13.84}},
        W4A4: {SURVEY: {"fid": 12.54, "sfid": 18.30}},
    },
    "imagenet": {
        FP: {SURVEY: {"inception_score": 366.03, "fid": 11.13, "sfid": 7.83}},
        W8A8: {SURVEY: {"inception_score": 365.70, "fid": 10.93, "sfid": 7.95}},
        W4A8: {SURVEY: {"inception_score": 342.64, "fid": 8.52, "sfid": 6.74}},
        W4A4: {SURVEY: {"inception_score": 197.02, "fid": 7.76, "sfid": 9.89}},
    },
}


def name(dataset: str, bits: Bits, method: str) -> str:
    """The id of a row."""
    return f"{dataset}-w{bits[0]}a{bits[1]}-{method}"


def full_precision(
    dataset: str, paper: Mapping[str, Number] | None, size_mb: float | None = None
) -> Cell:
    """paper None: its table has no such row."""
    return Cell(
        id=f"{dataset}-{FP}",
        label="full precision",
        preset=None,
        dataset=dataset,
        paper=paper or {},
        paper_size_mb=size_mb,
        independent=AGAIN.get(dataset, {}).get(FP, {}),
        note=f"{NOT_IN_PAPER}; shown for reference" if paper is None else "",
    )


def rows(
    dataset: str,
    bits: Bits,
    numbers: Mapping[str, Mapping[str, Number] | None],
    *,
    sizes: Mapping[str, float] | float | None = None,
    base: str = "q-diffusion",
    reference: bool = True,
) -> tuple[Cell, ...]:
    """One row a method at these bits, in the order of `numbers` (None: the paper has no such row); QuEST as its three presets.

    QuEST is compared with `base`, the others with full precision, if the table has that row (`reference`).
    sizes: the paper's MB, of all or by method.
    """
    cells = []
    for method, paper in numbers.items():
        common: dict[str, Any] = dict(
            weight_bits=bits[0],
            act_bits=bits[1],
            dataset=dataset,
            paper=paper or {},
            paper_size_mb=sizes.get(method)
            if isinstance(sizes, Mapping)
            else sizes
            if paper is not None
            else None,
        )
        if method == QUEST:
            again = AGAIN.get(dataset, {}).get(bits, {})
            common |= dict(independent=again, against=name(dataset, bits, base), note=ONE_ROW)
            cells += [
                Cell(id=name(dataset, bits, p), label=label, preset=p, **common)
                for p, label in QUEST_PRESETS.items()
            ]
        else:
            against = f"{dataset}-{FP}" if reference else None
            note = NOT_IN_PAPER if paper is None else ""
            cells.append(
                Cell(
                    id=name(dataset, bits, method),
                    label=LABELS[method],
                    preset=method,
                    against=against,
                    note=note,
                    **common,
                )
            )
    return tuple(cells)


def all_rows(
    dataset: str,
    paper: Mapping[Bits, Mapping[str, tuple[Number, ...]]],
    metrics: Sequence[str],
    *,
    sizes: Mapping[int, Mapping[str, float] | float] | None = None,
    extra: Sequence[str] = (),
    **choices: Any,
) -> tuple[Cell, ...]:
    """`rows` at all bit-widths of a table: paper[bits][method] holds the number of each of `metrics`.

    sizes: by weight bits. extra: methods that the paper does not have, first.
    """
    cells: tuple[Cell, ...] = ()
    for bits, numbers in paper.items():
        named = dict.fromkeys(extra) | {
            m: dict(zip(metrics, values, strict=True)) for m, values in numbers.items()
        }
        cells += rows(dataset, bits, named, sizes=sizes and sizes[bits[0]], **choices)
    return cells
