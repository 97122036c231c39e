"""Loads damaged files, and counts what comes of it: an error of ours, or the same as before.

    python tests/fuzz/fuzzer.py --mutants 10000

Anything else is a fault: other outputs, NaN, an error of another library, a hang.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mutants import mutate
from subjects import Subject, make_subjects

from questlib.errors import QuestError

OUTCOMES = ("typed", "same", "different", "nan", "untyped", "hang")
GOOD = ("typed", "same")
SECONDS = 20  # a load that takes longer hangs; they take 0.1 s


class Fault(NamedTuple):
    """A damage that was not noticed as it should be."""

    subject: str
    number: int
    file: str
    outcome: str
    detail: str


class Hang(Exception):
    """A load took too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hang in the block after some seconds."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(
    load: Callable[[], str], expected: str, others: tuple[type[Exception], ...]
) -> tuple[str, str]:
    """What comes of a load, and a word about it. `others` are errors that count as ours."""
    try:
        with limited(SECONDS):
            found = load()
    except QuestError as error:
        line = str(error)
        return ("typed", line) if "\n" not in line else ("untyped", f"several lines: {line!r}")
    except Hang:
        return "hang", ""
    except others as error:
        return "typed", str(error)
    except Exception as error:  # noqa: BLE001 (any error is looked for)
        return "untyped", f"{type(error).__name__}: {str(error)[:200]}"
    if found == "nan":
        return "nan", ""
    return ("same", "") if found == expected else ("different", "")


def fuzz(subject: Subject, count: int, seed: int) -> tuple[Counter[str], list[Fault]]:
    """Load `count` mutants of a subject."""
    counts: Counter[str] = Counter()
    faults = []
    whole = {
        str(p.relative_to(subject.folder)): p.read_bytes()
        for p in sorted(subject.folder.rglob("*"))
        if p.is_file()
    }
    expected = subject.load(subject.folder)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / subject.folder.name
        for name, data in whole.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        assert subject.load(folder) == expected
        for number in range(count):
            rng = random.Random(f"{seed}-{subject.name}-{number}")
            name = rng.choice([n for n in whole if n.endswith(subject.damages)])
            (folder / name).write_bytes(mutate(rng, name, whole[name]))
            outcome, detail = outcome_of(lambda: subject.load(folder), expected, subject.others)
            counts[outcome] += 1
            if outcome not in GOOD:
                faults.append(Fault(subject.name, number, name, outcome, detail))
            (folder / name).write_bytes(whole[name])
    return counts, faults


def table(counts: dict[str, Counter[str]]) -> str:
    """Outcomes by subject."""
    width = max(map(len, counts))
    lines = [" ".join([" " * width, *(f"{name:>9}" for name in OUTCOMES)])]
    for name, found in counts.items():
        lines.append(" ".join([f"{name:{width}}", *(f"{found[o]:9}" for o in OUTCOMES)]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=300, help="of all kinds of files together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        subjects = [s for s in make_subjects(Path(place)) if args.only in (None, s.name)]
        found = {}
        for subject in subjects:
            count = -(-args.mutants * subject.share // sum(s.share for s in subjects))
            found[subject.name], faults = fuzz(subject, count, args.seed)
            for fault in faults:
                print(*fault, file=sys.stderr)
    print(table(found))
    return int(any(o not in GOOD for counts in found.values() for o in counts))


if __name__ == "__main__":
    sys.exit(main())
