"""The paper's claims, each as comparisons of rows, and whether they hold in the committed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from reproduce.report import HEADS, PAIRED
from reproduce.tables import get_table
from reproduce.verdict import ONE_SEED, by_seed, verdict

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by table


@dataclass(frozen=True)
class Claim:
    """Row `mine` is better than row `base`, for all `pairs` of one table, by each of `metrics`."""

    text: str
    where: str  # in the paper
    table: str
    pairs: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...] = ("fid", PAIRED)


def _beats(dataset: str, base: str, *bits: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{dataset}-{b}-quest", f"{dataset}-{b}-{base}") for b in bits)


A8, W4 = ("w8a8", "w4a8"), ("w4a8", "w4a4")
CLAIMS = (
    Claim("QuEST beats Q-Diffusion at W4A4, Bedrooms", "Table 3", "table3", _beats("bedrooms", "q-diffusion", "w4a4")),
    Claim("QuEST beats Q-Diffusion at W8A8 and W4A8, Bedrooms", "Table 3", "table3", _beats("bedrooms", "q-diffusion", *A8)),
    Claim("QuEST beats EfficientDM at W4A8 and W4A4, Bedrooms", "Table 3", "table3", _beats("bedrooms", "efficientdm", *W4)),
    Claim("QuEST beats Q-Diffusion at W4A4, Churches", "Table 3", "table3-churches", _beats("churches", "q-diffusion", "w4a4")),
    Claim("QuEST beats EfficientDM at W4A4, Churches", "Table 3", "table3-churches", _beats("churches", "efficientdm", "w4a4")),
    Claim(
        "QuEST beats Q-Diffusion at W4A4, ImageNet", "Table 4", "table4", _beats("imagenet", "q-diffusion", "w4a4"),
        ("sfid", "inception_score", PAIRED),
    ),
    Claim(
        "QuEST beats EfficientDM at W4A4, ImageNet", "Table 4", "table4", _beats("imagenet", "efficientdm", "w4a4"),
        ("sfid", "inception_score", PAIRED),
    ),
    Claim(
        "FID falls at W4A4 under guidance: it is not valid there", "Table 4", "table4", (("imagenet-w4a4-quest", "imagenet-fp"),),
        ("fid",),
    ),
    Claim(
        "QuEST beats Q-Diffusion at W4A4, text to image", "Table 5", "table5", _beats("sd", "q-diffusion", "w4a4"),
        ("clip_score", PAIRED),
    ),
    Claim(
        "Time-embedding layers in full precision beat quantized ones", "Table 2", "table2",
        (("w8a8-te-fp", "w8a8-te-ptq"), ("w4a8-te-fp", "w4a8-te-ptq")),
    ),
    Claim(
        "Finetuned time-embedding layers beat quantized ones", "Table 2", "table2",
        (("w8a8-te-finetune", "w8a8-te-ptq"), ("w4a8-te-finetune", "w4a8-te-ptq")),
    ),
    Claim("TLA improves on direct quantization", "Table 6", "table6", (("w4a8-tla", "w4a8-baseline"),)),
    Claim("CMA improves on TLA", "Table 6", "table6", (("w4a8-tla-cma", "w4a8-tla"),)),
    Claim("All of QuEST beats Q-Diffusion", "Table 6", "table6", (("w4a8-tla-cma", "w4a8-ptq"),)),
    Claim("The global loss helps TLA", "Table 7", "table7", (("w4a4-tla", "w4a4-tla-local"),)),
    Claim("The global loss helps CMA", "Table 7", "table7", (("w4a4-cma", "w4a4-cma-local"),)),
    Claim("The global loss alone is worse for TLA than both", "Table 7", "table7", (("w4a4-tla", "w4a4-tla-global"),)),
    Claim(
        "QuEST beats finetuning all weights", "Table 8", "table8",
        (("w4a8-quest", "w4a8-full-finetune"), ("w4a4-quest", "w4a4-full-finetune")),
    ),
    Claim("QuEST beats TFMQ-DM, Bedrooms", "Table 9", "table9", _beats("bedrooms", "tfmq-dm", *A8)),
    Claim("QuEST beats TFMQ-DM, ImageNet", "Table 9", "table9", _beats("imagenet", "tfmq-dm", *A8)),
    Claim("QuEST beats Q-Diffusion at W4A4, CIFAR-10", "Table 11", "table11", _beats("cifar10", "q-diffusion", "w4a4")),
    Claim("QuEST beats EfficientDM at W4A4, CIFAR-10", "Table 11", "table11", _beats("cifar10", "efficientdm", "w4a4")),
    Claim("At 6 bits feed-forward inputs suffer more than convolutions'", "Fig. 3", "figure3", (("a6-conv", "a6-feed_forward"),)),
    Claim("At 4 bits convolutions' inputs suffer more than other linears'", "Fig. 3", "figure3", (("a4-linear", "a4-conv"),)),
)  # fmt: skip


def judge(claim: Claim, results: Results) -> tuple[str, str]:
    """("holds" | "holds in part" | "does not hold" | "not run", the comparisons in words); ", one seed" after it where so."""
    table, rows = get_table(claim.table), {r["cell"]: r for r in results[claim.table]}
    found, words, one_seed = [], [], False
    for mine, base in claim.pairs:
        if any(rows[c]["status"] != "done" for c in (mine, base)):
            return "not run", "-"
        for metric in claim.metrics:
            if any(rows[c]["metrics"][metric]["value"] is None for c in (mine, base)):
                return "not run", f"{HEADS[metric]} not measured"
            values = [fmean(v) for v in zip(*by_seed(metric, rows[mine], rows[base]), strict=True)]
            line = verdict(metric, table.cell(mine), table.cell(base), rows[mine], rows[base])
            one_seed |= ONE_SEED in line
            found.append(line.startswith("better"))
            order = line.split(" than ")[0] if " than " in line else "no clear difference"
            bits = f"{table.cell(mine).bits} " if len(claim.pairs) > 1 else ""
            words.append(f"{bits}{HEADS[metric]} {values[0]:.2f} against {values[1]:.2f}: {order}")
    word = "holds" if all(found) else "holds in part" if any(found) else "does not hold"
    return word + (", one seed" if one_seed else ""), "; ".join(words)
