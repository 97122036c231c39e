"""Quantize a pipeline, and draw images with the result: python -m questlib quantize | sample."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from questlib import arguments
from questlib.config import QuantConfig
from questlib.errors import ConfigError
from questlib.files import atomic_path, check_new, check_writable
from questlib.presets import PRESETS

LOG = "log.json"  # beside a checkpoint: its pipeline, and how quantizing went
IMAGES = 8  # that `sample` draws when nothing says how many

# ---- quantize ----


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
    from questlib import calibrate, finetune, load_pipeline, quantize, save_pretrained
    from questlib.denoisers import unet_of
    from questlib.distributed import processes, use_full_float32
    from questlib.finetuning.loop import check_batch_sizes

    machine = arguments.machine_choices(args)
    state = processes()
    check_batch_sizes(config)
    use_full_float32()
    pipe = machine.put(load_pipeline(args.pipeline))
    denoiser = unet_of(pipe)
    progress = state.is_main_process
    cache = args.out / "cache"
    calibration = calibrate(
        pipe,
        args.samples,
        batch_size=args.batch_size,
        cache_dir=cache,
        progress=progress,
        **sampling,
    )
    unet = quantize(
        denoiser,
        config.replace(seed=args.seed),
        calibration,
        cache_dir=cache,
        progress=progress,
    )
    state_path = args.out / "finetune.pt"
    log = finetune(
        unet, denoiser, calibration, unet.quest_config, state_path=state_path, progress=progress
    )
    if not state.is_main_process:
        return
    size = save_pretrained(unet, args.out)
    about = {"pipeline": _public(args.pipeline), "quantize": unet.quest_log, "finetune": log}
    with atomic_path(args.out / LOG) as temporary:
        temporary.write_text(json.dumps(about), encoding="utf-8")

    # What a stopped run would go on from. A later run into this folder, of another configuration,
    # would refuse the state.
    state_path.unlink(missing_ok=True)
    shutil.rmtree(cache, ignore_errors=True)
    full = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    print(
        f"{args.out}: {args.preset} {args.bits}, {size / 1e6:.2f} MB on disk "
        f"({size / full:.3f} of float32)"
    )


def _public(pipeline: str) -> str | None:
    """The name that others have for a pipeline, too; None for a folder of this machine."""
    return None if Path(pipeline).exists() else pipeline


# ---- sample ----


def run_sample(args: argparse.Namespace) -> None:
    """Draw images with a quantized checkpoint in its pipeline, or with a pipeline as it is."""
    sampling = arguments.sampling_choices(args)
    count = args.count
    if count is None:
        count = len(args.prompt or sampling["labels"] or ()) or IMAGES
    if min(count, args.batch_size) < 1:
        raise ConfigError(
            f"sample: --count and --batch-size must be >= 1, found {count}, {args.batch_size}"
        )
    checkpoint, pipeline = find_models(args)
    check_new(args.out)

    from PIL import Image
    from tqdm import tqdm

    from questlib import load_pipeline
    from questlib.diffusion.drawing import Drawing
    from questlib.diffusion.sampling import index_ranges
    from questlib.distributed import use_full_float32

    machine = arguments.machine_choices(args)
    use_full_float32()
    unet = None if checkpoint is None else machine.load(checkpoint)
    drawing = Drawing(machine.put(load_pipeline(pipeline)), unet=unet, **sampling)
    for indices in index_ranges(count, args.batch_size):
        about = f"images {indices.start + 1} to {indices.stop} of {count}"
        images = drawing.draw(indices, partial(tqdm, desc=about)).images
        for i, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            with atomic_path(args.out / f"{i:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="png")
    how = machine.says(drawing.unet)
    print(f"{args.out}: {count} images, 000000.png to {count - 1:06d}.png ({how})")


def find_models(args: argparse.Namespace) -> tuple[Path | None, str]:
    """The quantized checkpoint, if one is to be run, and the name of its pipeline.

    Raises:
        ConfigError: the choices contradict each other, or a checkpoint's pipeline is not known.
    """
    folder = Path(args.model)
    if not (folder / "config.json").is_file():
        if args.engine != "fake" or args.pipeline is not None:
            option = "--pipeline" if args.engine == "fake" else "--engine"
            raise ConfigError(
                f"sample: {option} is for a quantized checkpoint, a folder with config.json; "
                f"found {args.model}"
            )
        return None, args.model
    pipeline = args.pipeline or _logged_pipeline(folder / LOG)
    if pipeline is None:
        raise ConfigError(f"sample: {folder} does not say which pipeline it is of; give --pipeline")
    return folder, pipeline


def _logged_pipeline(log: Path) -> str | None:
    """The pipeline that `quantize` has noted; None if there is no log, or it says nothing."""
    try:
        return json.loads(log.read_text(encoding="utf-8")).get("pipeline")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{log}: cannot be read ({error}); give --pipeline") from error


# ---- the command line ----


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize`."""
    parser.add_argument("pipeline", help="embedded name (mini-ldm4), diffusers folder or hub id")
    parser.add_argument("--preset", default="quest", help=f"{', '.join(PRESETS)} (default: quest)")
    parser.add_argument(
        "--bits", default="W4A4", help="WxAy with x, y in 2..8, or 16 for off (default: W4A4)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for model.safetensors, config.json, log.json",
    )
    parser.add_argument(
        "--samples", type=int, default=64, help="calibration trajectories (default: 64)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="trajectories at once; processes share batches out (default: 64)",
    )
    arguments.add_sampling(parser)
    arguments.add_machine(parser)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override fields of QuantConfig"
    )
    parser.set_defaults(run=run_quantize)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""
    parser.add_argument(
        "model",
        help="folder that `quantize` wrote; or a pipeline in full precision: embedded name, "
        "diffusers folder or hub id",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the PNG files")
    parser.add_argument(
        "--pipeline", help="of the checkpoint (default: the one that it was made of)"
    )
    arguments.add_engine(parser)
    parser.add_argument(
        "--count",
        type=int,
        help=f"number of images (default: one a --prompt or label, or {IMAGES})",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (default: 8)")
    arguments.add_sampling(parser)
    arguments.add_machine(parser)
    parser.set_defaults(run=run_sample)


# Name: help, what adds its options, and examples.
COMMANDS = {
    "quantize": (
        "calibrate, AdaRound, finetune, save",
        add_quantize,
        (
            "python -m questlib quantize mini-ldm4 --out ldm4-w4a4",
            "python -m questlib quantize mini-sd --bits W4A8 --out sd-w4a8 \\",
            "      --guidance-scale 3 --prompts prompts.txt",
            "python -m questlib quantize mini-ldm4 --out quick --set tla_iters=50 cma_iters=120",
        ),
    ),
    "sample": (
        "draw images with a quantized checkpoint",
        add_sample,
        (
            "python -m questlib sample ldm4-w4a4 --engine cpu --out images",
            "python -m questlib sample sd-w4a8 --out surfing \\",
            '      --guidance-scale 3 --prompt "man surfing"',
            "python -m questlib sample ldm4-w4a4 --engine auto --dtype bfloat16 --out half",
            "python -m questlib sample mini-ldm4 --out full-precision",
        ),
    ),
}


def parser() -> arguments.Parser:
    """The parser of `python -m questlib`."""
    first = [examples[0] for _, _, examples in COMMANDS.values()]
    whole = arguments.Parser(
        prog="python -m questlib",
        description="Quantize a diffusers UNet pipeline with QuEST, and draw images with it.",
        examples=first,
    )
    arguments.add_version(whole)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, add_options, examples) in COMMANDS.items():
        add_options(commands.add_parser(name, help=about, description=about, examples=examples))
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return arguments.run(
        parser(), argv, interrupted="interrupted; the same command goes on where this stopped"
    )


if __name__ == "__main__":
    sys.exit(main())
