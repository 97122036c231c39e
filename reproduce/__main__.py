"""Reproduce the paper's tables: python -m reproduce TABLE --scale smoke|mini|full|paper.

This module loads nothing heavy, so that `--help` and wrong input are answered at once. Each
command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from questlib import arguments
from questlib.errors import ConfigError
from questlib.files import check_writable
from reproduce import choices, environment
from reproduce.tables.registry import all_tables


def run_table(args: argparse.Namespace) -> int:
    """Make a table's rows and report them; exit code 1 if a row failed."""
    from reproduce.plan import make_plan

    plan = make_plan(args.command, choices.from_arguments(args), dry=args.dry_run)
    if args.dry_run:
        from reproduce import estimate

        print(estimate.dry_run(plan))
        return 0
    from reproduce import notebooks
    from reproduce.reporting import printed
    from reproduce.results import Status

    plan = notebooks.unfinished(plan) if args.unfinished else plan
    notebooks.preflight(plan)
    start = time.monotonic()
    results = notebooks.run(plan)
    if args.json:
        print(printed.as_json(results))
    else:
        print(
            printed.terminal(results),
            printed.closing(results, time.monotonic() - start),
            sep="\n\n",
        )
    return int(any(results[row.id].status == Status.FAILED for row in plan.rows))


def run_sample(args: argparse.Namespace) -> None:
    """Draw a folder of samples."""
    from reproduce import sample

    sample.run(args)


def run_readme(args: argparse.Namespace) -> None:
    """Write what is generated in README and docs/."""
    from reproduce.reporting import readme

    changed = readme.update(Path(), args.results, args.work)
    print("\n".join(f"{path} written" for path in changed) or "README.md and docs/ were up to date")


def run_notebooks(args: argparse.Namespace) -> None:
    """Execute notebooks in place."""
    from reproduce import notebooks

    notebooks.execute_in_place(args.paths or sorted(notebooks.NOTEBOOKS.glob("*.ipynb")))


def run_export(args: argparse.Namespace) -> None:
    """Write samples in the format of ADM's evaluator."""
    from reproduce.evaluation.adm import export_npz

    count, height, width = export_npz(args.samples, args.out, args.count)[:3]
    print(f"{args.out}: arr_0, {count} images of {height}x{width}")


def run_reference(args: argparse.Namespace) -> None:
    """Write reference statistics for FID."""
    from reproduce.evaluation.reference import load_reference, save_reference

    if args.out.suffix != ".safetensors" or args.out.exists():
        found = f"{args.out} exists" if args.out.exists() else str(args.out)
        raise ConfigError(f"reference: expected a new file OUT.safetensors, found {found}")
    check_writable(args.out.parent)
    real = load_reference(args.images, args.features)
    if real.pooled is None or real.size is None:
        raise ConfigError(f"{args.images}: statistics without images can be used as they are")
    save_reference(real, args.out, args.features)
    height, width = real.size
    print(f"{args.out}: {args.features} features of {real.num_images} images of {height}x{width}")


def add_table(parser: argparse.ArgumentParser) -> None:
    """The options of a table: its choices, and what is done with them."""
    choices.add_options(parser)
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="run only rows that --results lacks, or has of other code or settings",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what each row is, would take and would lack; run nothing",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the results as JSON to stdout, and nothing else there",
    )
    parser.set_defaults(run=run_table)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""
    parser.add_argument("--model", required=True, help="embedded name, diffusers folder or hub id")
    parser.add_argument("--num-samples", type=int, required=True, help="number of samples")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--unet", type=Path, help="checkpoint of a quantized UNet, in place of the pipeline's own"
    )
    arguments.add_engine(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="samples a shard; part of what fixes their bits (default: 32)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of each process; part of what fixes their bits (default: 1)",
    )
    arguments.add_sampling(parser)
    arguments.add_machine(parser)
    parser.set_defaults(run=run_sample)


def add_readme(parser: argparse.ArgumentParser) -> None:
    """The options of `readme`."""
    parser.add_argument("--results", type=Path, default=Path("results"), help="(default: results)")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="(default: runs)")
    parser.set_defaults(run=run_readme)


def add_notebooks(parser: argparse.ArgumentParser) -> None:
    """The options of `notebooks`."""
    parser.add_argument("paths", type=Path, nargs="*", help="notebooks (default: all)")
    parser.set_defaults(run=run_notebooks)


def add_export(parser: argparse.ArgumentParser) -> None:
    """The options of `export-npz`."""
    parser.add_argument("samples", type=Path, help="folder of samples (run.json and shards)")
    parser.add_argument("out", type=Path, help="a new file, OUT.npz")
    parser.add_argument("--count", type=int, help="the first COUNT samples (default: all)")
    parser.set_defaults(run=run_export)


def add_reference(parser: argparse.ArgumentParser) -> None:
    """The options of `reference`."""
    parser.add_argument(
        "images",
        type=Path,
        help="folder of PNG or JPEG files, or .npz with arr_0 uint8 [N, H, W, 3]",
    )
    parser.add_argument("out", type=Path, help="a new file, OUT.safetensors")
    parser.add_argument(
        "--features",
        choices=choices.FEATURES,
        default="inception",
        help="features of the statistics (default: inception)",
    )
    parser.set_defaults(run=run_reference)


# Beside the tables. Name: help, what adds its options, and examples without the program's name.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], tuple[str, ...]]] = {
    "sample": (
        "draw a folder of samples, by any number of processes",
        add_sample,
        (
            "sample --model mini-ldm4 --num-samples 1000 --out samples",
            "sample --model mini-ldm4 --unet ldm4-w4a4 --engine cpu --num-samples 1000 --out w4a4",
        ),
    ),
    "export-npz": (
        "write a folder of samples as ADM's .npz (arr_0 uint8 [N, H, W, 3])",
        add_export,
        ("export-npz samples samples.npz",),
    ),
    "reference": (
        "take the reference statistics for FID once, from images",
        add_reference,
        ("reference lsun/bedrooms bedrooms.safetensors",),
    ),
    "readme": ("write what is generated in README.md and docs/", add_readme, ()),
    "notebooks": (
        "execute notebooks in place",
        add_notebooks,
        ("notebooks notebooks/00_tour.ipynb",),
    ),
}

# Of a table: what is said of its command, with examples.
TABLE_EXAMPLES = (
    "{table} --scale smoke            # a minute, to see that it runs",
    "{table}                          # at mini scale, on two CPU cores",
    "{table} --stored                 # from the results that are there",
    "{table} --scale paper --dry-run  # what it needs, and how many GPU hours",
)


def parser() -> arguments.Parser:
    """The parser of `python -m reproduce`."""
    program = "python -m reproduce"

    def written(examples: Iterable[str], table: str = "table3") -> list[str]:
        return [f"{program} {example.format(table=table)}" for example in examples]

    whole = arguments.Parser(
        prog=program,
        description="Reproduce the paper's tables and figures.",
        examples=written(TABLE_EXAMPLES),
    )
    arguments.add_version(whole)
    commands = whole.add_subparsers(dest="command", required=True, metavar="TABLE or COMMAND")
    for name, table in all_tables().items():
        examples = written(TABLE_EXAMPLES, name)
        add_table(
            commands.add_parser(name, help=table.title, description=table.title, examples=examples)
        )
    for name, (about, add_options, own) in COMMANDS.items():
        examples = written(own)
        add_options(commands.add_parser(name, help=about, description=about, examples=examples))
    return whole


def stopped(number: int, frame: object) -> None:
    """SIGTERM ends the run as Ctrl-C does, so that the notebook's kernel is shut down too."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    environment.set_defaults()  # before torch is loaded
    signal.signal(signal.SIGTERM, stopped)
    return arguments.run(
        parser(), argv, interrupted="interrupted; the same command goes on where this stopped"
    )


if __name__ == "__main__":
    sys.exit(main())
