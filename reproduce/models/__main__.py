"""The paper's checkpoints: download one, and make a diffusers folder of it.

python -m reproduce.models download sd-v1-4 --out DIR
python -m reproduce.models convert DIR/sd-v1-4.ckpt --config sd-v1-4 --out FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from questlib import arguments
from questlib.files import check_new
from reproduce.models.compvis import convert_checkpoint, save_pipeline
from reproduce.models.compvis_files import config_names
from reproduce.models.download import CHECKPOINTS, download_checkpoint


def run_convert(args: argparse.Namespace) -> None:
    check_new(args.out)
    pipe = convert_checkpoint(args.checkpoint, args.config, ema=not args.raw, sha256=args.sha256)
    save_pipeline(pipe, args.out)
    parts = ", ".join(
        f"{name} {type(part).__name__}"
        for name, part in pipe.components.items()
        if part is not None
    )
    print(f"{args.out}: {type(pipe).__name__} ({parts})")
    if "text_encoder" in pipe.components and pipe.text_encoder is None:
        print(
            "the config names no text encoder: this pipeline takes prompt_embeds and "
            "negative_prompt_embeds, not prompts"
        )


def run_download(args: argparse.Namespace) -> None:
    path = download_checkpoint(args.name, args.out)
    print(
        f"{path}; now: python -m reproduce.models convert {path} --config {args.name} --out FOLDER"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.models",
        description="Download and convert the paper's checkpoints.",
    )
    sub = parser.add_subparsers(dest="command", required=True)
    d = sub.add_parser(
        "download", help="one of the paper's checkpoints; a broken download is resumed"
    )
    d.add_argument("name", help=", ".join(CHECKPOINTS))
    d.add_argument("--out", type=Path, required=True, help="folder for NAME.ckpt")
    d.set_defaults(run=run_download)
    c = sub.add_parser(
        "convert", help="write a diffusers folder, which load_pipeline and from_pretrained read"
    )
    c.add_argument("checkpoint", type=Path, help="the original .ckpt; no code in it is executed")
    c.add_argument(
        "--config", required=True, help=f"its YAML, or one of {', '.join(config_names())}"
    )
    c.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    c.add_argument(
        "--raw",
        action="store_true",
        help="take the raw weights of the UNet though there are EMA weights",
    )
    c.add_argument("--sha256", help="refuse a checkpoint with another digest")
    c.set_defaults(run=run_convert)
    return arguments.run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
