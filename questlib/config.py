"""QuantConfig: everything that decides how a model is quantized and finetuned, and the presets of the paper's rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

from questlib.errors import ConfigError

OFF = 16  # a bit-width of 16 switches a quantizer off

CHOICES = {
    "act_granularity": ("tensor", "channel", "carrier", "token"),
    "act_range": ("minmax", "mse", "percentile"),
    "act_layers": ("all", "feed_forward", "linear", "conv"),
    "weight_range": ("minmax", "mse"),
    "te": ("ptq", "fp", "finetune"),
    "te_layers": ("all", "projections"),
    "cma_layers": ("attention", "qkv", "no_context", "feed_forward", "all", "none"),
    "tla_order": ("joint", "sequential"),
    "calib_steps": ("uniform", "normal"),
}


# keys without a part in the search for activation ranges, which sees the full-precision weights
AFTER_RANGES = (
    "preset_name", "weight_range", "adaround", "adaround_iters", "adaround_lr", "recon_samples", "act_recon", "act_iters",
    "act_lr", "temporal_block", "noise_correction", "te_layers", "cma_layers", "lora_rank", "tla_iters", "cma_iters",
    "local_loss", "cma_local_loss", "normalize_local", "global_weight", "tla_order", "lr_weight", "lr_scale", "lr_scale_tla",
    "lr_relative", "lr_decay", "batch_size", "save_memory",
)  # fmt: skip


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class QuantConfig:
    """Frozen; unknown keys and values out of range raise ConfigError. Section numbers are the paper's (arXiv 2402.03666v6)."""

    preset_name: str = "custom"
    weight_bits: int = 4  # 2..8, 16 = off
    act_bits: int = 4  # 2..8, 16 = off
    softmax_bits: int | None = None  # None: act_bits. Unsigned, zero point 0
    first_last_act_bits: int | None = None  # conv_in and conv_out inputs; None: act_bits
    first_last_weight_bits: int | None = None  # conv_in and conv_out weights; None: weight_bits
    te_act_bits: int | None = None  # inputs of the time-embedding layers; None: act_bits
    # whose inputs are quantized (Fig. 3): all, attention products too | feed_forward | linear: all other Linears | conv: Conv2d
    act_layers: str = "all"
    # ranges (Sec. 3.1)
    # tensor | channel (free, fake only) | carrier (base * m_k * 2^e: runs in integers; only up to 4 bits, wider codes per tensor)
    # token (linear layers and 1x1 convolutions: the range of each token as it comes, times static ratios m_k * 2^e; else carrier)
    act_granularity: str = "tensor"
    act_range: str = "mse"
    range_norm: float = 2.0  # the "mse" search minimizes |x_hat - x|^range_norm; above 2 it clips less (paper: 2)
    act_symmetric: bool = False
    act_ema: float | None = None  # running min-max over calibration batches (release: 0.95)
    step_groups: int = 1  # sets of activation scales over the sampler's steps, at most one a step (paper: one)
    weight_range: str = "mse"
    split_skip: bool = True  # separate scales for the two halves of a UNet concatenation (Q-Diffusion)
    calib_batch: int = 64  # samples of each step group used for ranges
    calib_steps: str = "uniform"  # their steps; normal: more of the late, less noisy ones (PTQ4DM)
    te_token: bool = False  # the time-embedding layers' inputs, which depend on t alone, have a range for each t (TFMQ-DM)
    # AdaRound block reconstruction (Q-Diffusion / BRECQ)
    adaround: bool = False
    adaround_iters: int = 20000  # per block
    adaround_lr: float = 1e-3
    recon_samples: int = 256  # calibration inputs kept for a block
    act_recon: bool = False  # Q-Diffusion's second stage: activation scales, block by block
    act_iters: int = 5000
    act_lr: float = 4e-4
    temporal_block: bool = False  # AdaRound takes all time-embedding layers as one block, over all steps (TFMQ-DM)
    noise_correction: bool = False  # of the predicted noise, from its error on the calibration set (PTQ-D)
    # QuEST finetuning (Sec. 3.3)
    te: str = "finetune"  # Table 2: ptq (quantized, not finetuned) | fp (left in full precision) | finetune
    te_layers: str = "all"
    cma_layers: str = "attention"  # all: every layer, full finetuning
    lora_rank: int = 0  # above 0 low-rank updates are trained in place of the CMA stage's weights, and merged (EfficientDM)
    tla_iters: int = 0
    cma_iters: int = 0
    local_loss: bool = True  # L_TLA and L_CMA; the release has L_CMA off on LSUN and ImageNet
    cma_local_loss: bool = True
    normalize_local: bool = False  # divide each layer's local loss by its full-precision power
    global_weight: float = 2.0  # total loss: L_TLA + L_CMA + 2 L_G
    tla_order: str = "joint"  # of TLA. joint: all steps in one expectation (paper); sequential: one step after another (release)
    lr_weight: float = 1e-5
    lr_scale: float = 1e-4
    lr_scale_tla: float | None = None  # None: lr_scale (release: 1e-5)
    lr_relative: bool = False  # learning rates are fractions of each scale / of each weight's quantization step
    lr_decay: bool = False  # cosine to zero over each stage (paper: constant)
    batch_size: int = 32
    seed: int = 0
    # memory
    forward_batch: int = 64  # at most so many inputs at once go through the UNet where activations are recorded
    # finetuning: gradient checkpointing, the teacher's targets wait on the CPU, untrained layers keep one weight; same gradients
    save_memory: bool = False

    def __post_init__(self) -> None:
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            if type(value) not in kinds:
                words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ConfigError(f"{name}: expected {words}, found {value!r}")
        for key in ("weight_bits", "act_bits", "softmax_bits", "first_last_act_bits", "first_last_weight_bits", "te_act_bits"):
            bits = getattr(self, key)
            if bits is None and key not in ("weight_bits", "act_bits"):
                continue
            if not isinstance(bits, int) or not (2 <= bits <= 8 or bits == OFF):
                raise ConfigError(f"{key}: expected 2..8, or {OFF} for off, found {bits!r}")
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key}: expected one of {', '.join(allowed)}, found {getattr(self, key)!r}")
        for key in ("step_groups", "calib_batch", "batch_size", "recon_samples", "forward_batch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: expected at least 1, found {getattr(self, key)}")
        for key in ("adaround_iters", "act_iters", "tla_iters", "cma_iters", "lora_rank"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: expected 0 or more, found {getattr(self, key)}")
        for key in FLOATS:
            value, positive, below = getattr(self, key), key == "range_norm", 1 if key == "act_ema" else math.inf
            if value is not None and not ((value > 0 if positive else value >= 0) and value < below):
                words = "a positive number" if positive else f"0 or more, below {below}"
                raise ConfigError(f"{key}: expected {words}, found {value!r}")
        if self.noise_correction and self.finetunes:
            raise ConfigError("noise_correction: expected post-training quantization alone, found finetuning stages beside it")

    @classmethod
    def preset(cls, name: str, weight_bits: int = 4, act_bits: int = 4, **overrides) -> QuantConfig:
        """A row of the tables by name, with overrides by keyword. ConfigError for an unknown preset or key."""
        if name not in PRESETS:
            raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
        values = PRESETS[name] | (PRESETS_A4.get(name, {}) if act_bits <= 4 else {})
        return cls.from_dict({"preset_name": name, "weight_bits": weight_bits, "act_bits": act_bits} | values | overrides)

    @classmethod
    def from_dict(cls, values: dict) -> QuantConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown key {', '.join(unknown)}; known keys: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def replace(self, **changes) -> QuantConfig:
        return self.from_dict(self.to_dict() | changes)

    def hash(self) -> str:
        return _digest(self.to_dict())

    def weight_key(self) -> str:
        """Hash of what decides the rounded weights alone, so that presets and act bits share one AdaRound run."""
        keys = (
            "weight_bits",
            "first_last_weight_bits",
            "weight_range",
            "split_skip",
            "adaround",
            "adaround_iters",
            "adaround_lr",
            "recon_samples",
            "batch_size",
            "seed",
        )
        values = {k: getattr(self, k) for k in keys} | {"te_fp": self.te == "fp"}
        values |= {"temporal_block": True} if self.temporal_block else {}
        return _digest(values)

    def range_key(self) -> str:
        """Hash of all but what has no part in the search for activation ranges, so that presets and weight bits share one."""
        values = {k: v for k, v in self.to_dict().items() if k not in AFTER_RANGES} | {"te": self.te == "fp"}
        # in the others, 4-bit weights make room for the ratios' 2^e
        if self.act_granularity in ("tensor", "channel") and not self.te_token:
            del values["weight_bits"], values["first_last_weight_bits"]
        return _digest(values)

    @property
    def finetunes(self) -> bool:
        tla = self.te == "finetune" and self.tla_iters > 0
        return tla or self.cma_layers != "none" and self.cma_iters > 0


_TYPES = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,), "None": (type(None),)}
FLOATS = [f.name for f in dataclasses.fields(QuantConfig) if "float" in f.type]
KINDS = {f.name: sum((_TYPES[kind] for kind in f.type.split(" | ")), ()) for f in dataclasses.fields(QuantConfig)}

_Q_DIFFUSION = dict(
    act_range="mse", adaround=True, act_recon=True, softmax_bits=8, first_last_act_bits=8, te="ptq", cma_layers="none"
)
PRESETS: dict[str, dict] = {
    # naive post-training quantization: the ranges are what was seen
    "minmax": dict(
        act_range="minmax", weight_range="minmax", split_skip=False, te="ptq", cma_layers="none", first_last_act_bits=8,
        softmax_bits=8,
    ),
    # Li et al., ICCV 2023: split shortcuts, AdaRound by blocks, then activation scales by blocks; one set over time
    "q-diffusion": _Q_DIFFUSION,
    # Shang et al., CVPR 2023: calibration at normally distributed steps, ranges by |error|^2.4, no reconstruction
    "ptq4dm": dict(
        act_range="mse", range_norm=2.4, calib_steps="normal", split_skip=False, te="ptq", cma_layers="none", softmax_bits=8,
        first_last_act_bits=8,
    ),
    # He et al., NeurIPS 2023: Q-Diffusion, then the predicted noise is freed of its correlated error and its bias
    "ptq-d": _Q_DIFFUSION | dict(noise_correction=True),
    # He et al., ICLR 2024: low-rank updates of all layers, merged before quantization, in units of each layer's step; activation
    # scales for each step; the model's output alone is compared. Rank and iterations as QuEST's Table 8 and text have them; the
    # learning rates are ours
    "efficientdm": dict(
        act_range="mse", step_groups=1000, te="ptq", cma_layers="all", lora_rank=32, local_loss=False, cma_iters=32000,
        softmax_bits=8, first_last_act_bits=8, lr_relative=True, lr_decay=True, lr_weight=1e-3, lr_scale=2e-3,
    ),
    # Huang et al., CVPR 2024: the time path reconstructed as one block, a range for each t there, all else as Q-Diffusion
    "tfmq-dm": _Q_DIFFUSION | dict(temporal_block=True, te_token=True),
    # all weights and activation scales on the global loss, as many iterations as QuEST (Table 8)
    "full-finetune": dict(
        act_range="mse", adaround=True, te="ptq", cma_layers="all", local_loss=False, cma_iters=2200, softmax_bits=8,
        first_last_act_bits=8, lr_weight=1e-5, lr_scale=1e-4,
    ),
    # the paper's text: everything at the stated bits, one set of scales, local and global losses, 2.2k iterations
    "quest-paper": dict(act_range="mse", adaround=True, tla_iters=1100, cma_iters=1100, lr_weight=1e-5, lr_scale=1e-4),
    # the official release's settings for LSUN-Bedrooms (facts read off it): per step group, TE projections only, qkv only, no
    # L_CMA, symmetric running min-max at A8, free per-channel scales at A4; for other data sets: reproduce/datasets.py
    "quest-release": dict(
        act_range="minmax", act_symmetric=True, act_ema=0.95, step_groups=20, adaround=True, softmax_bits=8,
        first_last_act_bits=8,
        te_layers="projections", cma_layers="qkv", cma_local_loss=False, global_weight=1.0, tla_order="sequential",
        tla_iters=16000, cma_iters=6400, lr_weight=1e-5, lr_scale=1e-4, lr_scale_tla=1e-5,
    ),
    # ours: integer-executable granularity, TE layers and all attention layers, step groups, both losses: local errors relative to
    # each layer's power, L_G ten times as heavy as in the paper (ablation: global-2)
    "quest": dict(
        act_range="mse", adaround=True, step_groups=4, softmax_bits=8, first_last_act_bits=8,
        first_last_weight_bits=8, normalize_local=True, global_weight=20.0,
        tla_iters=1100, cma_iters=1100, lr_relative=True, lr_decay=True, lr_weight=2e-2, lr_scale=2e-3,
    ),
}  # fmt: skip
PRESETS_A4: dict[str, dict] = {  # what changes at 4-bit activations
    "quest-release": dict(act_granularity="channel", act_ema=None, act_range="mse"),
    "quest": dict(act_granularity="carrier"),
}
