"""python -m questlib.models convert MODEL.ckpt --config CONFIG.yaml --out DIR: a CompVis checkpoint as a diffusers folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from questlib.errors import QuestError
from questlib.models.compvis import check_new, config_names, convert, save


def run_convert(args: argparse.Namespace) -> None:
    check_new(args.out)
    pipe = convert(args.checkpoint, args.config, ema=not args.raw, sha256=args.sha256)
    save(pipe, args.out)
    parts = ", ".join(f"{name} {type(part).__name__}" for name, part in pipe.components.items() if part is not None)
    print(f"{args.out}: {type(pipe).__name__} ({parts})")
    if "text_encoder" in pipe.components and pipe.text_encoder is None:
        print("the config names no text encoder: this pipeline takes prompt_embeds and negative_prompt_embeds, not prompts")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m questlib.models", description="Convert CompVis checkpoints to diffusers.")
    sub = parser.add_subparsers(dest="command", required=True)
    c = sub.add_parser("convert", help="write a diffusers folder, which load_pipeline and from_pretrained read")
    c.add_argument("checkpoint", type=Path, help="the original .ckpt; no code in it is executed")
    c.add_argument("--config", required=True, help=f"its YAML, or one of {', '.join(config_names())}")
    c.add_argument("--out", type=Path, required=True, help="a new or empty folder")
    c.add_argument("--raw", action="store_true", help="take the raw weights of the UNet though there are EMA weights")
    c.add_argument("--sha256", help="refuse a checkpoint with another digest")
    args = parser.parse_args(argv)
    try:
        run_convert(args)
    except QuestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
