"""Post-training quantization: everything before finetuning (paper, Sec. 3.1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from questlib.adaround import decided_share, reconstruct_acts, reconstruct_weights
from questlib.baselines.low_rank_branch import fit_transforms
from questlib.baselines.mixed_precision import with_chosen_bits
from questlib.baselines.noise_correction import estimate_correction, insert_correction
from questlib.calibration import Calibration
from questlib.capture import execution_order
from questlib.config import OFF, QuantConfig
from questlib.diffusers_quantizer import attach
from questlib.errors import ConfigError
from questlib.integrity import fail_if_any
from questlib.observers import init_ranges
from questlib.quantization.model import act_quantizers, freeze, quant_layers, set_mode
from questlib.quantization.precision import cast
from questlib.quantization.preparation import check_unet, prepare
from questlib.quantization.stored_values import wrong_act_values
from questlib.stage_cache import Filled, Parts, StageCache


class QuantizationLog(TypedDict):
    """`quest_log` of a quantized UNet."""

    seconds: dict[str, float]
    """Of each stage. Where a stage was read from the cache: what it took when it was computed."""
    ranges_cached: bool
    reconstruct_cached: bool
    decided: float | None
    """Share of AdaRound's roundings that were 0 or 1 before they were hardened; None: no
    AdaRound."""


def quantize(
    unet: nn.Module,
    config: QuantConfig,
    calib: Calibration,
    *,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """Quantize a copy of `unet`: insert quantizers, search their ranges, then AdaRound if chosen.

    Args:
        unet: a full-precision diffusers UNet; it is not changed.
        config: the run's configuration.
        calib: the UNet's calls, from `questlib.calibrate`.
        cache_dir: folder where activation ranges and AdaRound's weights are kept. Configurations
            that agree on everything which decides them (`QuantConfig.range_key`, `adaround_key`)
            share them.
        progress: whether to show progress bars.

    Returns:
        A UNet of the same diffusers class with simulated quantization, ready to sample or to be
        finetuned, in the precision of `unet`. Ranges and AdaRound are computed in float32. Its
        attribute `quest_log` is a `QuantizationLog`.

    Raises:
        ConfigError: `unet` is not a diffusers UNet, is quantized already, is another one than the
            calibration's, or has layers that no call reaches.
        QuestError: a value of the calibration is not finite.
        CheckpointError: a cached file is damaged, or of another model.

    Example:
        >>> calib = questlib.calibrate(pipe, num_samples=64, num_inference_steps=20)
        >>> config = questlib.QuantConfig.preset("quest", 4, 4)
        >>> unet = questlib.quantize(pipe.unet, config, calib)
    """
    check_unet(unet)
    model = calib.check(unet)
    start = time.perf_counter()
    config = with_chosen_bits(unet, calib, config)
    student = prepare(unet, config, calib.t)
    check_reached(student, calib)
    fit_transforms(student, unet, calib, config)
    if config.noise_correction:
        insert_correction(student)
    log: QuantizationLog = {
        "seconds": {"ranges": time.perf_counter() - start, "reconstruct": 0.0},
        "ranges_cached": False,
        "reconstruct_cached": False,
        "decided": None,
    }
    cache = StageCache(cache_dir, calib.hash(), model)

    def find_ranges() -> None:
        ranges = cache.fill(
            "ranges",
            config.range_key(),
            _activation_ranges(student),
            lambda parts: init_ranges(student, calib, config, parts=parts, progress=progress),
        )
        check_ranges(student, ranges)
        log["seconds"]["ranges"] += ranges.seconds
        log["ranges_cached"] = ranges.cached

    def reconstruct(
        stage: str, key: str, tensors: dict[str, torch.Tensor], run: Callable[..., Any]
    ) -> Filled:
        def compute(parts: Parts) -> Any:
            return run(student, unet, calib, config, parts=parts, progress=progress)

        filled = cache.fill(stage, key, tensors, compute)
        log["seconds"]["reconstruct"] += filled.seconds
        log["reconstruct_cached"] |= filled.cached
        return filled

    if config.ranges.calib_model == "full":
        find_ranges()

    if config.adaround.enabled and config.weight_bits != OFF:
        key = config.adaround_key()
        rounded = reconstruct("adaround", key, _quantized_weights(student), reconstruct_weights)
        log["decided"] = decided_share(rounded.record)

    if config.ranges.calib_model == "quantized":
        find_ranges()

    if config.act_recon.enabled and config.act_bits != OFF:
        key = config.act_recon_key()
        trained = reconstruct("act_recon", key, _activation_ranges(student), reconstruct_acts)
        check_ranges(student, trained)

    student.quest_log = log
    freeze(student)
    if config.noise_correction:
        corrected = cache.fill(
            "noise_correction",
            config.hash(),
            student.quest_correction.state_dict(),
            lambda parts: estimate_correction(student, calib, config, parts=parts),
        )
        log["seconds"]["correction"] = corrected.seconds
    attach(student)
    return cast(student, unet.dtype)


@torch.no_grad()
def check_reached(student: nn.Module, calib: Calibration) -> None:
    """ConfigError that names the layers which no call of the calibration reaches."""
    set_mode(student, weights=False, acts=False)
    names = list(quant_layers(student))
    reached: set[str] = set()
    for table in calib.tables:
        reached.update(execution_order(student, names, table.batch(0, torch.arange(1)).run))
    set_mode(student, weights=True, acts=True)
    missing = [name for name in names if name not in reached]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(
            f"quantize: no call of the calibration reaches {', '.join(missing[:5])}{more}; "
            "calibrate with calls that do, or leave them in full precision: "
            "config.replace(skip_layers=[...])"
        )


def check_ranges(student: nn.Module, filled: Filled) -> None:
    """CheckpointError for ranges from a file that no search gives."""
    if filled.cached:
        wrong = [
            f"{quantizer.name}.{value}"
            for quantizer in act_quantizers(student)
            for value in wrong_act_values(quantizer, quantizer.state_dict())
        ]
        fail_if_any("quantize: cached ranges", {"impossible values": wrong})


def _activation_ranges(student: nn.Module) -> dict[str, torch.Tensor]:
    """What the stage "ranges" sets."""
    return {
        f"{quantizer.name}.{key}": value
        for quantizer in act_quantizers(student)
        for key, value in quantizer.state_dict().items()
    }


def _quantized_weights(student: nn.Module) -> dict[str, torch.Tensor]:
    """What the stage "adaround" sets: weights that round to their learned codes."""
    return {
        name: layer.weight.detach()
        for name, layer in quant_layers(student).items()
        if layer.weight_quantizer is not None
    }
