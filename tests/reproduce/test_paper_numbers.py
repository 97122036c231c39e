"""Every number of the paper and of independent runs in the rows.

They are compared with paper_tables.md, a transcription that was made apart.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reproduce.tables.base import COSTS, FAILED, UNKNOWN
from reproduce.tables.registry import all_tables, get_table

TEXT = (Path(__file__).parent / "paper_tables.md").read_text()
BITS = ("W8A8", "W4A8", "W4A4")
METHODS = {
    "PTQ4DM": "ptq4dm",
    "Q-Diffusion": "q-diffusion",
    "PTQ-D": "ptq-d",
    "EfficientDM": "efficientdm",
    "TFMQ-DM": "tfmq-dm",
    "QuEST": "quest",
}
NUMBER = r"N/A|\d+\.\d+"


def value(text: str):
    text = text.strip()
    return (
        text
        if text == FAILED
        else float(text.replace("k", "")) * (1000 if text.endswith("k") else 1)
    )


def section(heading: str) -> str:
    """What follows the line that starts with `heading`, to the next heading or list item."""
    start = TEXT.index(f"\n{heading}") + 1
    return re.split(r"\n(?=#|- )", TEXT[start:])[0]


def grid(text: str) -> list[list[str]]:
    """The rows of a markdown table without the rule; an empty first field repeats the one above."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    rows = [r for r in rows if not set("".join(r)) <= set("-")]
    for above, row in zip(rows, rows[1:], strict=False):
        row[0] = row[0] or above[0]
    return rows


def quest_family(numbers: dict) -> dict:
    """The paper's QuEST row stands beside three presets."""
    out = {}
    for (bits, method), paper in numbers.items():
        for preset in ("quest-paper", "quest-release", "quest") if method == "quest" else (method,):
            out[bits, preset] = paper
    return out


def rows_of(table: str, dataset: str | None = None, keys: tuple[str, ...] = ()) -> dict:
    """{(bits, preset): numbers} of the rows that the paper has."""
    found = [
        c
        for c in get_table(table).rows
        if dataset in (None, c.dataset) and not c.note.startswith("the paper has no such")
    ]
    return {
        (c.bits, c.preset): {k: v for k, v in c.paper.items() if not keys or k in keys}
        for c in found
    }


def test_table_2():
    expected = {}
    for setting, row in zip(
        ("ptq", "fp", "finetune"), grid(section("## Table 2"))[1:], strict=True
    ):
        for bits, pair in zip(("w8a8", "w4a8"), row[1:], strict=True):
            expected[f"{bits}-te-{setting}"] = dict(
                zip(("fid", "sfid"), map(value, pair.split("/")), strict=True)
            )
    assert {c.id: dict(c.paper) for c in get_table("table2").rows if c.preset} == expected and len(
        expected
    ) == 6


@pytest.mark.parametrize(
    ("table", "dataset", "start"), [("table3", "bedrooms", 0), ("table3-churches", "churches", 5)]
)
def test_table_3(table, dataset, start):
    head, *rows = grid(section("## Table 3"))[start : start + 5]
    expected = {("32/32", None): {"fid": value(rows[0][1])}}
    numbers = {}
    for row in rows[1:]:
        for method, number in zip(head[2:], row[2:], strict=True):
            numbers[row[0], METHODS[method.strip("*")]] = {"fid": value(number)}
    assert rows_of(table) == expected | quest_family(numbers) and len(numbers) == 15
    line = next(x for x in TEXT.splitlines() if x.startswith(f"{dataset.capitalize()}, LDM"))
    sizes = dict(
        zip((32, 8, 4), map(float, re.findall(r"(?:FP|W8|W4) (\d+\.\d)", line)), strict=True)
    )
    for row in get_table(table).rows:
        assert row.paper_size_mb == (sizes[row.weight_bits] if row.preset != "minmax" else None)


def test_table_4():
    numbers, sizes = {}, {}
    for bits, methods, size, *values in grid(section("## Table 4"))[1:]:
        for method in methods.split(", "):
            key = (bits, None if method == "FP" else METHODS[method.strip("*")])
            numbers[key] = dict(
                zip(("fid", "sfid", "inception_score"), map(value, values), strict=True)
            )
            sizes[key] = {"size": float(size)}
    assert rows_of("table4") == quest_family(numbers) and len(numbers) == 13
    assert {
        (c.bits, c.preset): {"size": c.paper_size_mb} for c in get_table("table4").rows
    } == quest_family(sizes)


def test_table_5():
    numbers, sizes = {}, {}
    for bits, size, first, second in grid(section("## Table 5"))[1:]:
        sizes[bits] = float(size)
        if first.startswith("FP"):
            numbers[bits, None] = {"clip_score": value(first.removeprefix("FP"))}
        else:
            numbers[bits, "q-diffusion"], numbers[bits, "quest"] = (
                {"clip_score": value(v)} for v in (first, second)
            )
    assert rows_of("table5") == quest_family(numbers) and len(numbers) == 7
    assert all(c.paper_size_mb == sizes[c.bits] for c in get_table("table5").rows)


def test_table_6():
    rows = grid(section("## Table 6"))[1:]
    assert len(rows) == 5
    for (_, hours, memory, size, fid), row in zip(rows, get_table("table6").rows, strict=True):
        costs = {} if row.preset is None else {"hours": value(hours), "memory_mb": value(memory)}
        assert dict(row.paper) == costs | {"fid": value(fid)} and row.paper_size_mb == float(size)
        assert row.preset is None or row.bits == "W4A8"


def test_table_7():
    local, both = (
        list(map(value, pair))
        for pair in re.findall(r"(?:FID )?([\d.]+), (?:sFID )?([\d.]+)[;.]", section("## Table 7"))
    )
    numbers = {c.id: list(c.paper.values()) for c in get_table("table7").rows if c.preset}
    assert numbers["w4a4-tla-local"] == local and numbers["w4a4-tla"] == both
    assert numbers["w4a4-tla-global"] == [None, None]
    assert numbers["w4a4-cma"] == numbers["w4a4-cma-local"] == [UNKNOWN, UNKNOWN]
    for text in ("7.13 FID", "9.39 sFID", "5.21 FID"):
        assert text in section("## Table 7") and text in get_table("table7").note


def test_table_8():
    expected = {}
    for method, hours, memory, iterations, *fids in grid(section("## Table 8"))[1:]:
        preset = METHODS.get(method, "full-finetune")
        costs = {"hours": value(hours), "memory_mb": value(memory), "iterations": value(iterations)}
        expected |= {
            (bits, preset): costs | {"fid": value(fid)}
            for bits, fid in zip(("W4A8", "W4A4"), fids, strict=True)
        }
    assert rows_of("table8") == expected and len(expected) == 6


def test_table_9():
    for dataset in ("Bedrooms", "ImageNet"):
        text = re.search(rf"Table 9.*?{dataset} (.*?)(?:\. ImageNet|\.$)", TEXT, re.M)[1]
        expected = {}
        for bits, pair in zip(("W8A8", "W4A8"), text.split(";"), strict=True):
            for method, number in zip(("tfmq-dm", "quest"), re.findall(NUMBER, pair), strict=True):
                expected[bits, method] = {"fid": value(number)}
        assert rows_of("table9", dataset.lower()) == quest_family(expected)


def test_table_10():
    wide, narrow = re.search(r"Table 10.*?: W8A8 (.*)\. W4A4: (.*)", TEXT).groups()
    pair = rf"(Q-Diffusion|PTQD|EfficientDM|QuEST) (N/A|{NUMBER})(?: / ({NUMBER}))?"
    expected = {}
    for bits, text in (
        ("W8A8", wide),
        ("W4A4", narrow.replace("Q-Diffusion, PTQD", "Q-Diffusion N/A, PTQD")),
    ):
        for method, sfid, score in re.findall(pair, text):
            values = (value(sfid), value(score or sfid))
            expected[bits, METHODS[method.replace("PTQD", "PTQ-D")]] = dict(
                zip(("sfid", "inception_score"), values, strict=True)
            )
    assert len(expected) == 7 and "QuEST: not available here" in narrow
    expected["W4A4", "quest"] = {"sfid": UNKNOWN, "inception_score": UNKNOWN}
    assert rows_of("table10") == quest_family(expected)


def test_table_11():
    wide, narrow = re.search(r"Table 11.*?: W8A8 (.*)\. W4A4: (.*)", TEXT).groups()
    expected = {
        (bits, METHODS[method]): {"fid": value(fid)}
        for bits, text in (("W8A8", wide), ("W4A4", narrow))
        for method, fid in re.findall(rf"(Q-Diffusion|EfficientDM|QuEST) ({NUMBER})", text)
    }
    assert rows_of("table11") == quest_family(expected) and len(expected) == 6


def test_independent_numbers():
    """The survey's and a user's runs stand beside full precision and QuEST, in every table."""
    expected: dict[tuple[str, str], dict] = {}
    for name, *values in grid(section("## Independent"))[1:]:
        dataset, metrics = name.split(" ", 1)
        keys = [
            {"FID": "fid", "sFID": "sfid", "IS": "inception_score"}[m] for m in metrics.split(" / ")
        ]
        for bits, numbers in zip(BITS, values, strict=True):
            survey = dict(zip(keys, map(value, numbers.split("/")), strict=True))
            expected[dataset.lower(), bits] = {"survey": survey}
    for dataset, numbers in re.findall(
        r"(Bedrooms|Churches|ImageNet) ((?:[\d.]+ / )+[\d.]+)", section("Its FP rows")
    ):
        keys = ("fid", "sfid") if dataset != "ImageNet" else ("inception_score", "fid", "sfid")
        expected[dataset.lower(), "32/32"] = {
            "survey": dict(zip(keys, map(value, numbers.rstrip(".").split("/")), strict=True))
        }
    user = TEXT[TEXT.index("A user of") :]
    for bits, fid in re.findall(r"(FP|W\dA\d) (\d+\.\d+)", user):
        expected["bedrooms", bits.replace("FP", "32/32")]["QuEST issue 20"] = {"fid": float(fid)}
    assert len(expected) == 12
    seen = set()
    for table in ("table3", "table3-churches", "table4", "table9", "table10"):
        for row in get_table(table).rows:
            if row.preset is None or row.preset.startswith("quest"):
                assert row.independent == expected[row.dataset, row.bits], row.id
                seen.add((row.dataset, row.bits))
            else:
                assert row.independent == {}
    assert seen == set(expected)


def test_every_row_has_a_preset_and_known_columns():
    from questlib.presets import PRESETS

    presets = {c.preset for t in all_tables().values() for c in t.rows} - {None}
    assert presets == set(PRESETS)
    for table in all_tables().values():
        for row in table.rows:
            assert all(
                k in COSTS or k in ("fid", "sfid", "inception_score", "clip_score")
                for k in row.paper
            )
