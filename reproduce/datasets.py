"""The paper's data sets: at each scale the model that stands for one, and how it is sampled.

At `paper` scale sampler, steps, eta, guidance and calibration are those of the official release,
and the numbers of samples those of the paper's text. At the other scales embedded models stand
in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from questlib.config import OFF
from reproduce.evaluation.constants import CLIP_MODEL, COCO_PROMPTS
from reproduce.models.embedded import MINI

# Its folder has the reference statistics of the images that all emoji models were trained on.
EMOJI = "mini-ldm4"
MINI_CLIP = f"local-dir:{MINI / 'mini-clip'}"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    sampler: str
    num_inference_steps: int
    eta: float
    guidance_scale: float

    def __str__(self) -> str:
        guidance = f", guidance {self.guidance_scale:g}" if self.guidance_scale != 1 else ""
        steps = f"{self.num_inference_steps} steps"
        return f"{self.sampler.upper()} {steps}, eta {self.eta:g}{guidance}"


@dataclass(frozen=True)
class Setting:
    """A data set's model at one scale and how it is sampled."""

    num_inference_steps: int
    samples_per_seed: int
    calib_samples: int
    """Trajectories of the full-precision model."""

    sample_batch: int
    model: str | None = None
    """An embedded name; None: a folder or hub id must be given."""

    reference: str | None = None
    """Reference statistics for FID: an embedded name; None: a file or folder must be given."""

    captions: str | None = None
    """Prompts in COCO's annotations format; None: there are none, or a file must be given."""

    sampler: str = "ddim"
    eta: float = 0.0
    guidance_scale: float = 1.0
    features: str | None = None
    """Features of the metrics. None: the scale's; "none": no features, and no FID."""

    clip: str = CLIP_MODEL
    """The CLIP model of the CLIP score."""

    overrides: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    """Values of `QuantConfig` by name; they win over the scale's."""

    @property
    def sampling(self) -> Sampling:
        """How its images are drawn."""
        return Sampling(self.sampler, self.num_inference_steps, self.eta, self.guidance_scale)

    @property
    def takes_features(self) -> bool:
        """Whether its metrics take features."""
        return self.features != "none"

    @property
    def evaluations(self) -> int:
        """Calls of the UNet for one sample.

        Guidance takes two calls a step, and PLMS one more step.
        """
        steps = self.num_inference_steps + (1 if self.sampler == "plms" else 0)
        return steps * (2 if self.guidance_scale != 1 else 1)


@dataclass(frozen=True)
class Dataset:
    """One of the paper's data sets."""

    name: str
    title: str
    weights: str
    """What `paper` scale needs, in words."""

    config: str
    """The paper's model: name of a CompVis config (`reproduce.models.compvis`), or a hub id."""

    settings: Mapping[str, Setting]
    """By scale."""

    has_reference: bool = True
    """Whether its tables ask for FID."""

    has_captions: bool = False
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: NOTHING)
    """Values of `QuantConfig` that a preset has for these data, by preset."""

    @property
    def model_env(self) -> str:
        """Environment variable: folder or hub id of the weights."""
        return f"QUEST_{self.name.upper()}"

    @property
    def reference_env(self) -> str:
        """Environment variable: file with reference statistics, or images."""
        return f"{self.model_env}_REFERENCE"

    captions_env = "QUEST_COCO"

    def setting(
        self,
        scale: str,
        model: str | None = None,
        reference: str | None = None,
        captions: str | None = None,
    ) -> Setting:
        """The setting at a scale.

        What is given wins over the scale's own, and that over the environment's variables.
        """
        own = self.settings[scale]
        found = os.environ.get(self.reference_env) if self.has_reference else None
        prompts = os.environ.get(self.captions_env) if self.has_captions else None
        return replace(
            own,
            model=model or own.model or os.environ.get(self.model_env),
            reference=reference or own.reference or found,
            captions=captions or own.captions or prompts,
        )

    def missing(self, setting: Setting) -> str | None:
        """Why nothing of this data set can run with `setting`, or None."""
        needs = []
        if setting.model is None:
            needs.append(f"{self.weights} (--model FOLDER_OR_HUB_ID or ${self.model_env})")
        elif (
            setting.model in {s.model for s in self.settings.values()}
            and not (MINI / setting.model / "model_index.json").is_file()
        ):
            needs.append(f"the embedded model {setting.model}, which does not exist yet")
        if self.has_reference and setting.reference is None and setting.takes_features:
            needs.append(
                f"FID reference images or statistics (--reference PATH or ${self.reference_env})"
            )
        if self.has_captions and setting.captions is None:
            needs.append(
                f"COCO captions, captions_val2014.json (--captions FILE or ${self.captions_env})"
            )
        elif setting.captions == SD_CAPTIONS and not Path(SD_CAPTIONS).is_file():
            needs.append(
                f"the captions of {setting.model}, {Path(SD_CAPTIONS).name}, which do not exist yet"
            )
        return f"needs {' and '.join(needs)}" if needs else None


GUIDED = 500  # samples a seed at mini scale, where each takes two calls a step
SD_CAPTIONS = str(MINI / "mini-sd" / "captions.json")


def _mini(model: str, *, smoke_features: str | None = None, **changes: Any) -> dict[str, Setting]:
    """The embedded stand-in at `smoke`, `mini` and `full` scale."""
    common: dict[str, Any] = dict(
        model=model, reference=EMOJI, num_inference_steps=20, samples_per_seed=1000
    )
    common |= changes
    smoke = common | dict(num_inference_steps=4, samples_per_seed=32)
    smoke |= {} if smoke_features is None else dict(features=smoke_features)
    return {
        "smoke": Setting(calib_samples=8, sample_batch=32, **smoke),
        "mini": Setting(calib_samples=64, sample_batch=100, **common),
        "full": Setting(calib_samples=256, sample_batch=100, **common),
    }


def _paper(steps: int, **settings: Any) -> dict[str, Setting]:
    """The paper's model."""
    common: dict[str, Any] = dict(samples_per_seed=50_000, calib_samples=256, sample_batch=32)
    return {"paper": Setting(num_inference_steps=steps, **(common | settings))}


DATASETS: dict[str, Dataset] = {
    d.name: d
    for d in (
        Dataset(
            name="bedrooms",
            title="LSUN-Bedrooms 256x256, LDM-4",
            weights="the LSUN-Bedrooms LDM-4 weights",
            config="lsun_beds256",
            settings=_mini("mini-ldm4") | _paper(200, eta=1.0),
        ),
        Dataset(
            name="churches",
            title="LSUN-Churches 256x256, LDM-8",
            weights="the LSUN-Churches LDM-8 weights",
            config="lsun_churches256",
            settings=_mini("mini-ldm8") | _paper(500),
            presets={
                "quest-release": dict(act_range="percentile", act_symmetric=False, act_ema=None)
            },
        ),
        Dataset(
            name="imagenet",
            title="ImageNet 256x256, class-conditional LDM-4",
            weights="the ImageNet LDM-4 weights",
            config="cin256-v2",
            settings=_mini("mini-cin", guidance_scale=3.0, samples_per_seed=GUIDED)
            | _paper(20, guidance_scale=3.0),
            presets={"quest-release": dict(cma_layers="no_context", tla_iters=24000)},
        ),
        Dataset(
            name="sd",
            title="Stable Diffusion v1.4, 512x512, COCO 2014 validation prompts",
            weights="the Stable Diffusion v1.4 weights",
            config="sd-v1-4",
            has_reference=False,
            has_captions=True,
            # The release takes 50 to 400 TLA passes a step group; here it is 225. The first step
            # group's ranges are a running min-max there; here all are percentiles of 8 samples.
            presets={
                "quest-release": dict(
                    act_range="percentile",
                    act_symmetric=False,
                    act_ema=None,
                    calib_batch=8,
                    step_groups=25,
                    split_skip=True,
                    adaround_batch_size=4,
                    softmax_bits=OFF,
                    cma_layers="feed_forward",
                    cma_local_loss=True,
                    tla_iters=5625,
                    cma_iters=8000,
                )
            },
            settings=_mini(
                "mini-sd",
                samples_per_seed=GUIDED,
                sampler="plms",
                num_inference_steps=50,
                guidance_scale=3.0,
                captions=SD_CAPTIONS,
                clip=MINI_CLIP,
            )
            | _paper(
                50,
                sampler="plms",
                guidance_scale=7.5,
                samples_per_seed=COCO_PROMPTS,
                calib_samples=128,
                sample_batch=8,
                # Attention maps are 4096 x 4096: more does not fit one GPU.
                overrides=dict(batch_size=4, adaround_batch_size=4, forward_batch=8),
            ),
        ),
        # Not in the paper. 50 steps and guidance 1.5 are this project's choice for DiT-XL/2.
        Dataset(
            name="dit",
            title="ImageNet 256x256, DiT-XL/2",
            weights="the DiT-XL/2 weights",
            config="facebook/DiT-XL-2-256",
            settings=_mini("mini-dit", guidance_scale=3.0, samples_per_seed=GUIDED)
            | _paper(50, guidance_scale=1.5),
        ),
        # The paper does not say how many steps its CIFAR-10 rows take. 100, as in Q-Diffusion, is
        # this project's choice, and 20 at mini scale, as for the other embedded models.
        #
        # Its FID is always taken with Inception, so that it can be read beside other CIFAR-10
        # FIDs. At smoke scale, which runs everywhere, there is none.
        Dataset(
            name="cifar10",
            title="CIFAR-10 32x32, pixel-space DDIM",
            weights="a CIFAR-10 diffusion model",
            config="google/ddpm-cifar10-32",
            settings=_mini(
                "mini-cifar",
                samples_per_seed=500,
                reference=None,
                features="inception",
                smoke_features="none",
            )
            | _paper(100, sample_batch=500),
        ),
    )
}
