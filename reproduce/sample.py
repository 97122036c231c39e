"""accelerate launch -m reproduce sample --model M --num-samples N --out DIR: a folder of samples, by any number of processes.

The samples are the same for any number of processes, bit for bit on CPUs; killed and restarted, the command goes on with the
shards that lack. `reproduce.evaluation.samples.read_samples(DIR)` reads them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from questlib import arguments, from_pretrained
from questlib.distributed import device, processes
from questlib.errors import ConfigError
from questlib.files import check_writable
from questlib.integer.engines import CPU_ENGINES
from reproduce.evaluation.drawing import Drawing
from reproduce.evaluation.samples import write_samples
from reproduce.models.loading import load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--model", required=True, help="embedded name, diffusers folder or hub id")
    parser.add_argument("--num-samples", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--unet", type=Path, help="checkpoint of a quantized UNet, in place of the pipeline's own"
    )
    parser.add_argument(
        "--engine",
        default="fake",
        help="of --unet: fake (simulated), cpu, triton or reference (default: fake)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="samples a shard; part of what fixes their bits (default 32)",
    )
    arguments.add(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if min(args.num_samples, args.batch_size, args.steps) < 1:
        found = f"{args.num_samples}, {args.batch_size}, {args.steps}"
        raise ConfigError(
            f"sample: --num-samples, --batch-size and --steps must be >= 1, found {found}"
        )
    if args.unet is None and args.engine != "fake":
        raise ConfigError(f"sample: --engine {args.engine} is of a quantized UNet; give --unet")
    choices = arguments.choices(args)
    check_writable(args.out)
    state = processes()
    where = "cpu" if args.engine in CPU_ENGINES else device()
    pipe = load_pipeline(args.model).to(where)
    unet = None if args.unet is None else from_pretrained(args.unet, args.engine).to(where)
    how = Drawing(pipe, unet=unet, **choices)
    write_samples(
        args.out,
        how.run(args.num_samples, args.batch_size),
        how.draw,
        process_index=state.process_index,
        num_processes=state.num_processes,
        progress=state.is_main_process,
    )
    if state.is_main_process:
        print(f"{args.out}: {args.num_samples} samples of {args.model}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0
