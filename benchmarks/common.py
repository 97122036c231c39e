"""What the benchmarks share: their command line and their result files.

They also run in a clone that is not installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
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


def run_worker(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run `script --worker ARGUMENTS` in a process of its own; the JSON that it prints last."""
    command = [sys.executable, script, "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def read_models(path: Path) -> dict[str, Any]:
    """What a result file has under "models"; nothing when there is no such file."""
    return json.loads(path.read_text())["models"] if path.is_file() else {}
