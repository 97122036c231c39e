"""The paper's claims, each as comparisons of rows, and whether they hold in the results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean
from typing import NamedTuple

from reproduce.paired_test import LEVEL
from reproduce.reporting.report import HEADS
from reproduce.results import Result
from reproduce.table_results import TableResults
from reproduce.tables.methods import LABELS
from reproduce.verdicts import (
    PAIRED,
    Order,
    Remark,
    by_seed,
    common_spread,
    compare,
    p_in_words,
)


@dataclass(frozen=True)
class Claim:
    """One row of a table is better than another, for each of several pairs and measures."""

    text: str
    where: str
    """Table or figure of the paper."""

    table: str
    pairs: tuple[tuple[str, str], ...]
    """Ids of the better row and the other one."""

    metrics: tuple[str, ...] = ("fid", PAIRED)
    """Metrics, or keys of MEASURED_COSTS."""


def _memory_mb(result: Result) -> float | None:
    return None if result.peak_bytes is None else result.peak_bytes / 1e6


# What a row costs, where less is better: the head, and the number of a result.
MEASURED_COSTS: dict[str, tuple[str, Callable[[Result], float | None]]] = {
    "hours": ("seconds to quantize", lambda result: result.quantize_seconds),
    "memory_mb": ("memory, MB", _memory_mb),
}
BITS = ("w8a8", "w4a8", "w4a4")
A8, W4, A4 = BITS[:2], BITS[1:], BITS[2:]


class Data(NamedTuple):
    """The rows of one data set."""

    words: str
    prefix: str
    """Of the rows' ids."""

    where: str
    """Table of the paper."""

    table: str
    metrics: tuple[str, ...] = ("fid", PAIRED)
    """What the paper judges by."""


BEDROOMS = Data("Bedrooms", "bedrooms", "Table 3", "table3")
CHURCHES = Data("Churches", "churches", "Table 3", "table3-churches")
IMAGENET = Data("ImageNet", "imagenet", "Table 4", "table4", ("sfid", "inception_score", PAIRED))
SD = Data("text to image", "sd", "Table 5", "table5", ("clip_score", PAIRED))
CIFAR10 = Data("CIFAR-10", "cifar10", "Table 11", "table11")
DATA = (BEDROOMS, CHURCHES, IMAGENET, SD, CIFAR10)


def _beats(
    data: Data, base: str, bits: Sequence[str], preset: str = "quest", text: str = "QuEST"
) -> Claim:
    """A preset against a baseline at some bit-widths."""
    widths = ", ".join(b.upper() for b in bits)
    return Claim(
        text=f"{text} beats {LABELS[base]} at {widths}, {data.words}",
        where=data.where,
        table=data.table,
        pairs=tuple((f"{data.prefix}-{b}-{preset}", f"{data.prefix}-{b}-{base}") for b in bits),
        metrics=data.metrics,
    )


def _tfmq(data: Data) -> Claim:
    """The same against TFMQ-DM, which has a table of its own."""
    return replace(
        _beats(data, "tfmq-dm", A8), where="Table 9", table="table9", metrics=("fid", PAIRED)
    )


CLAIMS = (
    *(_beats(data, "q-diffusion", A4) for data in DATA),
    *(
        _beats(
            data, "q-diffusion", A4, "quest-paper", "QuEST by the text's settings (`quest-paper`)"
        )
        for data in DATA
    ),
    *(_beats(data, "q-diffusion", A8) for data in DATA[:-1]),
    _beats(CIFAR10, "q-diffusion", BITS[:1]),
    _beats(BEDROOMS, "ptq-d", BITS),
    _beats(CHURCHES, "ptq-d", (BITS[0], BITS[2])),  # at W4A8 the paper has the same FID
    _beats(IMAGENET, "ptq-d", BITS),
    _beats(BEDROOMS, "efficientdm", W4),
    _beats(CHURCHES, "efficientdm", W4),
    _beats(IMAGENET, "efficientdm", BITS),
    _beats(CIFAR10, "efficientdm", A4),
    _tfmq(BEDROOMS),
    _tfmq(IMAGENET),
    Claim(
        "FID falls at W4A4 under guidance: it is not valid there",
        "Table 4",
        "table4",
        (("imagenet-w4a4-quest", "imagenet-fp"),),
        ("fid",),
    ),
    Claim(
        "Time-embedding layers in full precision beat quantized ones",
        "Table 2",
        "table2",
        (("w8a8-te-fp", "w8a8-te-ptq"), ("w4a8-te-fp", "w4a8-te-ptq")),
    ),
    Claim(
        "Finetuned time-embedding layers beat quantized ones",
        "Table 2",
        "table2",
        (("w8a8-te-finetune", "w8a8-te-ptq"), ("w4a8-te-finetune", "w4a8-te-ptq")),
    ),
    Claim(
        "TLA improves on direct quantization", "Table 6", "table6", (("w4a8-tla", "w4a8-baseline"),)
    ),
    Claim("CMA improves on TLA", "Table 6", "table6", (("w4a8-tla-cma", "w4a8-tla"),)),
    Claim("All of QuEST beats Q-Diffusion", "Table 6", "table6", (("w4a8-tla-cma", "w4a8-ptq"),)),
    Claim(
        "All of QuEST takes less time than Q-Diffusion",
        "Table 6",
        "table6",
        (("w4a8-tla-cma", "w4a8-ptq"),),
        ("hours",),
    ),
    Claim("The global loss helps TLA", "Table 7", "table7", (("w4a4-tla", "w4a4-tla-local"),)),
    Claim("The global loss helps CMA", "Table 7", "table7", (("w4a4-cma", "w4a4-cma-local"),)),
    Claim(
        "For TLA both losses beat the global loss alone",
        "Table 7",
        "table7",
        (("w4a4-tla", "w4a4-tla-global"),),
    ),
    Claim(
        "QuEST beats finetuning all weights",
        "Table 8",
        "table8",
        (("w4a8-quest", "w4a8-full-finetune"), ("w4a4-quest", "w4a4-full-finetune")),
    ),
    Claim(
        "QuEST takes less time and memory than finetuning all weights",
        "Table 8",
        "table8",
        (("w4a8-quest", "w4a8-full-finetune"), ("w4a4-quest", "w4a4-full-finetune")),
        ("hours", "memory_mb"),
    ),
    Claim(
        "QuEST takes less time than EfficientDM",
        "Table 8",
        "table8",
        (("w4a8-quest", "w4a8-efficientdm"), ("w4a4-quest", "w4a4-efficientdm")),
        ("hours",),
    ),
    Claim(
        "At 6 bits convolutions' inputs suffer less than feed-forward inputs",
        "Fig. 3",
        "figure3",
        (("a6-conv", "a6-feed_forward"),),
    ),
    Claim(
        "At 4 bits other linears' inputs suffer less than convolutions'",
        "Fig. 3",
        "figure3",
        (("a4-linear", "a4-conv"),),
    ),
)


class Holds(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    UNCLEAR = "cannot be told"
    NOT = "does not hold"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Comparison:
    """Two rows by one metric or cost. `values` None: not both were measured."""

    head: str
    """Of the metric or cost, after the rows' bits where the claim has several pairs."""

    values: tuple[float, float] | None
    order: Order
    remarks: tuple[Remark, ...] = ()
    p: float | None = None
    """Of the paired test; None for a cost, or where nothing is known of the spread."""

    is_cost: bool = False

    @property
    def holds(self) -> bool:
        """Whether the first row is better."""
        return self.order == Order.BETTER

    def __str__(self) -> str:
        if self.values is None:
            return f"{self.head}: {self.order}"
        mine, base = self.values
        if self.is_cost:
            less = "less" if self.holds else "not less"
            return f"{self.head} {mine:.0f} against {base:.0f}: {less}"
        words = [str(self.order)]
        words += [] if self.p is None else [p_in_words(self.p)]
        words += [str(r) for r in self.remarks if r == Remark.TWO_PROCESSORS]
        return f"{self.head} {mine:.2f} against {base:.2f}: {', '.join(words)}"


@dataclass(frozen=True)
class Judgement:
    """Whether a claim holds, and the comparisons that say so."""

    holds: Holds
    comparisons: tuple[Comparison, ...] = ()

    @property
    def one_seed(self) -> bool:
        """Whether a comparison has no spread to be judged by."""
        return any(Remark.ONE_SEED in c.remarks for c in self.comparisons)

    @property
    def details(self) -> str:
        """The comparisons in words."""
        return "; ".join(map(str, self.comparisons)) or "-"

    def __str__(self) -> str:
        return f"{self.holds}, one seed" if self.one_seed else str(self.holds)


def judge(claim: Claim, results: Mapping[str, TableResults]) -> Judgement:
    """Whether a claim holds: all its comparisons come out so, beyond what chance explains.

    It holds in part when some do, cannot be told when none does and none comes out the other way,
    and otherwise does not hold.

    Args:
        results: by table; that of the claim is looked at.
    """
    found = results[claim.table]
    if not all(found[row_id].done for pair in claim.pairs for row_id in pair):
        return Judgement(Holds.NOT_RUN)
    comparisons = tuple(_comparisons(claim, found))
    missing = tuple(c for c in comparisons if c.values is None)
    if missing:
        return Judgement(Holds.NOT_RUN, missing[:1])
    return Judgement(_holds([c.order for c in comparisons]), comparisons)


def _holds(orders: Collection[Order]) -> Holds:
    if set(orders) == {Order.BETTER}:
        return Holds.HOLDS
    if Order.BETTER in orders:
        return Holds.IN_PART
    return Holds.NOT if Order.WORSE in orders else Holds.UNCLEAR


def by_chance(judgements: Iterable[Judgement]) -> str:
    """How many of the tested differences chance alone would make, in a sentence."""
    tested = [c for judgement in judgements for c in judgement.comparisons if c.p is not None]
    found = sum(c.order != Order.UNCLEAR for c in tested)
    return (
        f"{len(tested)} comparisons were tested (paired t-test over the seeds) and {found} differ "
        f"with p < {LEVEL}; were all rows equal, {LEVEL * len(tested):.0f} would by chance."
    )


def _comparisons(claim: Claim, results: TableResults) -> Iterator[Comparison]:
    """Each pair by each metric."""
    for mine, base in claim.pairs:
        bits = f"{results.table.row(mine).bits} " if len(claim.pairs) > 1 else ""
        for metric in claim.metrics:
            if metric in MEASURED_COSTS:
                yield _by_cost(bits, metric, results[mine], results[base])
            else:
                yield _by_metric(bits, metric, results, mine, base)


def _by_cost(bits: str, name: str, mine: Result, base: Result) -> Comparison:
    head, cost = MEASURED_COSTS[name]
    ours, others = cost(mine), cost(base)
    if ours is None or others is None:
        return Comparison(bits + head, None, Order.NOT_MEASURED, is_cost=True)
    order = Order.BETTER if ours < others else Order.WORSE
    return Comparison(bits + head, (ours, others), order, is_cost=True)


def _by_metric(bits: str, metric: str, results: TableResults, mine: str, base: str) -> Comparison:
    """Means over the seeds that both rows have, and the order of the rows' verdict."""
    rows = results.table
    row, other = rows.row(mine), rows.row(base)
    common = common_spread(results, metric, row.bits)
    found = compare(metric, row, other, results[mine], results[base], None, common)
    head = bits + HEADS[metric]
    if not found.measured:
        return Comparison(head, None, found.order)
    pairs = by_seed(metric, results[mine], results[base])
    values = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    return Comparison(head, values, found.order, found.remarks, found.p)
