"""python -m reproduce TABLE --scale smoke|mini|paper [--dry-run]; python -m reproduce sample | readme | notebooks | site."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from questlib.errors import ConfigError, QuestError
from reproduce.plan import make_plan
from reproduce.scales import SCALES
from reproduce.tables.registry import all_tables


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, exit code 2."""
        print(f"python -m reproduce: {message}", file=sys.stderr)
        raise SystemExit(2)


def parser() -> Parser:
    p = Parser(prog="python -m reproduce", description=__doc__)
    p.add_argument(
        "what",
        help=f"{', '.join(all_tables())}; sample: see sample --help; readme: write its generated blocks; "
        "notebooks: execute them in place; site: all of it as HTML",
    )
    p.add_argument("--scale", default="mini", help=f"{', '.join(SCALES)} (default: mini)")
    p.add_argument("--cells", help="some of the table's cells, separated by commas (default: all)")
    p.add_argument("--seeds", help="numbers separated by commas (default: the scale's)")
    p.add_argument(
        "--keep-seeds",
        action="store_true",
        help="other seeds that a row's earlier result has stay in it",
    )
    p.add_argument(
        "--stored",
        action="store_true",
        help="show the rows that results has, run nothing: a minute at any scale",
    )
    p.add_argument(
        "--unfinished",
        action="store_true",
        help="run only rows that results lacks, or has of other code or settings",
    )
    p.add_argument("--features", help="mini or inception (default: the scale's)")
    p.add_argument(
        "--engine",
        help="fake (simulated), cpu, triton or reference (integers); results in TABLE-ENGINE (default: fake)",
    )
    p.add_argument(
        "--model", help="embedded name, diffusers folder or hub id (default: the scale's)"
    )
    p.add_argument(
        "--reference",
        help="for FID: embedded name, folder of images, .npz or .safetensors (default: the scale's)",
    )
    p.add_argument(
        "--captions",
        help="prompts of Stable Diffusion: COCO's captions_val2014.json (default: the scale's)",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="what each cell is, would take and would lack; nothing is run",
    )
    p.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        help="result JSON, tables, notebooks (default: results)",
    )
    p.add_argument(
        "--work",
        type=Path,
        default=Path("runs"),
        help="products of the stages, to go on from (default: runs)",
    )
    p.add_argument(
        "--out", type=Path, default=Path("site"), help="folder of the HTML site (default: site)"
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="print the results as JSON to stdout, and nothing else there",
    )
    return p


def reproduce_table(args: argparse.Namespace) -> int:
    seeds = None
    if args.seeds is not None:
        try:
            seeds = [int(s) for s in args.seeds.split(",")]
        except ValueError as error:
            raise ConfigError(
                f"seeds: expected whole numbers separated by commas, found {args.seeds!r}"
            ) from error
    plan = make_plan(
        args.what,
        scale=args.scale,
        cells=args.cells.split(",") if args.cells is not None else None,
        seeds=seeds,
        features=args.features,
        engine=args.engine,
        model=args.model,
        reference=args.reference,
        captions=args.captions,
        results=args.results,
        work=args.work,
        keep_seeds=args.keep_seeds,
        stored=args.stored,
        dry=args.dry_run,
    )
    if args.dry_run:
        from reproduce import estimate

        print(estimate.dry_run(plan))
        return 0
    from reproduce import notebooks  # here: bad input is answered before the slow imports
    from reproduce.reporting import report

    plan = notebooks.unfinished(plan) if args.unfinished else plan
    notebooks.preflight(plan)
    results = notebooks.run(plan)
    print(report.as_json(plan, results) if args.json else report.terminal(plan, results))
    asked = {c.id for c in plan.cells}
    return int(any(r["status"] == "failed" for r in results if r["cell"] in asked))


def stopped(number: int, frame: object) -> None:
    """SIGTERM ends the run as Ctrl-C does, so that the notebook's kernel is shut down too."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv) if argv[:1] != ["sample"] else None
    signal.signal(signal.SIGTERM, stopped)
    try:
        if args is None:
            from reproduce import sample

            return sample.run(
                sample.add_arguments(Parser(prog="python -m reproduce sample")).parse_args(argv[1:])
            )
        if args.what == "readme":
            from reproduce.reporting import readme

            changed = readme.update(Path("README.md"), args.results, args.work)
            print("README.md written" if changed else "README.md was up to date")
            return 0
        if args.what == "notebooks":
            from reproduce import notebooks

            notebooks.execute_in_place(sorted(notebooks.NOTEBOOKS.glob("*.ipynb")))
            return 0
        if args.what == "site":
            from reproduce.reporting import site

            print(f"{site.build(args.out, args.results)} pages: {args.out / 'index.html'}")
            return 0
        return reproduce_table(args)
    except QuestError as error:
        print(f"python -m reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "python -m reproduce: interrupted; the same command goes on where this stopped",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
