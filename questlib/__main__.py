"""python -m questlib quantize PIPELINE --preset quest --bits W4A4 --out DIR"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from questlib import arguments
from questlib.calibration import calibrate
from questlib.checkpoint import save_pretrained
from questlib.config import QuantConfig
from questlib.diffusion.loading import load_pipeline
from questlib.distributed import device, processes
from questlib.errors import ConfigError
from questlib.files import check_writable
from questlib.finetuning.loop import check_shares, finetune
from questlib.post_training import quantize
from questlib.presets import PRESETS


def parse_bits(text: str) -> tuple[int, int]:
    """ "W4A8" -> (4, 8)."""
    match = re.fullmatch(r"[wW](\d+)[aA](\d+)", text)
    if not match:
        raise ConfigError(f"--bits: expected something like W4A4 or W4A8, found {text!r}")
    return int(match[1]), int(match[2])


def parse_overrides(pairs: list[str]) -> dict:
    """["tla_iters=100", "act_range=mse"] -> values as JSON where they parse, text otherwise."""
    values = {}
    for pair in pairs:
        key, sep, value = pair.partition("=")
        if not sep:
            raise ConfigError(f"--set: expected KEY=VALUE, found {pair!r}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def run_quantize(args: argparse.Namespace) -> None:
    overrides = parse_overrides(args.set)
    if "seed" in overrides:
        raise ConfigError(
            f"--set seed: give it as --seed {overrides['seed']}, it is the calibration's too"
        )
    config = QuantConfig.preset(args.preset, *parse_bits(args.bits), **overrides)
    choices = arguments.choices(args)
    check_writable(args.out)
    state = processes()
    check_shares(config.batch_size)
    pipe = load_pipeline(args.pipeline).to(device())
    calib = calibrate(
        pipe, args.samples, batch_size=args.batch_size, progress=state.is_main_process, **choices
    )
    unet = quantize(
        pipe.unet,
        config.replace(seed=args.seed),
        calib,
        cache_dir=args.out / "cache",
        progress=state.is_main_process,
    )
    log = finetune(
        unet,
        pipe.unet,
        calib,
        unet.quest_config,
        state_path=args.out / "finetune.pt",
        progress=state.is_main_process,
    )
    if not state.is_main_process:
        return
    size = save_pretrained(unet, args.out)
    (args.out / "finetune.pt").unlink(
        missing_ok=True
    )  # of another configuration it would stand in the way
    full = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    (args.out / "log.json").write_text(json.dumps({"quantize": unet.quest_log, "finetune": log}))
    print(
        f"{args.out}: {args.preset} {args.bits}, {size / 1e6:.2f} MB on disk ({size / full:.3f} of float32)"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m questlib", description="Quantize a diffusers UNet pipeline with QuEST."
    )
    sub = parser.add_subparsers(dest="command", required=True)
    q = sub.add_parser("quantize", help="calibrate, AdaRound, finetune, save")
    q.add_argument("pipeline", help="embedded name (mini-ldm4), diffusers folder or hub id")
    q.add_argument("--preset", default="quest", help=", ".join(PRESETS))
    q.add_argument(
        "--bits", default="W4A4", help="WxAy with x, y in 2..8, or 16 for off (default W4A4)"
    )
    q.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for model.safetensors, config.json, log.json",
    )
    q.add_argument("--samples", type=int, default=64, help="calibration trajectories (default 64)")
    q.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="trajectories at once; processes share batches out (default 64)",
    )
    arguments.add(q)
    q.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override fields of QuantConfig"
    )
    q.set_defaults(run=run_quantize)
    return arguments.run(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
