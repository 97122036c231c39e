"""quantize(unet, config, calib): insert quantizers, search ranges, AdaRound when the preset has it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from questlib.adaround import reconstruct_acts, reconstruct_weights
from questlib.baselines.noise_correction import estimate_correction
from questlib.calibration import Calibration
from questlib.config import OFF, QuantConfig
from questlib.errors import CheckpointError
from questlib.observers import init_ranges
from questlib.quantization.model import act_quantizers, freeze, quant_layers
from questlib.quantization.preparation import prepare
from questlib.versions import STAGE_VERSIONS


def quantize(
    unet: nn.Module,
    config: QuantConfig,
    calib: Calibration,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """A quantized copy of `unet`: the same diffusers class, fake-quantized, ready to sample or to be finetuned.

    cache_dir: where activation ranges and AdaRound's weights are kept, named by what made them (config.range_key, weight_key and
    the calibration), so that presets which agree on them share one run. `quest_log` on the result holds the seconds of each
    stage (as first computed, when cached; "ranges" are the weights', too).
    """
    clock = time.perf_counter()
    student = prepare(unet, config, calib.t)
    log = {
        "seconds": {"ranges": time.perf_counter() - clock, "reconstruct": 0.0},
        "ranges_cached": False,
        "reconstruct_cached": False,
    }
    seconds, log["ranges_cached"] = _kept(
        cache_dir,
        "ranges",
        config.range_key(),
        calib,
        {
            f"{q.name}.{key}": value
            for q in act_quantizers(student)
            for key, value in q.state_dict().items()
        },
        lambda: init_ranges(student, calib, config, progress=progress),
    )
    log["seconds"]["ranges"] += seconds
    if config.adaround.enabled and config.weight_bits != OFF:
        log["seconds"]["reconstruct"], log["reconstruct_cached"] = _kept(
            cache_dir,
            "adaround",
            config.adaround_key(),
            calib,
            {
                name: layer.weight.detach()
                for name, layer in quant_layers(student).items()
                if layer.weight_quantizer is not None
            },
            lambda: reconstruct_weights(student, unet, calib, config, progress=progress),
        )
    if config.act_recon.enabled and config.act_bits != OFF:
        log["seconds"]["reconstruct"] += _seconds(
            lambda: reconstruct_acts(student, unet, calib, config, progress=progress)
        )
    student.quest_log = log
    freeze(student)
    if config.noise_correction:
        log["seconds"]["correction"] = _seconds(lambda: estimate_correction(student, calib, config))
    return student


def _seconds(make: Callable[[], None]) -> float:
    """How long `make` takes."""
    clock = time.perf_counter()
    make()
    return time.perf_counter() - clock


def _kept(
    cache_dir: str | Path | None,
    stage: str,
    key: str,
    calib: Calibration,
    tensors: dict[str, torch.Tensor],
    make: Callable[[], None],
) -> tuple[float, bool]:
    """Fill `tensors` in place from the cache's file, or by `make`, whose result the file then keeps.

    The file is named by the stage, the version of its numbers, this key and the calibration.

    Returns the seconds that `make` took, now or when the file was written, and whether they were read.
    """
    if cache_dir is None:
        return _seconds(make), False
    name = f"{stage}-v{STAGE_VERSIONS[stage]}-{key}-{calib.hash()}.safetensors"
    cache = Path(cache_dir) / name
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):  # two tables that run beside each other make it once
        if cache.exists():
            try:
                state = load_file(cache)
                for name, tensor in tensors.items():
                    tensor.copy_(state[name])
                return float(state["seconds"]), True
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"quantize: {cache} cannot be read ({error!r}); remove it to make it again"
                ) from error
        seconds = _seconds(make)
        tmp = cache.with_suffix(f".tmp{os.getpid()}")
        state = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(state | {"seconds": torch.tensor(seconds, dtype=torch.float64)}, tmp)
        os.replace(tmp, cache)
    return seconds, False
