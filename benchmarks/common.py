"""What the benchmarks share: their command line and their result files.

They also run in a clone that is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from questlib.files import atomic_path  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def read_models(path: Path) -> dict[str, Any]:
    """What a result file has under "models"; nothing when there is no such file."""
    return json.loads(path.read_text())["models"] if path.is_file() else {}
