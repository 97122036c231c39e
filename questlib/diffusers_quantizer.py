"""questlib as one of diffusers' own quantizers: `quant_method: "quest"` in a model's config.json.

`save_pretrained` of a quantized UNet, or of its pipeline, writes packed weights in diffusers' file
names. `from_pretrained` gives the quantized model back, bit for bit, once questlib is imported
(`questlib.registration`). The tensors are those of `questlib.checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from questlib.errors import CheckpointError, ConfigError
from questlib.integrity import check_digests, digest_of_json, opened, with_digests
from questlib.registration import register

METHOD = "quest"
FORMAT = 2  # of the tensors, as in `questlib.checkpoint`
CONFIG_FILE = "config.json"
CONFIG_DIGEST = "config"  # what the weights' metadata say of config.json


class QuestMethod(StrEnum):
    """The name of the method, as diffusers holds those of its own."""

    QUEST = METHOD


class QuestQuantizationConfig(QuantizationConfigMixin):
    """What config.json says about a quantized UNet, under `quantization_config`.

    Args:
        quant: `QuantConfig.to_dict()`.
        timesteps: the calibrated timesteps, in the sampler's order.
        format: of the tensors.
    """

    def __init__(
        self, quant: dict[str, Any], timesteps: list[float], format: int = FORMAT, **more: Any
    ) -> None:
        method = more.pop("quant_method", METHOD)
        if format != FORMAT or method != METHOD or more:
            raise CheckpointError(
                f"quantization_config: expected quant_method {METHOD!r} of format {FORMAT}, found "
                f"{method!r} of format {format!r} with {', '.join(more) or 'nothing else'}"
            )
        self.quant_method = QuestMethod.QUEST
        self.quant = quant
        self.timesteps = timesteps
        self.format = format

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON holds them."""
        return {**vars(self), "quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same, for diffusers' messages."""
        return self.to_dict()


class QuestQuantizer(DiffusersQuantizer):
    """Saves and loads quantized UNets for diffusers. Quantizing needs `questlib.quantize`."""

    requires_calibration = True
    required_packages = ["questlib"]

    def __init__(self, quantization_config: QuestQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.model: nn.Module | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.dtype: torch.dtype | None = None
        self.device: Any = "cpu"
        self.files: list[Path] = []

    # ---- saving ----

    @property
    def is_serializable(self) -> bool:
        """True. Asked before anything is written: QuestError where the model cannot be saved."""
        from questlib.packing import check_rebuildable

        assert self.model is not None
        check_rebuildable(self.model)
        return True

    @property
    def is_trainable(self) -> bool:
        """False: `questlib.finetune` is what trains such a model."""
        return False

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The packed tensors, in place of the model's own."""
        from questlib.packing import stored_tensors

        assert self.model is not None
        stored = stored_tensors(self.model)
        config = saved_entries(json.loads(self.model.to_json_string()))
        return stored, with_digests(stored, {CONFIG_DIGEST: digest_of_json(config)})

    # ---- loading ----

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Remember the precision that is wanted; None: float32, as for diffusers' own models."""
        self.dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: dict[str, Any] | None) -> None:
        """Remember the device that is wanted. ConfigError where there are several."""
        devices = set(device_map.values()) if device_map else {"cpu"}
        if len(devices) > 1:
            raise ConfigError(f"device_map: a quantized UNet is on one device, found {devices}")
        (self.device,) = devices

    @property
    def supports_parallel_loading(self) -> bool:
        """False: the tensors are gathered one file after another."""
        return False

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """None: diffusers itself loads nothing. The files are remembered."""
        self.files = [Path(file) for file in checkpoint_files or ()]
        return []

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """None: what is missing is found when all files are read."""
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take over a file's tensors."""
        self.tensors |= state_dict
        return {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from questlib.baselines.noise_correction import insert_correction
        from questlib.packing import check_calibrated, load_tensors, read_quantization
        from questlib.quantization.model import freeze
        from questlib.quantization.precision import cast
        from questlib.quantization.preparation import insert

        config = self.quantization_config
        where = Path(str(model.config.get("_name_or_path") or type(model).__name__))
        self.check_files(where)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=torch.float32)
                    module._parameters[name] = nn.Parameter(empty)
        cast(model, torch.float32)
        quant, timesteps = read_quantization(where, config.quant, config.timesteps)
        insert(model, quant, timesteps, search_weights=False)
        if quant.noise_correction:
            insert_correction(model)
        load_tensors(where, model, self.tensors)
        check_calibrated(where, model)
        cast(freeze(model), self.dtype or torch.float32)
        model.to(self.device)
        # diffusers refuses to cast what it calls quantized. These layers can be cast.
        model.is_quantized = False
        self.tensors = {}
        self.model = model
        return model

    def check_files(self, where: Path) -> None:
        """CheckpointError unless the files hold what was saved. Those of before cannot tell."""
        if self.files:
            with opened(self.files[0]) as (_, known):
                pass
            check_digests(where, self.tensors, known)
            config = self.files[0].parent / CONFIG_FILE
            check_saved_config(config, read_config(config), known.about)


# ---- config.json ----


def read_config(path: Path) -> dict[str, Any]:
    """What config.json holds. CheckpointError where it cannot be read, or is no object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"checkpoint {path}: expected an object, found {type(config).__name__}"
        )
    return config


def saved_entries(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of diffusers' config.json that decide the model: no paths, no versions."""
    return {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}


def check_saved_config(path: Path, config: dict[str, Any], about: Mapping[str, Any]) -> None:
    """CheckpointError unless diffusers' config.json is what was saved with the weights."""
    digest = about.get(CONFIG_DIGEST)
    if digest is not None and digest != digest_of_json(saved_entries(config)):
        raise CheckpointError(f"checkpoint {path}: not what was saved with its weights")


def attach(unet: nn.Module) -> None:
    """Give a quantized UNet what diffusers' `save_pretrained` asks for."""
    config = QuestQuantizationConfig(
        unet.quest_config.to_dict(), unet.quest_steps.timesteps.flip(0).tolist()
    )
    unet.hf_quantizer = QuestQuantizer(config)
    unet.hf_quantizer.model = unet
    unet.register_to_config(quantization_config=config)


register()
