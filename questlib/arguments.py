"""What command lines share: a parser, the options of sampling, and how a command ends.

Nothing here loads torch, so that `--help` and wrong input are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from questlib.diffusion.schedulers import SAMPLERS
from questlib.errors import ConfigError, QuestError


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong input by one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling; `sampling_choices` reads them."""
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (default: 20)")
    parser.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the pipeline's own)")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM eta (default: 0)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="classifier-free guidance (default: 1, which is none)",
    )
    parser.add_argument(
        "--labels", help="class labels separated by commas, taken in turn (default: all classes)"
    )
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line, taken in turn")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")


def sampling_choices(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `questlib.calibrate` and of the drawing of samples.

    Raises:
        ConfigError: labels that are no numbers, or a file of prompts that cannot be read.
    """
    return {
        "num_inference_steps": args.steps,
        "sampler": args.sampler,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
        "labels": None if args.labels is None else _read_labels(args.labels),
        "prompts": None if args.prompts is None else _read_prompts(args.prompts),
        "seed": args.seed,
    }


def _read_labels(text: str) -> list[int]:
    try:
        return [int(label) for label in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--labels: expected whole numbers separated by commas, found {text!r}"
        ) from error


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def run(
    parser: argparse.ArgumentParser, argv: list[str] | None, interrupted: str = "interrupted"
) -> int:
    """Parse `argv` and call the function that the command has set as its default for `run`.

    Returns:
        The exit code: that of the function (0 for None), 2 and one line for a QuestError, 130 and
        the line `interrupted` for Ctrl-C.
    """
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except QuestError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: {interrupted}", file=sys.stderr)
        return 130
