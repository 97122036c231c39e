"""python -m reproduce.evaluation export-npz SAMPLES OUT.npz; reference IMAGES OUT.safetensors"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from questlib import arguments
from questlib.errors import ConfigError
from questlib.files import check_writable
from reproduce.evaluation.adm import export_npz


def run_export(args: argparse.Namespace) -> None:
    count, height, width, _ = export_npz(args.samples, args.out, args.count)
    print(f"{args.out}: arr_0, {count} images of {height}x{width}")


def run_reference(args: argparse.Namespace) -> None:
    from reproduce.evaluation.reference import load_reference, save_reference  # late: slow imports

    if args.out.suffix != ".safetensors" or args.out.exists():
        raise ConfigError(
            f"{args.out}: expected a new file OUT.safetensors{', this one exists' if args.out.exists() else ''}"
        )
    check_writable(args.out.parent)
    real = load_reference(args.images, args.features)
    if real.pooled is None:
        raise ConfigError(f"{args.images}: statistics without images can be used as they are")
    save_reference(real, args.out, args.features)
    height, width = real.size
    print(f"{args.out}: {args.features} features of {real.count} images of {height}x{width}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproduce.evaluation", description=__doc__)
    sub = parser.add_subparsers(dest="command", required=True)
    e = sub.add_parser(
        "export-npz", help="write the samples of a folder as ADM's .npz (arr_0 uint8 [N, H, W, 3])"
    )
    e.add_argument("samples", type=Path, help="folder of samples (run.json and shards)")
    e.add_argument("out", type=Path, help="a new file, OUT.npz")
    e.add_argument("--count", type=int, help="the first COUNT samples (default: all)")
    e.set_defaults(run=run_export)
    r = sub.add_parser(
        "reference",
        help="what FID and the others compare with, taken once of a folder of images or an .npz",
    )
    r.add_argument(
        "images",
        type=Path,
        help="folder of PNG or JPEG files, or .npz with arr_0 uint8 [N, H, W, 3]",
    )
    r.add_argument("out", type=Path, help="a new file, OUT.safetensors")
    r.add_argument("--features", choices=("inception", "mini"), default="inception")
    r.set_defaults(run=run_reference)
    return arguments.run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
