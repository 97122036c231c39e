"""python -m questlib quantize PIPELINE --preset quest --bits W4A4 --out DIR"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from questlib import arguments
from questlib.config import QuantConfig
from questlib.errors import ConfigError
from questlib.files import atomic_path, check_writable
from questlib.presets import PRESETS


def parse_bits(text: str) -> tuple[int, int]:
    """ "W4A8" -> (4, 8)."""
    match = re.fullmatch(r"[wW](\d+)[aA](\d+)", text)
    if not match:
        raise ConfigError(f"--bits: expected something like W4A4 or W4A8, found {text!r}")
    return int(match[1]), int(match[2])


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """["tla_iters=100", "act_range=mse"] -> values as JSON where they parse, text otherwise."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set: expected KEY=VALUE, found {pair!r}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def run_quantize(args: argparse.Namespace) -> None:
    """Calibrate, quantize, finetune and save."""
    overrides = parse_overrides(args.set)
    if "seed" in overrides:
        raise ConfigError(
            f"--set seed: give it as --seed {overrides['seed']}, it is the calibration's too"
        )
    config = QuantConfig.preset(args.preset, *parse_bits(args.bits), **overrides)
    sampling = arguments.sampling_choices(args)
    check_writable(args.out)

    # These load torch and diffusers. Wrong input was answered before.
    from questlib import calibrate, finetune, quantize, save_pretrained
    from questlib.diffusion.loading import find_loader
    from questlib.distributed import device, processes, use_full_float32
    from questlib.finetuning.loop import check_batch_sizes

    state = processes()
    check_batch_sizes(config)
    use_full_float32()
    pipe = find_loader()(args.pipeline).to(device())
    progress = state.is_main_process
    calibration = calibrate(
        pipe, args.samples, batch_size=args.batch_size, progress=progress, **sampling
    )
    unet = quantize(
        pipe.unet,
        config.replace(seed=args.seed),
        calibration,
        cache_dir=args.out / "cache",
        progress=progress,
    )
    state_path = args.out / "finetune.pt"
    log = finetune(
        unet, pipe.unet, calibration, unet.quest_config, state_path=state_path, progress=progress
    )
    if not state.is_main_process:
        return
    size = save_pretrained(unet, args.out)

    # The next run into this folder may have another configuration, which would refuse this state.
    state_path.unlink(missing_ok=True)
    with atomic_path(args.out / "log.json") as temporary:
        temporary.write_text(json.dumps({"quantize": unet.quest_log, "finetune": log}))
    full = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    print(
        f"{args.out}: {args.preset} {args.bits}, {size / 1e6:.2f} MB on disk "
        f"({size / full:.3f} of float32)"
    )


def parser() -> arguments.Parser:
    """The parser of `python -m questlib`."""
    whole = arguments.Parser(
        prog="python -m questlib", description="Quantize a diffusers UNet pipeline with QuEST."
    )
    commands = whole.add_subparsers(dest="command", required=True)
    quantize = commands.add_parser("quantize", help="calibrate, AdaRound, finetune, save")
    quantize.add_argument("pipeline", help="embedded name (mini-ldm4), diffusers folder or hub id")
    quantize.add_argument("--preset", default="quest", help=", ".join(PRESETS))
    quantize.add_argument(
        "--bits", default="W4A4", help="WxAy with x, y in 2..8, or 16 for off (default: W4A4)"
    )
    quantize.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for model.safetensors, config.json, log.json",
    )
    quantize.add_argument(
        "--samples", type=int, default=64, help="calibration trajectories (default: 64)"
    )
    quantize.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="trajectories at once; processes share batches out (default: 64)",
    )
    arguments.add_sampling(quantize)
    quantize.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override fields of QuantConfig"
    )
    quantize.set_defaults(run=run_quantize)
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return arguments.run(
        parser(), argv, interrupted="interrupted; the same command goes on where this stopped"
    )


if __name__ == "__main__":
    sys.exit(main())
