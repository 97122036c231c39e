"""A folder of samples, drawn by any number of processes: accelerate launch -m reproduce sample.

On CPUs the samples are the same for any number of processes, bit for bit: each process computes
with the same number of threads, on which the order of sums depends, and a folder refuses another
one. Killed and restarted, the command goes on with the shards that are missing.
`reproduce.evaluation.samples.read_samples` reads the folder.
"""

from __future__ import annotations

import argparse

import torch

from questlib import arguments
from questlib.diffusion.drawing import Drawing
from questlib.distributed import cpu_threads, processes, use_full_float32
from questlib.errors import ConfigError
from questlib.files import check_writable
from reproduce.evaluation.samples import write_samples
from reproduce.models.loading import load_pipeline


def run(args: argparse.Namespace) -> None:
    """Draw what the command line asks for (`reproduce.__main__.add_sample`).

    Raises:
        ConfigError: options that contradict each other, or a model that is not there.
    """
    if min(args.num_samples, args.batch_size, args.steps) < 1:
        raise ConfigError(
            "sample: --num-samples, --batch-size and --steps must be >= 1, "
            f"found {args.num_samples}, {args.batch_size}, {args.steps}"
        )
    if args.threads < 1:
        raise ConfigError(f"sample: --threads must be >= 1, found {args.threads}")
    if args.unet is None and args.engine != "fake":
        raise ConfigError(f"sample: --engine {args.engine} is of a quantized UNet; give --unet")
    sampling = arguments.sampling_choices(args)
    check_writable(args.out)

    machine = arguments.machine_choices(args)
    state = processes()
    use_full_float32()
    unet = None if args.unet is None else machine.load(args.unet)
    drawing = Drawing(machine.put(load_pipeline(args.model)), unet=unet, **sampling)
    about = {}  # what decides samples beside the drawing, which a folder refuses to mix
    on_cpu = machine.device.type == "cpu"
    if on_cpu:
        about["threads"] = args.threads
    if unet is not None and machine.engine != "fake":
        about |= {"engine": machine.engine, "fused": unet.quest_fused}
    with cpu_threads(args.threads if on_cpu else torch.get_num_threads()):
        write_samples(
            args.out,
            drawing.run(args.num_samples, args.batch_size) | about,
            drawing.draw,
            process_index=state.process_index,
            num_processes=state.num_processes,
            progress=state.is_main_process,
        )
    if state.is_main_process:
        how = machine.says(drawing.unet)
        print(f"{args.out}: {args.num_samples} samples of {args.model} ({how})")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
