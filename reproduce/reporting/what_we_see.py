"""What a table or notebook shows, in sentences that its numbers choose.

Every text here is Markdown, and stays true when results are made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from reproduce.figures import figure2
from reproduce.paired_test import Spread
from reproduce.reporting import report
from reproduce.reporting.claims import CLAIMS, Holds, judge
from reproduce.reporting.overview import SIGNS
from reproduce.results import Result
from reproduce.table_results import TableResults
from reproduce.tables.base import Row
from reproduce.verdicts import (
    PAIRED,
    Order,
    between_quantized,
    common_spread,
    compare,
    verdict,
)

# What an image's PSNR to the full-precision image means to the eye, from our own pictures.
VISIBLE = (
    (30.0, "hard to tell from the full-precision ones"),
    (20.0, "the same pictures, with changes that one sees"),
    (float("-inf"), "clearly other pictures"),
)


def of_table(results: TableResults) -> str:
    """What a table's results show: claims, which rows are closest, and what limits it."""
    plan = results.plan
    if not results.done:
        return "No row of this table has numbers here, so nothing can be said.\n"
    if plan.scale.name == "smoke":
        return (
            f"{len(results.done)} rows ran. At `smoke` scale methods train for a few iterations "
            "only: this shows that the code runs, and nothing about the methods.\n"
        )
    parts = [_claims(results), _closest(results), _changes(results)]
    parts += [_inputs(results), _orders(results)]
    return "\n\n".join([part for part in parts if part] + [_worth(results)]) + "\n"


# ---- the parts of a table's text ----


def _claims(results: TableResults) -> str:
    """The paper's claims about this table, each with its numbers."""
    judged = [
        (claim, judge(claim, {results.table.name: results}))
        for claim in CLAIMS
        if claim.table == results.table.name
    ]
    if not judged:
        return ""
    counts = Counter(judgement.holds for _, judgement in judged)
    words = ", ".join(
        f"{counts[holds]} {_plural(holds, counts[holds])}" for holds in Holds if counts[holds]
    )
    head = f"**The paper's claims about these rows**: {words}."
    lines = [
        f"- {SIGNS[judgement.holds]} {claim.text}: *{judgement}*. {judgement.details}."
        for claim, judgement in judged
    ]
    return "\n".join([head, "", *lines])


def _plural(holds: Holds, count: int) -> str:
    words = {Holds.HOLDS: "hold", Holds.IN_PART: "hold in part", Holds.NOT: "do not hold"}
    return str(holds) if count == 1 else words.get(holds, str(holds))


def _closest(results: TableResults) -> str:
    """Which rows are closest to full precision and which is farthest, by data set and bits."""
    groups: dict[tuple[str, str], list[tuple[Row, Result]]] = {}
    for row, result in results.done:
        # Rows that are drawn otherwise have another full precision to be close to.
        if not row.full_precision and not row.sampling:
            groups.setdefault((row.dataset, row.bits), []).append((row, result))
    several = len({dataset for dataset, _ in groups}) > 1
    lines = [
        f"- {bits}{f', {dataset}' if several else ''}: {order}."
        for (dataset, bits), rows in groups.items()
        for order in _ranking(rows, common_spread(results, PAIRED, bits))
    ]
    head = "**Closest to full precision**, image by image from the same noise:"
    return "\n".join([head, "", *lines]) if lines else ""


def _ranking(rows: list[tuple[Row, Result]], common: Spread | None) -> Iterator[str]:
    """The order of some rows, in words; nothing where fewer than two were measured."""
    by_distance = any(result.metric(PAIRED).value is not None for _, result in rows)
    metric, name = (PAIRED, "distance {:.2f}") if by_distance else ("psnr_to_fp", "PSNR {:.1f} dB")
    measured = [
        (value, row, result)
        for row, result in rows
        for value in [result.metric(metric).value]
        if value is not None
    ]
    if len(measured) < 2:
        return
    measured.sort(key=lambda found: found[0], reverse=not by_distance)
    (best, first, mine), (following, second, other), *rest = measured
    # The PSNR is no metric of a verdict: its order is that of the means.
    order = compare(PAIRED, first, second, mine, other, None, common).order
    clear = not by_distance or order == Order.BETTER
    words = f"*{first.label}* ({name.format(best)}), "
    words += "then" if clear else "with no clear difference to"
    words += f" *{second.label}* ({name.format(following)})"
    if rest:
        value, last, _ = rest[-1]
        words += f"; farthest: *{last.label}* ({name.format(value)})"
    yield words


def _changes(results: TableResults) -> str:
    """For a table of our own: what each change of its base row does, by distance."""
    if results.table.in_paper:
        return ""
    several = len({row.bits for row, _ in results.done if not row.full_precision}) > 1
    found = [
        (judged.difference, judged.order, f"{row.label} {row.bits}" if several else row.label)
        for row, _ in results.done
        if row.against is not None and not results.table.row(row.against).full_precision
        for judged in [verdict(results, row, PAIRED)]
        if judged is not None and judged.difference is not None
    ]
    found.sort(reverse=True)
    heads = {
        Order.WORSE: "Clearly farther from full precision",
        Order.UNCLEAR: "No clear difference",
        Order.BETTER: "Clearly closer",
    }
    lines = []
    for order, head in heads.items():
        named = [f"*{label}* ({size:+.2f})" for size, o, label in found if o == order]
        if named:
            lines.append(f"- {head}: {', '.join(named)}.")
    return "\n".join(["**Each change, by its difference in distance**:", "", *lines])


def _inputs(results: TableResults) -> str:
    """Figure 2: how finetuning changes the ranges of layers' inputs."""
    if not results.table.opens_checkpoints:
        return ""
    ratios = figure2.mean_ratios(figure2.read_table(results.plan))[figure2.RANGE_RATIO]
    finetuned, others = (float(ratios[name]) for name in (figure2.FINETUNED, figure2.OTHERS))
    does = "narrows" if finetuned < 1 else "does not narrow"
    return (
        f"**Ranges of inputs**: finetuning {does} those of the layers that it trains. After it "
        f"they are {finetuned:.2f} times as wide, on average, and those of the other layers "
        f"{others:.2f} times."
    )


def _orders(results: TableResults) -> str:
    """How many of the paper's orders between quantized rows come out here."""
    judged = between_quantized(results, report.reported(results))
    known = [v for v in judged if v.measured and v.agrees is not None]
    if not known:
        return ""
    unclear = sum(v.order == Order.UNCLEAR for v in known)
    agree = sum(bool(v.agrees) for v in known)
    return (
        f"**Paper and ours**: pairs of quantized rows that the paper orders: {len(known)}. The "
        f"same way round here: {agree}; no clear difference: {unclear}; the other way round: "
        f"{len(known) - agree - unclear}."
    )


def _worth(results: TableResults) -> str:
    """What the numbers are worth."""
    seeds = max(len(result.seeds) for _, result in results.done)
    images = max(result.conditions.samples_per_seed for _, result in results.done)
    rows = f"{len(results.done)} of {len(results)} rows"
    several = f"{seeds} seeds" if seeds > 1 else "one seed"
    spread = (
        "A difference that chance explains (paired t-test over the seeds, p of 0.05 or more) "
        "counts as none."
        if seeds > 1
        else "With one seed there is no spread to judge a difference by."
    )
    return f"{rows} have numbers, of {several} with {images:,} images each. {spread}"


# ---- the notebooks that show no table ----


def of_tour(snr: Mapping[str, float], bits: str) -> str:
    """The tour: what is left of the signal in each model's images.

    Args:
        snr: latent SNR in dB by model: the naive one, before finetuning, after it.
    """
    (naive, first), (before, second), (after, third) = snr.items()
    error = {name: 10 ** (-value / 10) for name, value in snr.items()}
    words = [
        f"At {bits} the latents' error has {error[naive]:.0%} of the signal's power with {naive} "
        f"({first:.1f} dB), {error[before]:.0%} with {before} ({second:.1f} dB) and "
        f"{error[after]:.0%} with {after} ({third:.1f} dB)."
    ]
    if third > second:
        words.append(f"Finetuning a few chosen layers gained {third - second:.1f} dB.")
    else:
        words.append(f"Finetuning gained nothing here: it lost {second - third:.1f} dB.")
    gain = second - first
    words.append(
        f"Ranges and learned rounding, without any finetuning, had gained {gain:.1f} dB."
        if gain > 0
        else "By this measure ranges and learned rounding alone had gained nothing; the pictures "
        "tell whether more of them can be recognized."
    )
    return " ".join(words) + "\n"


def of_pipeline(psnr_db: float, size_bytes: int, full_bytes: int, bits: str) -> str:
    """Your own pipeline: how close its images are, and how small it is."""
    looks = next(words for least, words in VISIBLE if psnr_db >= least)
    return (
        f"At {bits} the images have a PSNR of {psnr_db:.1f} dB to those of full precision from the "
        f"same noise: {looks}. The UNet takes {size_bytes / 1e6:.2f} MB on disk in place of "
        f"{full_bytes / 1e6:.2f} MB in 32 bits, {full_bytes / size_bytes:.1f} times less.\n"
    )


def _against(other: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    ratio = other["step_s"] / ours["step_s"]
    if ratio >= 1:
        return f"{ratio:.1f} times as fast as"
    return f"{1 / ratio:.1f} times slower than"


def of_engine(equality: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    """The integer engine: whether it is equal, and what one step of a full-size UNet takes.

    Args:
        equality: what benchmarks/equality.py wrote.
        speed: what benchmarks/cpu_unet.py wrote.
    """
    runs = equality["results"]
    same = sum(run["cpu_against_reference"]["bit_identical"] for run in runs)
    worst = max(abs(run["metrics"]["cpu"]["fid"] - run["metrics"]["fake"]["fid"]) for run in runs)
    variants = speed["models"]["sd14"]["variants"]
    names = ("w4a4-fused", "fp32", "bf16-compiled", "openvino-int8-bf16")
    ours, plain, half, other = (variants[name] for name in names)
    return (
        f"In {same} of {len(runs)} trained checkpoints the CPU engine gives what the reference "
        f"gives, bit for bit; its FID differs from the simulation's by {worst:.2f} at most. "
        f"One step of Stable Diffusion v1.4's UNet takes {ours['step_s']:.1f} s in integers with "
        f"fused blocks, {plain['step_s']:.1f} s in float32, {half['step_s']:.1f} s in compiled "
        f"bfloat16 and {other['step_s']:.1f} s in OpenVINO's int8 and bfloat16. It is "
        f"{_against(half, ours)} compiled bfloat16 and {_against(other, ours)} OpenVINO. "
        f"It peaks at {ours['peak_bytes'] / 1e9:.1f} GB of memory; compiled bfloat16 takes "
        f"{half['peak_bytes'] / 1e9:.1f} GB, OpenVINO {other['peak_bytes'] / 1e9:.1f} GB.\n"
    )
