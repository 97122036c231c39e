"""Every choice that decides how a model is quantized and finetuned, by name.

The groups of choices are in `questlib.config_groups`. Section numbers are those of the paper (arXiv
2402.03666v6).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from questlib.config_groups import (
    GROUPS,
    OFF,
    ActReconConfig,
    AdaRoundConfig,
    Bits,
    Count,
    FinetuningConfig,
    MixedConfig,
    Power,
    RangeConfig,
    Seed,
    Settings,
    TransformConfig,
)
from questlib.errors import ConfigError, did_you_mean
from questlib.presets import preset_values


def digest(values: Any) -> str:
    """Sixteen hex digits of values: sha256 of their JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class QuantConfig(Settings):
    """How a model is quantized and finetuned. Frozen.

    A field of a group is set by its dotted name, or by a keyword that names it alone:
    ``tla_iters``, ``finetuning.tla_iters`` and ``finetuning=dict(tla_iters=...)`` are the same.
    ``adaround=True`` is short for ``adaround.enabled``, ``adaround_iters`` for ``adaround.iters``.

    Example:
        >>> config = QuantConfig.preset("quest", 4, 4, tla_iters=100)
        >>> config.finetuning.tla_iters
        100

    Raises:
        ConfigError: an unknown name, or a value of another type or outside its range.
    """

    preset_name: str = "custom"
    """The preset that this configuration started from."""

    weight_bits: Bits = 4
    """Bits of the weights: 2 to 8, or 16 for off."""

    act_bits: Bits = 4
    """Bits of the activations: 2 to 8, or 16 for off."""

    softmax_bits: Bits | None = None
    """Bits of the softmax output, unsigned with zero point 0; None: `act_bits`."""

    first_last_act_bits: Bits | None = None
    """Bits of the inputs of conv_in and conv_out; None: `act_bits`."""

    first_last_weight_bits: Bits | None = None
    """Bits of the weights of conv_in and conv_out; None: `weight_bits`."""

    te_act_bits: Bits | None = None
    """Bits of the inputs of the time-embedding layers; None: `act_bits`."""

    act_layers: Literal["all", "feed_forward", "linear", "conv"] = "all"
    """Layers whose inputs are quantized (Fig. 3). all: attention's products too. linear: all linear
    layers but the feed-forward ones."""

    te: Literal["ptq", "fp", "finetune"] = "finetune"
    """Time-embedding layers (Table 2). ptq: quantized, not finetuned. fp: in full precision."""

    weight_range: Literal["minmax", "mse"] = "mse"
    """The search for the range of each output channel's weights."""

    weight_range_norm: Power = 2.0
    """The "mse" search minimizes |w_hat - w|^weight_range_norm (release: 2.4)."""

    split_skip: bool = True
    """Whether the two halves of a UNet's concatenations have scales of their own (Q-Diffusion)."""

    skip_layers: list[str] = []
    """Layers that stay in full precision: their names, or patterns such as "*.fuser.*"."""

    float_attention: list[str] = []
    """Attentions whose products stay in floating point, while their projections are quantized:
    their names, or patterns such as "*.attn1". `attention="float"` or "auto" of `convert` and
    `from_pretrained` sets it."""

    layer_weight_bits: dict[str, Bits] = {}
    """Bits of the weights of single layers, by name; they win over all other choices. `mixed` sets
    them."""

    layer_act_bits: dict[str, Bits] = {}
    """Bits of the inputs of single layers, likewise."""

    noise_correction: bool = False
    """Whether the predicted noise is corrected by its error on the calibration set (PTQ-D)."""

    batch_size: Count = 32
    """Calls of the UNet in one iteration of finetuning, of a block in one of `act_recon`."""

    seed: Seed = 0
    """Seed of everything that is drawn at random."""

    forward_batch: Count = 64
    """Inputs that go through the UNet at once where activations are recorded."""

    save_memory: bool = False
    """Finetuning in less memory, with the same gradients: gradient checkpointing, targets wait on
    the CPU, untrained layers keep one copy of their weight."""

    ranges: RangeConfig = RangeConfig()
    """How the range of each activation is found."""

    adaround: AdaRoundConfig = AdaRoundConfig()
    """Learned rounding of weights."""

    act_recon: ActReconConfig = ActReconConfig()
    """Activation scales, trained block by block."""

    finetuning: FinetuningConfig = FinetuningConfig()
    """Selective finetuning."""

    transforms: TransformConfig = TransformConfig()
    """What stands before and beside linear layers."""

    mixed: MixedConfig = MixedConfig()
    """Bits for each layer by its sensitivity."""

    def __init__(self, **values: Any) -> None:
        nested = _nested(values)
        try:
            for name, group in GROUPS.items():
                if isinstance(nested.get(name), dict):
                    nested[name] = group(**nested[name])
            super().__init__(**nested)
        except ValidationError as error:
            raise ConfigError(_sentence(error)) from error

    @model_validator(mode="after")
    def _check_together(self) -> QuantConfig:
        if self.noise_correction and self.finetunes:
            raise ValueError(
                "noise_correction: expected post-training quantization alone, "
                "found finetuning stages beside it"
            )
        for name, bits, choices in (
            ("weight", self.weight_bits, self.mixed.weight_choices),
            ("act", self.act_bits, self.mixed.act_choices),
        ):
            if choices and not min(choices) <= bits < OFF:
                raise ValueError(
                    f"mixed.{name}_choices: expected one of at most {name}_bits, which is their "
                    f"mean; found {choices} with {name}_bits {bits}"
                )
        if self.ranges.calib_model == "quantized" and (
            self.ranges.act_granularity in ("carrier", "token") or self.ranges.te_token
        ):
            raise ValueError(
                "ranges.calib_model: expected full, since the grids of carriers and tokens are "
                "known only when all step groups were seen; found quantized"
            )
        return self

    @classmethod
    def preset(
        cls, name: str, weight_bits: int = 4, act_bits: int = 4, **overrides: Any
    ) -> QuantConfig:
        """A row of the tables by name, with overrides by keyword.

        Raises:
            ConfigError: an unknown preset or name, or a value outside its range.
        """
        bits = {"weight_bits": weight_bits, "act_bits": act_bits}
        return cls(preset_name=name, **bits, **preset_values(name, act_bits)).replace(**overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The configuration that `to_dict` wrote, or that a checkpoint of format 1 holds.

        Format 1 has flat names, which are today's keywords.
        """
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All values, groups as nested dicts; JSON holds them exactly."""
        return self.model_dump()

    def replace(self, **changes: Any) -> QuantConfig:
        """A copy with other values.

        Raises:
            ConfigError: an unknown name, or a value outside its range.
        """
        return type(self)(**_merged(self.to_dict(), _nested(changes)))

    def get(self, name: str) -> Any:
        """The value of a field by its dotted name or keyword. ConfigError for an unknown one."""
        value: Any = self
        for part in field_path(name):
            value = getattr(value, part)
        return value

    # ---- keys of cached results: what decides each stage's numbers, and nothing else ----

    def chosen(self) -> dict[str, Any]:
        """The values that differ from the defaults, groups as nested dicts.

        Keys are made of them, so that a new field leaves the keys as they are. A default that
        changes raises the version of its stage (`questlib.versions`).
        """
        return _chosen(self)

    def hash(self) -> str:
        """Key of everything."""
        return digest(self.chosen())

    def range_key(self) -> str:
        """Key of the activation ranges.

        They are searched with full-precision weights, or with those that AdaRound gives.
        `forward_batch` decides which values of a batch are kept for the search.
        """
        values: dict[str, Any] = {"ranges": _chosen(self.ranges), "te": self.te == "fp"}
        if self.ranges.calib_model == "quantized":
            values |= {"weights": self.adaround_key(), "adaround": self.adaround.enabled}
        names = ["act_bits", "softmax_bits", "first_last_act_bits", "te_act_bits", "act_layers"]
        names += ["split_skip", "forward_batch", "seed"]
        if self.ranges.act_granularity in ("carrier", "token") or self.ranges.te_token:
            # 4-bit weights make room for the ratios' 2^e
            names += ["weight_bits", "first_last_weight_bits"]
        names += ["skip_layers"] if self.skip_layers else []
        names += ["float_attention"] if self.float_attention else []
        values |= self._of_layers()
        return digest(values | {name: getattr(self, name) for name in names})

    def adaround_key(self) -> str:
        """Key of the weights that AdaRound gives, with activations in full precision."""
        values = {"adaround": _chosen(self.adaround), "te": self.te == "fp"}
        names = ["weight_bits", "first_last_weight_bits", "weight_range", "weight_range_norm"]
        names += ["split_skip", "seed"]
        names += ["skip_layers"] if self.skip_layers else []
        values |= self._of_layers()
        return digest(values | {name: getattr(self, name) for name in names})

    def _of_layers(self) -> dict[str, Any]:
        """What transforms and bits of single layers add to a key; nothing where there are none.

        Smoothing quantizes activations where it compares its factors.
        """
        found: dict[str, Any] = {}
        for name in ("transforms", "layer_weight_bits", "layer_act_bits"):
            value = getattr(self, name)
            if isinstance(value, Settings):
                value = _chosen(value)
            if value:
                found[name] = value
        if self.transforms.smoothing:
            names = ["weight_bits", "act_bits", "weight_range", "weight_range_norm"]
            names += ["adaround.samples", "forward_batch"]
            found |= {"smoothed for": [self.get(name) for name in names]}
        return found

    def act_recon_key(self) -> str:
        """Key of the activation scales that Q-Diffusion's second stage gives."""
        values: dict[str, Any] = {"ranges": self.range_key()}
        values |= {"act_recon": _chosen(self.act_recon)}
        values |= {"weights": self.adaround_key(), "batch_size": self.batch_size}
        return digest(values)

    @property
    def finetunes(self) -> bool:
        """Whether any stage of finetuning runs."""
        return self.iterations > 0

    @property
    def iterations(self) -> int:
        """Iterations of finetuning, of both stages."""
        tla = self.finetuning.tla_iters if self.te == "finetune" else 0
        cma = self.finetuning.cma_iters if self.finetuning.cma_layers != "none" else 0
        return tla + cma


# ---- names of fields ----

# keywords that are not the field's own name; format 1 of checkpoints has them
KEYWORDS = {
    "adaround_iters": "adaround.iters",
    "adaround_lr": "adaround.lr",
    "adaround_batch_size": "adaround.batch_size",
    "recon_samples": "adaround.samples",
    "act_iters": "act_recon.iters",
    "act_lr": "act_recon.lr",
}
_OWN_NAMES = {
    field: f"{group}.{field}"
    for group, settings in GROUPS.items()
    for field in settings.model_fields
    if field not in ("enabled", "iters", "lr", "samples", "batch_size")
}


def field_path(name: str) -> list[str]:
    """The parts of a field's dotted name, from that name or a keyword. ConfigError if unknown."""
    path = (KEYWORDS | _OWN_NAMES).get(name, name).split(".")
    group = GROUPS.get(path[0]) if len(path) == 2 else None
    known = path[0] in QuantConfig.model_fields if len(path) == 1 else False
    if not known and (group is None or path[1] not in group.model_fields):
        names = sorted({*QuantConfig.model_fields, *KEYWORDS, *_OWN_NAMES})
        hint = did_you_mean(name, names) or f"; known keys: {', '.join(names)}"
        raise ConfigError(f"unknown key {name}{hint}")
    return path


def _chosen(settings: Settings) -> dict[str, Any]:
    """A group's values that differ from the defaults."""
    return settings.model_dump(exclude_defaults=True)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by any name -> values by field, each group as a dict of its own fields."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = field_path(name)
        if isinstance(value, Settings):
            value = value.model_dump()
        if path[0] in GROUPS and isinstance(value, bool) and len(path) == 1:
            path = [path[0], "enabled"]
        if len(path) == 1 and path[0] in GROUPS and isinstance(value, Mapping):
            own = {field_path(f"{name}.{field}")[1]: v for field, v in value.items()}
            found = _merged(found, {name: own})
        elif len(path) == 1:
            found[path[0]] = value
        else:
            found = _merged(found, {path[0]: {path[1]: value}})
    return found


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in their place, inside the groups too."""
    merged = dict(values)
    for name, value in changes.items():
        own = merged.get(name)
        inside = name in GROUPS and isinstance(own, dict) and isinstance(value, dict)
        merged[name] = own | value if inside else value
    return merged


def _sentence(error: ValidationError) -> str:
    """One line about the first thing that is wrong."""
    first = error.errors()[0]
    words = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if not first["loc"]:
        return words
    where = ".".join(str(part) for part in first["loc"] if str(part)[:1].islower())
    return f"{where}: {words}, found {first['input']!r}"


def _described(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    """One line for each field of a group: its name, default and meaning."""
    for name, field in settings.model_fields.items():
        if name in GROUPS:
            yield ""
            yield f"    {name}: {GROUPS[name].__doc__}"
            yield from _described(GROUPS[name], f"{name}.")
        else:
            words = " ".join((field.description or "").split())
            yield f"    {prefix}{name} = {field.default!r}: {words}"


QuantConfig.__doc__ = "\n".join(
    [QuantConfig.__doc__ or "", "    Fields:", *_described(QuantConfig)]
)
