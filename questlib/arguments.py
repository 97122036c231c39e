"""What command lines share: a parser, the options of sampling, and how a command ends.

Nothing here loads torch, so that `--help` and wrong input are answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from questlib.diffusion.schedulers import SAMPLERS
from questlib.errors import ConfigError, QuestError, did_you_mean, unknown
from questlib.files import storage_reason
from questlib.integer.engines import ENGINES

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

# argparse's message about a command that there is not; whether names are in quotes depends on
# Python's version.
UNKNOWN_COMMAND = re.compile(r"invalid choice: '(?P<found>[^']*)' \(choose from (?P<known>.*)\)")

KEPT = "what was finished is kept, and the same command goes on from it"

# Exit codes, as shells have them for a process that a signal has ended.
INTERRUPTED = 130
PIPE_CLOSED = 141


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong input by one line.

    Args:
        examples: command lines, with a comment where one is needed; they end the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **choices: Any) -> None:
        if examples:
            choices["epilog"] = "\n  ".join(["examples:", *examples])
            choices["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **choices)

    def error(self, message: str) -> NoReturn:
        """Print the message, with the nearest known command, and exit with code 2."""
        if wrong := UNKNOWN_COMMAND.search(message):
            known = wrong["known"].replace("'", "").split(", ")
            message += did_you_mean(wrong["found"], known)
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


class ShowVersion(argparse.Action):
    """`--version`: the version of the installed package, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print it and exit."""
        from importlib.metadata import version

        print(f"questlib {version('questlib')}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")


# ---- the machine ----

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float16", "bfloat16")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options of device and precision; `machine_choices` reads them."""
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)}: precision of all that is not quantized (default: the model's "
        "own; float16 for engine triton)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options of a quantized model's engine; `machine_choices` reads them."""
    parser.add_argument(
        "--engine",
        default="fake",
        help=f"fake (simulated), or in integers: {', '.join(ENGINES)}, auto (default: fake)",
    )
    parser.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        help="norms and activations inside the integer kernels; single codes may differ by one "
        "(default: for engine triton on a GPU)",
    )


class Machine(NamedTuple):
    """Where and how a command computes."""

    engine: str  # "fake", or the name of an integer engine
    device: torch.device
    dtype: torch.dtype | None  # of what is not quantized; None: as it is
    fuse: bool | None = None  # None: the engine's default

    def put(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline on the device, in the precision that was asked for."""
        return pipe.to(self.device) if self.dtype is None else pipe.to(self.device, self.dtype)

    def load(self, checkpoint: Path) -> nn.Module:
        """The quantized UNet of a checkpoint, likewise."""
        from questlib.checkpoint import from_pretrained

        unet = from_pretrained(checkpoint, self.engine, dtype=self.dtype, fuse=self.fuse)
        return unet.to(self.device)

    def says(self, unet: nn.Module) -> str:
        """What runs a UNet, on what, and in which precision."""
        import torch

        ran = "full precision"
        if hasattr(unet, "quest_steps"):
            engine = getattr(unet, "quest_engine", None)
            ran = "simulated" if engine is None else f"engine {engine}"
        on_gpu = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if on_gpu else self.device.type
        ran += ", fused" if getattr(unet, "quest_fused", False) else ""
        return f"{ran}, {where}, {str(unet.dtype).removeprefix('torch.')}"


def machine_choices(args: argparse.Namespace) -> Machine:
    """The device, the precision and, where the command has engines, the engine for them.

    Raises:
        ConfigError: an unknown name, there is no such device, or the engine runs on another one.
        EngineError: the engine cannot run here.
    """
    for name, value, known in (("device", args.device, DEVICES), ("dtype", args.dtype, DTYPES)):
        if value not in (None, *known):
            raise unknown(f"--{name}", value, known)
    import torch

    from questlib.distributed import chosen_device
    from questlib.integer.engines import choose_engine

    engine = getattr(args, "engine", "fake")
    fuse = getattr(args, "fuse", None)
    if fuse is not None and engine == "fake":
        raise ConfigError("--fuse is of the integer engines; give --engine")
    wanted = args.device
    if engine != "fake":
        chosen = choose_engine(engine, wanted)
        # Triton's interpreter runs on CPU tensors.
        engine, wanted = chosen.name, chosen.device if torch.cuda.is_available() else "cpu"
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return Machine(engine, chosen_device(wanted), dtype, fuse)


# ---- sampling ----


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of sampling; `sampling_choices` reads them."""
    parser.add_argument("--steps", type=int, default=20, help="sampler steps (default: 20)")
    parser.add_argument("--sampler", help=f"{', '.join(SAMPLERS)} (default: the pipeline's own)")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM eta (default: 0)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        help="classifier-free guidance (default: 1, which is none)",
    )
    parser.add_argument(
        "--labels", help="class labels separated by commas, taken in turn (default: all classes)"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="a text; several are taken in turn")
    prompts.add_argument("--prompts", type=Path, help="text file, a prompt a line, taken in turn")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")


def sampling_choices(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `questlib.calibrate` and of the drawing of samples.

    Raises:
        ConfigError: labels that are no numbers, or a file of prompts that cannot be read.
    """
    return {
        "num_inference_steps": args.steps,
        "sampler": args.sampler,
        "eta": args.eta,
        "guidance_scale": args.guidance_scale,
        "labels": None if args.labels is None else _read_labels(args.labels),
        "prompts": args.prompt if args.prompts is None else _read_prompts(args.prompts),
        "seed": args.seed,
    }


def _read_labels(text: str) -> list[int]:
    try:
        return [int(label) for label in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--labels: expected whole numbers separated by commas, found {text!r}"
        ) from error


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


# ---- a whole command ----


def run(
    parser: argparse.ArgumentParser, argv: list[str] | None, interrupted: str = "interrupted"
) -> int:
    """Parse `argv` and call the function that the command has set as its default for `run`.

    Returns:
        The exit code: that of the function (0 for None), 2 and one line for a QuestError or a
        place that cannot be written, 130 and the line `interrupted` for Ctrl-C, 141 and nothing
        where the reader of a pipe has left.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" gets "?"
    try:
        try:
            return _run(parser, argv, interrupted)
        finally:
            sys.stdout.flush()  # a closed pipe shows here, not when Python ends
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except OSError as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        place = error.filename or "the output"
        print(f"{parser.prog}: cannot write {place}: {reason}; {KEPT}", file=sys.stderr)
        _drop_output()
        return 2


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that Python ends without a word about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(parser: argparse.ArgumentParser, argv: list[str] | None, interrupted: str) -> int:
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except QuestError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: {interrupted}", file=sys.stderr)
        return INTERRUPTED


# ---- Ctrl-C before a command runs ----


def _answer_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Command lines import this module first: Ctrl-C is one line while they import the others, too.
sys.excepthook = _answer_interrupt
