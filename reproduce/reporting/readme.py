"""README and docs/: what is generated in them, from the results.

A page has blocks between `<!-- generated: NAME -->` and `<!-- end: NAME -->`. The pages of
docs/results are generated as a whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from questlib.errors import QuestError
from questlib.files import atomic_path
from reproduce.provenance import machine
from reproduce.reporting import (
    benchmarks,
    findings,
    overview,
    report,
    results_pages,
    run_times,
    support,
)
from reproduce.store import write_json

BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", re.S)
BEGIN = re.compile(r"<!-- generated: (\S+) -->")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")

# Each is given the folder of results. Links in its text are seen from the repository's root.
BLOCKS: dict[str, Callable[[Path], str]] = {
    "picture": overview.picture,
    "budget": overview.budget,
    "savings": benchmarks.savings,
    "main-claims": overview.main_claims,
    "reproduce": overview.reproduce,
    "claims": overview.all_claims,
    "findings": findings.answers,
    "commands": run_times.commands,
    "engines": benchmarks.engines,
    "estimate": benchmarks.estimate,
    "full-size": benchmarks.full_size,
    "machines": benchmarks.machines,
    "quantizing": benchmarks.quantizing,
    "adaround": benchmarks.adaround,
    "release": benchmarks.release,
    "paper": overview.paper_scale,
    "support": support.table,
    "support-counts": support.counts,
}
# Written when the site is built: see `reproduce.reporting.site`.
AT_BUILD = ("commands-reference",)


def rebased(markdown: str, place: str) -> str:
    """Markdown whose relative links are seen from `place`, not from the repository's root."""
    return LINK.sub(lambda found: os.path.relpath(found[1], place or "."), markdown)


def fill(text: str, folder: Path, place: str = "") -> str:
    """`text` with every block written again from the results in `folder`.

    Args:
        place: the page's folder, from the repository's root.

    Raises:
        QuestError: an unknown block, or one without an end.
        ResultError: a result file is damaged, or of an older layout.
    """
    begun = BEGIN.findall(text)
    ended = [found.group(2) for found in BLOCK.finditer(text)]
    if begun != ended:
        raise QuestError(f"block {begun[0]}: expected <!-- end: NAME --> after each block")
    if unknown := sorted(set(begun) - {*BLOCKS, *AT_BUILD}):
        raise QuestError(
            f"block {', '.join(unknown)}: expected one of {', '.join([*BLOCKS, *AT_BUILD])}"
        )

    def written(found: re.Match[str]) -> str:
        name = found[2]
        return (
            found[0]
            if name in AT_BUILD
            else f"{found[1]}{rebased(BLOCKS[name](folder), place)}\n{found[3]}"
        )

    return BLOCK.sub(written, text)


def pages(root: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Every page of README and docs/, with the text that it should have."""
    whole = results_pages.all_pages(folder)
    for name, text in whole.items():
        yield root / name, rebased(text, os.path.dirname(name))
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        name = path.relative_to(root).as_posix()
        if name not in whole:
            yield path, fill(path.read_text(encoding="utf-8"), folder, os.path.dirname(name))


def update(root: Path, folder: Path, work: Path) -> list[Path]:
    """Write README, docs/, and every table's markdown, HTML and picture.

    The time that `make test` left in `work` is kept in the results.

    Returns:
        The pages that changed.
    """
    if (test := work / "test-time.json").is_file():
        took = json.loads(test.read_text(encoding="utf-8"))
        about = {"command": "make test"} | took | {"machine": machine()}
        write_json(folder / "mini" / "test.json", about)
    for results in report.all_committed(folder).values():
        if results.done:
            report.finish(results.plan)
    changed = []
    for path, text in list(pages(root, folder)):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed
