"""The Triton engine on an NVIDIA GPU: is it right, and how fast is it?

    python benchmarks/gpu.py                    # about 9 minutes on an H200
    python benchmarks/gpu.py --budget 200 --sections correctness,peaks,layers
    python benchmarks/gpu.py --interpret        # no GPU: correctness in Triton's interpreter

A sample of correctness comes first (a minute), then the headline: a step of SD v1.4's UNet, first
with tiles by estimate, and with tuned ones when there is time. Then all of correctness, peaks,
layers, attention and blocks. The result, benchmarks/results/gpu.json, is written after each row. An
exception in a section is printed and part of it, and the next section runs. Exit code 3 when a
kernel is wrong, otherwise 1 when a section failed; 2 without a GPU. Needs torch with CUDA, triton
and pydantic; without diffusers all but the UNet runs.

Every time is the median of CUDA-graph replays between events, the L2 cache flushed before each,
contenders in the order A B .. B A. `fraction` is the floor (the larger of operations / measured
peak and bytes / measured bandwidth) over the time.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

from common import RESULTS, parser_of
from gpu_report import NO_GPU, Report, machine
from gpu_sections import SECTIONS


def share(text: str) -> tuple[int, int]:
    """The i and n of "i/n"."""
    i, n = map(int, text.split("/"))
    return i, n


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds; what does not fit is listed as skipped"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        default=list(SECTIONS),
        help="comma-separated; peaks are always measured before layers",
    )
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="the correctness section alone, on CPU, in Triton's interpreter",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases of correctness")
    parser.add_argument(
        "--compile-mode",
        help="of torch.compile; max-autotune-no-cudagraphs takes minutes (default: torch's own)",
    )
    # One of several processes: `gpu_shards`. Of a UNet, it compiles the tiles that are tuned, too.
    parser.add_argument("--shard", type=share, help=argparse.SUPPRESS)
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(
            f"--sections: expected some of {', '.join(SECTIONS)}, found {', '.join(unknown)}"
        )
    wanted = {"correctness"} if args.interpret else set(args.sections)
    if "layers" in wanted and args.shard is None:
        wanted.add("peaks")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.manual_seed(0)
    report = Report(args.out, args.budget)
    report.data["machine"] = machine()
    if not args.interpret and not torch.cuda.is_available():
        print(
            "expected an NVIDIA GPU, found none; --interpret checks the kernels without one",
            file=sys.stderr,
        )
        return NO_GPU
    for name, section in SECTIONS.items():
        if name in wanted:
            report.run(name, functools.partial(section, report, args))
    return report.code


if __name__ == "__main__":
    sys.exit(main())
