"""CompVis latent-diffusion checkpoints (.ckpt with its YAML) to diffusers pipelines: LDM-4, LDM-8, Stable Diffusion v1.

One path for all: the YAML says what the models are; each tensor of the diffusers models names its source in the checkpoint
(compvis_parts.py); what is missing, left over or of another shape is an error that lists it. Tensors stay mapped from the file
until they are written, so that memory holds little more than the page cache.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from transformers import CLIPTokenizer

from questlib.diffusion.schedulers import make_scheduler
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.files import check_new
from reproduce.models.compvis_parts import (
    COND,
    UNET,
    VAE,
    Part,
    Source,
    condition_part,
    unet_part,
    vae_part,
)
from reproduce.models.download import check_sha256
from reproduce.models.pipelines import (
    ClassConditionalPipeline,
    ClassEmbedder,
    LatentDiffusionPipeline,
)

CONFIGS = Path(__file__).parent / "configs"  # package data: the YAML of the paper's four models
EMA = "model_ema."
# classes that Lightning checkpoints name beside the weights; replaced by empty stand-ins, never imported
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.", "omegaconf.")
# in a checkpoint, but no weight of the sampler: the schedule's buffers, training losses, constants
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


class StandIn:
    """In place of a class of the training framework: takes any arguments and any state, does nothing."""

    def __init__(self, *args) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def config_names() -> list[str]:
    """Models whose YAML ships with the package."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def load_config(name_or_path: str | Path) -> dict:
    """`model.params` of a CompVis YAML file, or of an embedded one by its name. ConfigError if it has no such part."""
    path = (
        CONFIGS / f"{name_or_path}.yaml"
        if str(name_or_path) in config_names()
        else Path(name_or_path)
    )
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        missing = {"unet_config", "first_stage_config", "linear_start", "linear_end"} - set(params)
    except OSError as error:
        raise ConfigError(
            f"config {name_or_path}: expected a YAML file or one of {', '.join(config_names())} ({error.strerror})"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"config {path}: not a CompVis YAML with model.params ({type(error).__name__}: {error})"
        ) from error
    if missing:
        raise ConfigError(f"config {path}: model.params has no {', '.join(sorted(missing))}")
    return params


def read_state_dict(path: str | Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, mapped from the file where its format allows. No code in it is ever executed.

    ConfigError if there is no such file; CheckpointError for another sha256, a damaged file, or a pickle that is more than
    tensors and Lightning's bookkeeping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint {path}: no such file")
    check_sha256(path, sha256)
    content = code = None
    try:
        mapped = zipfile.is_zipfile(path)  # not so before torch 1.6
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        code = sorted(n for n in names if not n.startswith(BOOKKEEPING))
        if not code:
            with torch.serialization.safe_globals(
                [(type("StandIn", (StandIn,), {}), n) for n in names]
            ):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        # torch wraps what it found in the advice to load without weights_only
        found = (
            error.__context__
            if isinstance(error, pickle.UnpicklingError) and error.__context__
            else error
        )
        reason = (str(found).strip() or type(found).__name__).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path}: truncated, damaged or not tensors alone ({reason})"
        ) from error
    if code:
        raise CheckpointError(
            f"checkpoint {path}: its pickle names code, which was not executed: {', '.join(code)}"
        )
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(
            f"checkpoint {path}: expected a state_dict of tensors, found {type(content).__name__}"
        )
    return state


def convert_state(
    state: Mapping[str, torch.Tensor], config: Mapping, *, ema: bool = True
) -> DiffusionPipeline:
    """The pipeline of a CompVis state dict and the `model.params` of its YAML; the tensors are shared, not copied.

    ema: take the EMA weights of the UNet where the checkpoint has them.
    With a class embedder ClassConditionalPipeline; else with cross-attention StableDiffusionPipeline, whose text encoder is None
    where the config names none; else LatentDiffusionPipeline. PLMS for Stable Diffusion, DDIM for the others, as the originals'
    sampling scripts have it. ConfigError, CheckpointError.
    """
    try:
        params = config["unet_config"]["params"]
        condition = condition_part(config.get("cond_stage_config"), state)
        unet = unet_part(
            params, config["image_size"] if "image_size" in config else params["image_size"]
        )
        vae = vae_part(
            config["first_stage_config"]["params"],
            _scale(state, config),
            state.get(f"{VAE}quantize.embedding.weight"),
        )
        attends = params.get("use_spatial_transformer", False)
        if condition and not attends:
            raise ConfigError(
                "config: a cond_stage_config, but no use_spatial_transformer: conditions enter by attention alone"
            )
        stable = attends and not (condition and isinstance(condition.model, ClassEmbedder))
        scheduler = _scheduler(state, config, "plms" if stable else "ddim")
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"config: a value is missing or of the wrong kind ({type(error).__name__}: {error})"
        ) from error
    _fill(
        [p for p in (unet, vae, condition) if p],
        state,
        ema and any(k.startswith(f"{EMA}diffusion_model") for k in state),
    )
    if stable:
        text_encoder, tokenizer = (condition.model, clip_tokenizer()) if condition else (None, None)
        return StableDiffusionPipeline(
            vae.model,
            text_encoder,
            tokenizer,
            unet.model,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if condition:
        return ClassConditionalPipeline(vae.model, unet.model, scheduler, condition.model)
    return LatentDiffusionPipeline(vae.model, unet.model, scheduler)


def convert(
    checkpoint: str | Path, config: str | Path, *, ema: bool = True, sha256: str | None = None
) -> DiffusionPipeline:
    """The pipeline of a .ckpt file and its YAML (a path, or the name of an embedded one); see `convert_state`."""
    params = load_config(config)
    state = read_state_dict(checkpoint, sha256)
    try:
        return convert_state(state, params, ema=ema)
    except QuestError as error:
        raise type(error)(f"checkpoint {checkpoint} with config {config}: {error}") from error


def save(pipe: DiffusionPipeline, out: str | Path) -> None:
    """Write a diffusers folder that appears as a whole or not at all. ConfigError unless `out` is new or empty."""
    out = Path(out)
    check_new(out)
    tmp = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        pipe.save_pretrained(tmp)
        os.replace(tmp, out)  # also over an empty folder
    except (OSError, SafetensorError) as error:
        raise QuestError(f"save: cannot write {out} ({error})") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from the vocabulary in the open_clip package: no download. 49,408 tokens, texts of 77."""
    bpe = SimpleTokenizer()
    vocabulary = dict(bpe.encoder)
    for ours, theirs in (
        ("<start_of_text>", "<|startoftext|>"),
        ("<end_of_text>", "<|endoftext|>"),
    ):
        vocabulary[theirs] = vocabulary.pop(ours)
    return CLIPTokenizer(vocab=vocabulary, merges=list(bpe.bpe_ranks), model_max_length=77)


def _scale(state: Mapping[str, torch.Tensor], config: Mapping) -> float:
    """What latents are multiplied with: a buffer of the checkpoint if it was measured in training, else the config's."""
    if "scale_factor" in state:
        return float(state["scale_factor"])
    if config.get("scale_by_std"):
        raise CheckpointError(
            "scale_by_std: expected a tensor scale_factor in the checkpoint, found none"
        )
    return float(config.get("scale_factor", 1.0))


def _scheduler(state: Mapping[str, torch.Tensor], config: Mapping, sampler: str) -> SchedulerMixin:
    """The original's default sampler; CheckpointError if the checkpoint was trained with other betas than the config's."""
    for key, known in (("beta_schedule", "linear"), ("parameterization", "eps")):
        if config.get(key, known) != known:
            raise ConfigError(f"config: expected {key} {known}, found {config[key]}")
    betas = {
        "beta_start": float(config["linear_start"]),
        "beta_end": float(config["linear_end"]),
        "beta_schedule": "scaled_linear",
    }
    scheduler = make_scheduler(
        {**betas, "num_train_timesteps": config.get("timesteps", 1000)}, sampler
    )
    trained = state.get("betas")
    if trained is not None and (
        trained.shape != scheduler.betas.shape
        or not torch.allclose(trained, scheduler.betas, rtol=1e-3)
    ):
        ours, theirs = (
            f"{len(b)} betas from {b[0]:.6f} to {b[-1]:.6f}" for b in (scheduler.betas, trained)
        )
        raise CheckpointError(
            f"the config is of another model: it has {ours}, the checkpoint {theirs}"
        )
    return scheduler


def _fill(parts: list[Part], state: Mapping[str, torch.Tensor], ema: bool) -> None:
    """Give every model its tensors, shared with `state`. CheckpointError with all that is missing, misshapen or left over."""
    missing, wrong, used, values = [], [], set(), []
    for part in parts:
        tensors = {}
        for target, empty in part.model.state_dict().items():
            source = part.sources[target]
            key = part.prefix + source.key
            if ema and part.prefix == UNET:  # LitEma: the name of a buffer cannot have dots
                key = EMA + key.removeprefix("model.").replace(".", "")
            used.add(key)
            shape = (len(empty) * (1 if source.part is None else 3), *empty.shape[1:])
            found = tuple(state[key].shape) if key in state else None
            if found is None:
                missing.append(key)
            elif found[: len(shape)] != shape or set(found[len(shape) :]) - {
                1
            }:  # a 1x1 convolution may become a linear layer
                wrong.append(f"{key} {list(found)} (expected {list(shape)})")
            else:
                tensors[target] = _take(state[key].reshape(shape), source)
        values.append(tensors)
    ignored = (*IGNORED_PREFIXES, UNET if ema else EMA)
    unexpected = [k for k in state if k not in used | IGNORED and not k.startswith(ignored)]
    lists = (
        ("missing", dict.fromkeys(missing)),
        ("wrong shape", dict.fromkeys(wrong)),
        ("unexpected", unexpected),
    )
    if missing or wrong or unexpected:
        raise CheckpointError(
            "; ".join(f"{what}: {', '.join(names)}" for what, names in lists if names)
        )
    for part, tensors in zip(parts, values, strict=True):
        part.model.load_state_dict(tensors, assign=True)
        part.model.eval()


def _take(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """The tensor itself, or one of q, k, v [C, ...] out of [heads * 3 * C / heads, ...]."""
    if source.part is None:
        return tensor
    return (
        tensor.unflatten(0, (source.heads, 3, -1))[:, source.part].flatten(0, 1).clone()
    )  # no two may share memory
