"""The embedded models: train one, measure an exported one again, write the data as images.

python -m reproduce.models.minis train --model mini-ldm4
python -m reproduce.models.minis export --model mini-ldm4
python -m reproduce.models.minis data --data emoji --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from questlib import arguments
from questlib.errors import ConfigError, QuestError
from reproduce.evaluation.features import load_classifier
from reproduce.models.embedded import MINI
from reproduce.models.minis import export, training
from reproduce.models.minis.architectures import MINI_MODELS, NUM_SAMPLES
from reproduce.models.minis.data import ARCHIVES, load_training_data, write_images


def run_train(args: argparse.Namespace) -> None:
    export.check(args.model, args.out, args.reference)
    data = load_training_data(MINI_MODELS[args.model].data, args.work)
    print(f"{len(data.images)} images", flush=True)
    try:
        trained = training.train(args.model, data, args.out, args.work)
        export.export(
            args.model,
            data,
            trained,
            args.work / args.model,
            args.out,
            num_samples=args.samples,
            reference=args.reference,
        )
    except OSError as error:
        raise QuestError(f"training {args.model}: {error}") from error


def run_export(args: argparse.Namespace) -> None:
    if not (args.out / args.model / "training.json").is_file():
        raise ConfigError(
            f"{args.out}: no exported {args.model}; train it with "
            f"python -m reproduce.models.minis train --model {args.model}"
        )
    load_classifier(args.out / "mini-features")  # to fail before the data are loaded
    data = load_training_data(MINI_MODELS[args.model].data, args.work)
    quality = export.finish(args.model, data, args.out, args.samples, args.reference)
    print(json.dumps(quality, indent=1))


def run_data(args: argparse.Namespace) -> None:
    written = write_images(args.data, args.work, args.out, args.count)
    print(f"{args.out}: {written} images")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=MINI_MODELS, default="mini-ldm4", help="(default mini-ldm4)"
    )
    parser.add_argument(
        "--out", type=Path, default=MINI, help="folder of the diffusers folders (default: ours)"
    )
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="of the card's figures")
    parser.add_argument(
        "--reference",
        type=Path,
        help="for mini-cifar: statistics that python -m reproduce reference wrote "
        f"(default: of its first {export.REFERENCE_IMAGES:,} images)",
    )


def _add_work(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help=f"folder of {what}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.models.minis",
        description="Train the embedded models and make their cards.",
    )
    sub = parser.add_subparsers(dest="command", required=True)
    train = sub.add_parser("train", help="all stages of a model, resumable; then its export")
    _add_model(train)
    _add_work(train, "the checkpoints, the logs and the data's archive")
    train.set_defaults(run=run_train)
    again = sub.add_parser("export", help="measure an exported model again and rewrite its card")
    _add_model(again)
    _add_work(again, "the data's archive")
    again.set_defaults(run=run_export)
    data = sub.add_parser("data", help="write the training images as PNG files")
    data.add_argument("--data", choices=ARCHIVES, default="emoji", help="(default emoji)")
    data.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    data.add_argument("--count", type=int, help="the first COUNT images (default: all)")
    _add_work(data, "the data's archive")
    data.set_defaults(run=run_data)
    return arguments.run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
