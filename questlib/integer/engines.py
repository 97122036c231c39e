"""The engines that run quantized layers in integers, by name.

To add an engine, write one module that describes it (an `Engine`, see `interface`; the folder
`cpu` is the simplest example) and register it here. `convert`, `from_pretrained`, `engine_report`
and the command lines know engines by this registry alone. An engine's layers extend
`modules.IntegerLayer`, its attention extends `modules.IntegerAttention`.

Importing this module loads neither torch nor any kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from questlib.errors import ConfigError, unknown
from questlib.integer.cpu.engine import CPU, REFERENCE
from questlib.integer.interface import Engine
from questlib.integer.triton.engine import TRITON

if TYPE_CHECKING:
    import torch

ENGINES: dict[str, Engine] = {}


def register(engine: Engine) -> None:
    """Make an engine known by its name.

    Raises:
        ConfigError: the name is taken.
    """
    if engine.name in (*ENGINES, "auto", "fake"):
        raise ConfigError(f"engine {engine.name}: there is one of this name already")
    ENGINES[engine.name] = engine


# "auto" takes the first that runs on the machine's type of device.
register(CPU)
register(REFERENCE)
register(TRITON)


class Defaults(NamedTuple):
    """How an engine is fastest on this machine."""

    device: str
    dtype: torch.dtype | None  # of what stays in floating point; None: as it is
    fuse: bool
    graphs: bool


def fastest(engine: Engine) -> Defaults:
    """Half precision, fused and as CUDA graphs on a GPU; otherwise as the model is."""
    import torch

    if engine.device == "cuda" and torch.cuda.is_available():
        return Defaults("cuda", torch.float16, True, True)
    return Defaults("cpu", None, False, False)


CPU_ENGINES = tuple(name for name, engine in ENGINES.items() if engine.device == "cpu")


def choose_engine(name: str, device: str | None = None) -> Engine:
    """The engine of this name; for "auto", the one for this machine.

    Args:
        name: of the engine.
        device: the type of device that it is to run on; None: any.

    Raises:
        ConfigError: the name is unknown, or the engine runs on another type of device.
        EngineError: the engine cannot run here.
    """
    if name == "auto":
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        engine = next(e for e in ENGINES.values() if e.device == device)
    elif name in ENGINES:
        engine = ENGINES[name]
    else:
        raise unknown("engine", name, (*ENGINES, "auto"))
    if device not in (None, engine.device):
        raise ConfigError(f"engine {engine.name} runs on {engine.device}, found device {device}")
    engine.check()
    return engine
