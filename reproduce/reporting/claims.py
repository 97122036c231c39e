"""The paper's claims, each as comparisons of rows, and whether they hold in the committed results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from reproduce.reporting.report import HEADS, PAIRED, quantize_seconds
from reproduce.tables.methods import LABELS
from reproduce.tables.registry import get_table
from reproduce.verdicts import ONE_SEED, TWO_PROCESSORS, by_seed, verdict

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by table


@dataclass(frozen=True)
class Claim:
    """Row `mine` is better than row `base`, for all `pairs` of one table, by each of `metrics`: metrics, or keys of COSTS."""

    text: str
    where: str  # in the paper
    table: str
    pairs: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...] = ("fid", PAIRED)


# what a row costs, less is better: the head, and the number of a result
COSTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "hours": ("seconds to quantize", quantize_seconds),
    "memory_mb": ("memory, MB", lambda r: r["peak_bytes"] / 1e6),
}
BITS = ("w8a8", "w4a8", "w4a4")
A8, W4, A4 = BITS[:2], BITS[1:], BITS[2:]
# data set in words, its rows' prefix, the paper's table, ours; metrics that the paper judges by
BEDROOMS = ("Bedrooms", "bedrooms", "Table 3", "table3", ("fid", PAIRED))
CHURCHES = ("Churches", "churches", "Table 3", "table3-churches", ("fid", PAIRED))
IMAGENET = ("ImageNet", "imagenet", "Table 4", "table4", ("sfid", "inception_score", PAIRED))
SD = ("text to image", "sd", "Table 5", "table5", ("clip_score", PAIRED))
CIFAR10 = ("CIFAR-10", "cifar10", "Table 11", "table11", ("fid", PAIRED))
DATA = (BEDROOMS, CHURCHES, IMAGENET, SD, CIFAR10)


def _beats(
    data: tuple, base: str, bits: Sequence[str], preset: str = "quest", text: str = "QuEST"
) -> Claim:
    words, prefix, where, table, metrics = data
    pairs = tuple((f"{prefix}-{b}-{preset}", f"{prefix}-{b}-{base}") for b in bits)
    return Claim(
        f"{text} beats {LABELS[base]} at {', '.join(b.upper() for b in bits)}, {words}",
        where,
        table,
        pairs,
        metrics,
    )


def _tfmq(data: tuple) -> Claim:
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


def judge(claim: Claim, results: Results) -> tuple[str, str]:
    """("holds" | "holds in part" | "does not hold" | "not run", the comparisons in words); ", one seed" after it where so."""
    table, rows = get_table(claim.table), {r["cell"]: r for r in results[claim.table]}
    found, words, one_seed = [], [], False
    for mine, base in claim.pairs:
        if any(rows[c]["status"] != "done" for c in (mine, base)):
            return "not run", "-"
        bits = f"{table.cell(mine).bits} " if len(claim.pairs) > 1 else ""
        for metric in claim.metrics:
            if metric in COSTS:
                head, cost = COSTS[metric]
                values = [cost(rows[c]) for c in (mine, base)]
                found.append(values[0] < values[1])
                words.append(
                    f"{bits}{head} {values[0]:.0f} against {values[1]:.0f}: {'less' if found[-1] else 'not less'}"
                )
                continue
            if any(rows[c]["metrics"][metric]["value"] is None for c in (mine, base)):
                return "not run", f"{HEADS[metric]} not measured"
            pairs = by_seed(metric, rows[mine], rows[base])
            if not pairs:
                return "not run", "no seed in common"
            values = [fmean(v) for v in zip(*pairs, strict=True)]
            line = verdict(metric, table.cell(mine), table.cell(base), rows[mine], rows[base])
            one_seed |= ONE_SEED in line
            found.append(line.startswith("better"))
            order = line.split(" than ")[0] if " than " in line else "no clear difference"
            order += f", {TWO_PROCESSORS}" if TWO_PROCESSORS in line else ""
            words.append(f"{bits}{HEADS[metric]} {values[0]:.2f} against {values[1]:.2f}: {order}")
    word = "holds" if all(found) else "holds in part" if any(found) else "does not hold"
    return word + (", one seed" if one_seed else ""), "; ".join(words)
