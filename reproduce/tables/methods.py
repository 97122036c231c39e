"""Rows that several tables share: the methods, QuEST's three presets, independent runs of QuEST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reproduce.tables.base import OURS, Number, Row

Bits = tuple[int, int]  # weights, activations
W8A8 = (8, 8)
W4A8 = (4, 8)
W4A4 = (4, 4)
FP = "fp"

LABELS = {
    "minmax": "min-max PTQ",
    "ptq4dm": "PTQ4DM",
    "q-diffusion": "Q-Diffusion",
    "ptq-d": "PTQ-D",
    "efficientdm": "EfficientDM",
    "tfmq-dm": "TFMQ-DM",
    "full-finetune": "full finetuning",
}

# The paper's one QuEST row is three here.
QUEST = "quest"
QUEST_PRESETS = {
    "quest-paper": "QuEST (paper's text)",
    "quest-release": "QuEST (release)",
    "quest": OURS,
}
ONE_ROW = "the paper has one QuEST row; its number stands beside all three presets"
NOT_IN_PAPER = "the paper has no such row"

# "Diffusion Model Quantization: A Review" (arXiv 2505.05215), whose authors ran QuEST again; and a
# user of the official code (hatchetProject/QuEST, issue 20).
SURVEY = "survey"
USER = "QuEST issue 20"
SOURCES = (
    "survey: arXiv 2505.05215, QuEST run again by its authors; "
    "QuEST issue 20: a user of the official code."
)
Independent = Mapping[str, Mapping[str, float]]  # by source, by metric

# Independent runs of QuEST and of full precision, by data set.
AGAIN: dict[str, dict[Bits | str, Independent]] = {
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
) -> Row:
    """The full-precision row of a data set.

    Args:
        paper: the paper's numbers by metric; None: its table has no such row.
        size_mb: the paper's.
    """
    return Row(
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
) -> tuple[Row, ...]:
    """One row a method at these bits, and three for QuEST, one for each of its presets.

    QuEST is compared with `base`, the others with full precision.

    Args:
        numbers: the paper's numbers by method and metric, in the order of the rows; None: the
            paper has no such row.
        sizes: the paper's MB, of all rows that it has or by method.
        reference: whether the table has a row of full precision.
    """
    found: list[Row] = []
    for method, paper in numbers.items():
        common: dict[str, Any] = dict(
            weight_bits=bits[0],
            act_bits=bits[1],
            dataset=dataset,
            paper=paper or {},
            paper_size_mb=_size(sizes, method, paper is not None),
        )
        if method == QUEST:
            again = AGAIN.get(dataset, {}).get(bits, {})
            common |= dict(independent=again, against=name(dataset, bits, base), note=ONE_ROW)
            found += [
                Row(id=name(dataset, bits, preset), label=label, preset=preset, **common)
                for preset, label in QUEST_PRESETS.items()
            ]
        else:
            row = Row(
                id=name(dataset, bits, method),
                label=LABELS[method],
                preset=method,
                against=f"{dataset}-{FP}" if reference else None,
                note=NOT_IN_PAPER if paper is None else "",
                **common,
            )
            found.append(row)
    return tuple(found)


def _size(sizes: Mapping[str, float] | float | None, method: str, in_paper: bool) -> float | None:
    """The paper's MB of one row."""
    if isinstance(sizes, Mapping):
        return sizes.get(method)
    return sizes if in_paper else None


def all_rows(
    dataset: str,
    paper: Mapping[Bits, Mapping[str, tuple[Number, ...]]],
    metrics: Sequence[str],
    *,
    sizes: Mapping[int, Mapping[str, float] | float] | None = None,
    extra: Sequence[str] = (),
    **choices: Any,
) -> tuple[Row, ...]:
    """`rows` at all bit-widths of a table.

    Args:
        paper: the numbers of a method, one for each of `metrics`, by bits and method.
        sizes: as for `rows`, by weight bits.
        extra: methods that the paper does not have, which come first.
        **choices: further arguments of `rows`.
    """
    found: tuple[Row, ...] = ()
    for bits, numbers in paper.items():
        named: dict[str, Mapping[str, Number] | None] = dict.fromkeys(extra)
        named |= {m: dict(zip(metrics, values, strict=True)) for m, values in numbers.items()}
        own = None if sizes is None else sizes[bits[0]]
        found += rows(dataset, bits, named, sizes=own, **choices)
    return found
