"""Recording of a denoiser's calls (`questlib.calls`) while its pipeline runs."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn
from tqdm import tqdm

from questlib.calls import CallTable, Column, skeleton_to_json, take_tensors
from questlib.capture import hooks
from questlib.denoisers import input_name, unet_of
from questlib.diffusion.sampling import CALIBRATION_OFFSET, check_seed, sample_generators
from questlib.errors import ConfigError, NotFiniteError
from questlib.integrity import as_bytes, digest_of, fail_if_any, not_finite

IN_MEMORY = 2**32  # bytes of recorded tensors that are kept in memory; the rest goes to files


class Store:
    """Rows that are appended one batch after another. Equal batches are kept once.

    Args:
        folder: of files, for what does not stay in memory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: Path | None = None
        self.batches: list[torch.Tensor] = []
        self.first: dict[str, int] = {}  # digest of a batch -> its first row
        self.count = 0
        self.index: list[torch.Tensor] = []  # of each appended batch, its rows

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return sum(batch.numel() * batch.element_size() for batch in self.batches)

    def append(self, batch: torch.Tensor) -> None:
        """Append rows [B, ...]."""
        batch = batch.detach().to("cpu", copy=True).contiguous()
        key = digest_of(batch)
        if key not in self.first:
            self.first[key] = self.count
            self.count += len(batch)
            self.shape, self.dtype = batch.shape[1:], batch.dtype
            self.batches.append(batch)
            if self.file is not None:
                self.spill()
        start = self.first[key]
        self.index.append(torch.arange(start, start + len(batch)))

    def spill(self) -> None:
        """Move what is in memory to the file."""
        if self.file is None:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                self.file = Path(file.name)
        with self.file.open("ab") as file:
            for batch in self.batches:
                as_bytes(batch).tofile(file)
        self.batches = []

    def values(self) -> torch.Tensor:
        """All rows [K, ...]; those of a file are read from it when they are used."""
        if self.file is None:
            return torch.cat(self.batches)
        shape = (self.count, *self.shape)
        size = torch.Size(shape).numel()
        found = torch.from_file(str(self.file), shared=False, size=size, dtype=self.dtype)
        return found.view(shape)


class _Part:
    """The calls recorded for one table."""

    def __init__(
        self, skeleton: Any, constants: dict[str, torch.Tensor], names: list[str], folder: Path
    ) -> None:
        self.skeleton = skeleton
        self.constants = constants
        self.t: list[torch.Tensor] = []
        self.eps = Store(folder)
        self.inputs = {name: Store(folder) for name in names}

    @property
    def stores(self) -> list[Store]:
        return [self.eps, *self.inputs.values()]

    def table(self) -> CallTable:
        """Calls of the same timestep are one step; steps are in the sampler's order, downwards.

        A step that has fewer samples than another one has its own again, in turn.
        """
        t = torch.cat(self.t)
        steps = t.unique().flip(0)
        found = [(t == step).nonzero()[:, 0] for step in steps]
        width = max(len(rows) for rows in found)
        calls = torch.stack([rows[torch.arange(width) % len(rows)] for rows in found])  # [T, N]

        def column(store: Store) -> Column:
            return Column(store.values(), torch.cat(store.index)[calls])

        inputs = {name: column(store) for name, store in self.inputs.items()}
        return CallTable(steps, column(self.eps), inputs, self.constants, self.skeleton)


class CallRecorder:
    """Keeps all that each call of a denoiser received and returned; see `on`.

    Args:
        folder: of files, for what exceeds `in_memory`.
        in_memory: bytes that are kept in memory.

    Raises:
        NotFiniteError: in a call: a value that is not finite.
        ConfigError: in a call: an argument that cannot be recorded.
    """

    def __init__(self, folder: Path, in_memory: int = IN_MEMORY) -> None:
        self.folder = folder
        self.in_memory = in_memory
        self.parts: dict[str, _Part] = {}
        self.arguments: tuple[torch.Tensor, int, Any, dict[str, torch.Tensor]] | None = None

    @contextmanager
    def on(self, unet: nn.Module) -> Iterator[None]:
        """Record the calls of a UNet inside the block."""
        with hooks(unet, {"": self._receive}, "input"), hooks(unet, {"": self._keep}):
            yield

    def _receive(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take the arguments before the call: UNets empty the list of an adapter's residuals."""
        # The class's own forward: an instance's may be wrapped, as accelerate's offloading does.
        signature = inspect.signature(type(module).forward)
        bound = signature.bind(module, *args, **kwargs).arguments
        # Kandinsky has no text: None is what it gives for an argument that must be there.
        received = {
            name: value
            for name, value in list(bound.items())[1:]
            if value is not None or signature.parameters[name].default is inspect.Parameter.empty
        }
        received.pop("return_dict", None)
        received["sample"] = received.pop(input_name(module))
        size = len(received["sample"])
        t = as_timesteps(received.pop("timestep"))
        self.arguments = (t, size, *take_tensors(received))

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        assert self.arguments is not None
        t, size, skeleton, tensors = self.arguments
        self.arguments = None
        eps = output[0] if isinstance(output, tuple) else output.sample
        check_finite(t, {**tensors, "its output": eps})

        rows = {}
        for name, value in tensors.items():
            if value.ndim and len(value) in (1, size):
                rows[name] = value.expand(size, *value.shape[1:])
        constants = {name: value.cpu() for name, value in tensors.items() if name not in rows}
        part = self._part(skeleton, constants, rows)
        part.t.append(t.expand(size))
        part.eps.append(eps)
        for name, value in rows.items():
            part.inputs[name].append(value)
        stores = [store for part in self.parts.values() for store in part.stores]
        if sum(store.held for store in stores) > self.in_memory:
            for store in stores:
                store.spill()

    def _part(
        self, skeleton: Any, constants: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]
    ) -> _Part:
        """The part that has the calls of this structure, of these shapes and constants."""
        about = [
            skeleton_to_json(skeleton),
            {name: digest_of(value) for name, value in constants.items()},
            {name: [str(value.dtype), *value.shape[1:]] for name, value in rows.items()},
        ]
        key = json.dumps(about)
        if key not in self.parts:
            self.parts[key] = _Part(skeleton, constants, list(rows), self.folder)
        return self.parts[key]

    def tables(self) -> list[CallTable]:
        """All that was recorded."""
        return [part.table() for part in self.parts.values()]


def as_timesteps(timestep: torch.Tensor | float) -> torch.Tensor:
    """The timestep argument of a call as [1] or [B], int64 or float32, on the CPU.

    float32 is the precision in which UNets compute the embedding of a timestep.
    """
    t = torch.as_tensor(timestep).reshape(-1).cpu()
    return t.float() if t.is_floating_point() else t.to(torch.int64)


def check_finite(t: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """NotFiniteError that names the tensors which are not finite, and the timestep."""
    damaged = not_finite(tensors)
    if damaged:
        raise NotFiniteError(
            f"calibrate: values of the denoiser that are not finite at timestep {t[0].item():g}: "
            f"{', '.join(damaged)}"
        )


def check_weights(unet: nn.Module) -> None:
    """NotFiniteError that names the weights and buffers which are not finite.

    Those that accelerate has offloaded show in the first output.
    """
    named = not_finite(unet.state_dict())
    fail_if_any("the model", {"weights that are not finite": named}, NotFiniteError)


class ProcessorWatch:
    """A denoiser's pre-hook that refuses calls with other attention processors than at first.

    PAG and SAG set their own while they run. They are no arguments: a replay would not have them.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.before = {
            name: (module, module.processor)
            for name, module in unet.named_modules()
            if isinstance(module, Attention)
        }

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, (attention, processor) in self.before.items():
            if attention.processor is not processor:
                raise ConfigError(
                    f"calibrate: the pipeline sets {type(attention.processor).__name__} at {name} "
                    "while it runs, which a replay would not have; calibrate without it (PAG, SAG)"
                )


# ---- while the pipeline runs ----


@contextmanager
def evaluating(pipe: DiffusionPipeline) -> Iterator[None]:
    """All modules of a pipeline are in eval mode inside the block, and afterwards as before."""
    parts = [unet_of(pipe), *getattr(pipe, "components", {}).values()]
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def make_calls(
    pipe: DiffusionPipeline, calls: list[Mapping[str, Any]], seed: int, progress: bool
) -> Callable[[], None]:
    """A function that makes the calls, each with noise of its own.

    Raises:
        ConfigError: no call, a seed out of its range, or an argument that the pipeline does not
            have, or that it needs.
    """
    if not callable(pipe):
        raise ConfigError(f"calibrate: calls: a {type(pipe).__name__} cannot be called; give run")
    check_seed(seed)
    accepted = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    named = [p for p in list(accepted.values())[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p.name for p in named if p.default is p.empty]
    if not calls:
        raise ConfigError("calibrate: calls: expected at least one call, found none")
    for i, call in enumerate(calls):
        wrong = [name for name in call if name not in accepted]
        if wrong and not open_ended:
            raise ConfigError(
                f"calibrate: calls[{i}]: {type(pipe).__name__} has no argument {wrong[0]!r}"
            )
        missing = [name for name in needed if name not in call]
        if missing:
            raise ConfigError(
                f"calibrate: calls[{i}]: {type(pipe).__name__} needs an argument {missing[0]!r}"
            )

    def run() -> None:
        for i, call in enumerate(tqdm(calls, desc="calibrate", disable=not progress)):
            own = dict(call)
            if "generator" in accepted and own.get("generator") is None:
                (own["generator"],) = sample_generators(seed, [CALIBRATION_OFFSET + i])
            pipe(**own)

    return run
