"""What command lines share: options of sampling (`add(parser)`, then `choices(args)`), and how a command ends (`run`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from questlib.diffusion.schedulers import SAMPLERS
from questlib.errors import ConfigError, QuestError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (default 20)")
    parser.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the pipeline's own)")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM eta (default 0)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="classifier-free guidance (default 1: none)",
    )
    parser.add_argument(
        "--labels", help="class labels separated by commas, taken in turn (default: all classes)"
    )
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line, taken in turn")
    parser.add_argument("--seed", type=int, default=0)


def run(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parse, call what the command has set as `run`, and give the exit code: 2, and one line, for a QuestError."""
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except QuestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def choices(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `questlib.calibrate` and `questlib.diffusion.sampling.Drawing`. ConfigError for labels or a file that cannot be read."""
    labels = prompts = None
    if args.labels is not None:
        try:
            labels = [int(label) for label in args.labels.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"--labels: expected whole numbers separated by commas, found {args.labels!r}"
            ) from error
    if args.prompts is not None:
        try:
            prompts = [
                line.strip() for line in args.prompts.read_text().splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts: {args.prompts} cannot be read ({error})") from error
    return {
        "num_inference_steps": args.steps,
        "sampler": args.sampler,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
        "labels": labels,
        "prompts": prompts,
        "seed": args.seed,
    }
