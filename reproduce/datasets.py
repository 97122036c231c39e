"""The paper's data sets: at each scale the model that stands for it, and how that model is sampled.

At `paper` scale these are the settings of the official release (sampler, steps, eta, guidance, calibration), of the paper's own
text for numbers of samples. At `mini` and `smoke` scale embedded models stand in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from questlib.config import OFF
from reproduce.evaluation.clip_score import CLIP_MODEL, COCO_PROMPTS
from reproduce.models.loading import MINI

EMOJI = "mini-ldm4"  # its folder has the reference statistics of the images that all emoji models were trained on
MINI_CLIP = f"local-dir:{MINI / 'mini-clip'}"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Setting:
    """A data set's model at one scale and how it is sampled."""

    num_inference_steps: int
    samples_per_seed: int
    calib_samples: int  # trajectories of the full-precision model
    sample_batch: int
    model: str | None = None  # an embedded name; None: a folder or hub id must be given
    reference: str | None = None  # for FID: an embedded name; None: a file or folder must be given
    captions: str | None = (
        None  # prompts in COCO's annotations format; None: none, or a file must be given
    )
    sampler: str = "ddim"
    eta: float = 0.0
    guidance_scale: float = 1.0
    features: str | None = None  # None: the scale's; "none": no features, and no FID
    clip: str = CLIP_MODEL
    overrides: Mapping[str, Any] = field(
        default_factory=lambda: NOTHING
    )  # QuantConfig keys, over the scale's

    @property
    def takes_features(self) -> bool:
        return self.features != "none"

    @property
    def evaluations(self) -> int:
        """Calls of the UNet for one sample; guidance takes two, PLMS one more step."""
        return (self.num_inference_steps + (self.sampler == "plms")) * (
            2 if self.guidance_scale != 1 else 1
        )


@dataclass(frozen=True)
class Dataset:
    name: str
    title: str
    weights: str  # what `paper` scale needs
    config: str  # of the paper's model: name of a CompVis config (reproduce.models.convert), or a hub id
    settings: Mapping[str, Setting]  # by scale
    has_reference: bool = True  # its table asks for FID
    has_captions: bool = False
    presets: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: NOTHING
    )  # a preset's own settings for these data

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
        """The setting at a scale; what is given wins over the scale's own, and that over the environment."""
        own, env = self.settings[scale], os.environ
        return replace(
            own,
            model=model or own.model or env.get(self.model_env),
            reference=reference
            or own.reference
            or (env.get(self.reference_env) if self.has_reference else None),
            captions=captions
            or own.captions
            or (env.get(self.captions_env) if self.has_captions else None),
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


GUIDED = 500  # samples a seed at mini scale where each takes two calls a step
SD_CAPTIONS = str(MINI / "mini-sd" / "captions.json")


def _mini(model: str, *, smoke_features: str | None = None, **common: Any) -> dict[str, Setting]:
    """The embedded stand-in at `smoke` and `mini` scale."""
    common = (
        dict(model=model, reference=EMOJI, num_inference_steps=20, samples_per_seed=1000) | common
    )
    smoke = (
        common
        | dict(num_inference_steps=4, samples_per_seed=32)
        | (dict(features=smoke_features) if smoke_features else {})
    )
    return {
        "smoke": Setting(calib_samples=8, sample_batch=32, **smoke),
        "mini": Setting(calib_samples=64, sample_batch=100, **common),
    }


def _paper(steps: int, **settings: Any) -> dict[str, Setting]:
    common = dict(samples_per_seed=50_000, calib_samples=256, sample_batch=32)
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
            presets={"quest-release": dict(act_range="percentile", act_ema=None)},
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
            # The release takes a running mean of percentiles, and 50 to 400 TLA passes a step group: here the group's percentile,
            # and 225. It sums the local terms and takes L_G as often: 32 times, for the model's feed-forward layers. 16 bits are
            # "off" here.
            presets={
                "quest-release": dict(
                    act_range="percentile",
                    act_ema=None,
                    step_groups=25,
                    softmax_bits=OFF,
                    cma_layers="feed_forward",
                    cma_local_loss=True,
                    global_weight=32.0,
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
                overrides=dict(
                    batch_size=4, forward_batch=8
                ),  # attention maps of 4096 x 4096: more does not fit one GPU
            ),
        ),
        # The paper does not say how many steps its CIFAR-10 rows take: 100, as in Q-Diffusion, is this project's choice; at mini
        # scale 20, as for the other embedded models.
        # Its FID is always taken with Inception, so that it can be read beside other CIFAR-10 FIDs; at smoke scale, which runs
        # everywhere, there is none.
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
