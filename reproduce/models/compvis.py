"""CompVis checkpoints (.ckpt with its YAML) as diffusers pipelines: LDM-4, LDM-8, SD v1.

One path for all: the YAML says what the models are, and each tensor of the diffusers models names
the tensor of the checkpoint that it comes from (compvis_components.py). What is missing, left over
or of another shape is an error that lists it. Tensors stay mapped from the file until they are
written, so that memory holds little more than the page cache.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from transformers import CLIPTokenizer

from questlib.diffusion.schedulers import make_scheduler
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.files import atomic_path, check_new
from questlib.integrity import not_finite
from reproduce.models.compvis_components import (
    COND,
    UNET,
    VAE,
    Component,
    condition_component,
    unet_component,
    vae_component,
)
from reproduce.models.compvis_files import load_config, read_state_dict
from reproduce.models.compvis_names import CompvisTensor
from reproduce.models.pipelines import (
    ClassConditionalPipeline,
    ClassEmbedder,
    LatentDiffusionPipeline,
)

EMA = "model_ema."

LARGEST = 2**20  # no size in a config is larger
LONGEST = 100_000  # no noise schedule is longer

# In a checkpoint, but no weight of the sampler: the schedule's buffers, training losses, constants.
IGNORED_PREFIXES = (
    f"{VAE}loss.",
    f"{COND}transformer.text_model.embeddings.position_ids",
    "posterior_",
    "sqrt_",
    "log_one_",
)
IGNORED = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    f"{EMA}decay",
    f"{EMA}num_updates",
}


def convert_state(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, ema: bool = True
) -> DiffusionPipeline:
    """The pipeline of a CompVis state dict; the tensors are shared, not copied.

    Args:
        config: `model.params` of the YAML.
        ema: take the EMA weights of the UNet where the checkpoint has them.

    Returns:
        With a class embedder a ClassConditionalPipeline; else with cross-attention a
        StableDiffusionPipeline, whose text encoder is None where the config names none; else a
        LatentDiffusionPipeline. Its sampler is PLMS for Stable Diffusion and DDIM for the others,
        as in the originals' sampling scripts.

    Raises:
        ConfigError: the config describes no such model.
        CheckpointError: tensors are missing, left over or of another shape.
    """
    check_numbers(config, len(state))
    try:
        params = config["unet_config"]["params"]
        condition = condition_component(config.get("cond_stage_config"), state)
        size = config["image_size"] if "image_size" in config else params["image_size"]
        unet = unet_component(params, size)
        vae = vae_component(
            config["first_stage_config"]["params"],
            _scale(state, config),
            state.get(f"{VAE}quantize.embedding.weight"),
        )
        attends = params.get("use_spatial_transformer", False)
        if condition and not attends:
            raise ConfigError(
                "config: a cond_stage_config, but no use_spatial_transformer: conditions enter by "
                "attention alone"
            )
        stable = attends and not (condition and isinstance(condition.model, ClassEmbedder))
        scheduler = _scheduler(state, config, "plms" if stable else "ddim")
    except QuestError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"config: a value is missing or of the wrong kind ({type(error).__name__}: {error})"
        ) from error
    averaged = ema and any(k.startswith(f"{EMA}diffusion_model") for k in state)
    _fill([c for c in (unet, vae, condition) if c], state, averaged)
    if stable:
        return StableDiffusionPipeline(
            vae.model,
            condition.model if condition else None,
            clip_tokenizer() if condition else None,
            unet.model,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if condition:
        return ClassConditionalPipeline(vae.model, unet.model, scheduler, condition.model)
    return LatentDiffusionPipeline(vae.model, unet.model, scheduler)


def convert_checkpoint(
    checkpoint: str | Path, config: str | Path, *, ema: bool = True, sha256: str | None = None
) -> DiffusionPipeline:
    """The pipeline of a .ckpt file; see `convert_state`.

    Args:
        config: path of its YAML, or the name of an embedded one.
        sha256: refuse a checkpoint with another digest.

    Example:
        >>> pipe = convert_checkpoint("model.ckpt", "lsun_beds256")
        >>> save_pipeline(pipe, "ldm4-bedrooms")
    """
    params = load_config(config)
    state = read_state_dict(checkpoint, sha256)
    try:
        return convert_state(state, params, ema=ema)
    except QuestError as error:
        raise type(error)(f"checkpoint {checkpoint} with config {config}: {error}") from error


def save_pipeline(pipe: DiffusionPipeline, out: str | Path) -> None:
    """Write a diffusers folder that appears as a whole or not at all.

    Raises:
        ConfigError: `out` is neither new nor empty.
        QuestError: it cannot be written.
    """
    out = Path(out)
    check_new(out)
    try:
        with atomic_path(out) as temporary:
            pipe.save_pretrained(temporary)
    except (OSError, SafetensorError) as error:
        raise QuestError(f"save: cannot write {out} ({error})") from error


def check_numbers(config: Any, tensors: int, name: str = "config") -> None:
    """Check all numbers of a config before models are made of them.

    Args:
        config: the config, or a part of it.
        tensors: how many the checkpoint has; no model has more blocks.
        name: of the part.

    Raises:
        ConfigError: one is not finite, or larger than that of any model.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_numbers(value, tensors, f"{name}.{key}")
    elif isinstance(config, list | tuple):
        for value in config:
            check_numbers(value, tensors, name)
    elif isinstance(config, float) and not math.isfinite(config):
        raise ConfigError(f"{name}: expected a finite number, found {config}")
    elif isinstance(config, int):
        most = tensors if name.endswith(("num_res_blocks", "transformer_depth")) else LARGEST
        if abs(config) > most:
            raise ConfigError(f"{name}: expected at most {most}, found {reprlib.repr(config)}")


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from the vocabulary in the open_clip package: no download.

    It has 49,408 tokens, and texts of 77.
    """
    bpe = SimpleTokenizer()
    vocabulary = dict(bpe.encoder)
    for ours, theirs in (
        ("<start_of_text>", "<|startoftext|>"),
        ("<end_of_text>", "<|endoftext|>"),
    ):
        vocabulary[theirs] = vocabulary.pop(ours)
    return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=77)


def _scale(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> float:
    """Factor of the latents: measured in training and in the checkpoint, else the config's."""
    found = state.get("scale_factor", config.get("scale_factor", 1.0))
    scale = float(found)
    if not 0 < scale < math.inf:
        raise CheckpointError(f"scale_factor: expected a number above 0, found {scale}")
    if "scale_factor" not in state and config.get("scale_by_std"):
        raise CheckpointError(
            "scale_by_std: expected a tensor scale_factor in the checkpoint, found none"
        )
    return scale


def _scheduler(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], sampler: str
) -> SchedulerMixin:
    """The original's default sampler.

    Raises:
        CheckpointError: the checkpoint was trained with other betas than the config's.
    """
    for key, known in (("beta_schedule", "linear"), ("parameterization", "eps")):
        if config.get(key, known) != known:
            raise ConfigError(f"config: expected {key} {known}, found {config[key]}")
    start = float(config["linear_start"])
    end = float(config["linear_end"])
    steps = config.get("timesteps", 1000)
    if not 0 < start <= end < 1 or type(steps) is not int or not 1 <= steps <= LONGEST:
        raise ConfigError(
            f"config: expected 0 < linear_start <= linear_end < 1 and timesteps 1..{LONGEST}, "
            f"found {start}, {end} and {steps!r}"
        )
    betas = {
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
    }
    scheduler = make_scheduler({**betas, "num_train_timesteps": steps}, sampler)
    trained = state.get("betas")
    if trained is not None and (
        trained.shape != scheduler.betas.shape
        or not torch.allclose(trained, scheduler.betas, rtol=1e-3)
    ):
        raise CheckpointError(
            f"the config is of another model: it has {_range(scheduler.betas)}, "
            f"the checkpoint {_range(trained)}"
        )
    return scheduler


def _range(betas: torch.Tensor) -> str:
    return f"{len(betas)} betas from {betas[0]:.6f} to {betas[-1]:.6f}"


def _fill(components: list[Component], state: Mapping[str, torch.Tensor], ema: bool) -> None:
    """Give every model its tensors, shared with `state`.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape or not finite; it lists
            them all.
    """
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    values: list[dict[str, torch.Tensor]] = []
    for component in components:
        tensors = {}
        for target, empty in component.model.state_dict().items():
            origin = component.origins[target]
            key = component.prefix + origin.key
            # LitEma: the name of a buffer cannot have dots.
            if ema and component.prefix == UNET:
                key = EMA + key.removeprefix("model.").replace(".", "")
            used.add(key)
            if key not in state:
                missing.append(key)
                continue
            shape = (len(empty) * (1 if origin.qkv is None else 3), *empty.shape[1:])
            found = tuple(state[key].shape)
            # A 1x1 convolution may become a linear layer: more dimensions, all of them 1.
            if found[: len(shape)] != shape or set(found[len(shape) :]) - {1}:
                misshapen.append(f"{key} {list(found)} (expected {list(shape)})")
                continue
            tensors[target] = _take(state[key].reshape(shape), origin)
        values.append(tensors)
    ignored = (*IGNORED_PREFIXES, UNET if ema else EMA)
    unexpected = [k for k in state if k not in used | IGNORED and not k.startswith(ignored)]
    taken = {key: state[key] for key in used & state.keys()}
    lists = {
        "not floating-point": [k for k, v in taken.items() if not v.is_floating_point()],
        "not finite": not_finite(taken),
        "missing": dict.fromkeys(missing),
        "wrong shape": dict.fromkeys(misshapen),
        "unexpected": unexpected,
    }
    wrong = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    if wrong:
        raise CheckpointError("; ".join(wrong))
    for component, tensors in zip(components, values, strict=True):
        component.model.load_state_dict(tensors, assign=True)
        component.model.eval()


def _take(tensor: torch.Tensor, origin: CompvisTensor) -> torch.Tensor:
    """The tensor itself, or one of q, k, v [C, ...] out of [heads * 3 * C / heads, ...]."""
    if origin.qkv is None:
        return tensor
    thirds = tensor.unflatten(0, (origin.heads, 3, -1))  # [heads, 3, C / heads, ...]
    # A copy, since safetensors writes no two tensors that share memory.
    return thirds[:, origin.qkv].flatten(0, 1).clone()
