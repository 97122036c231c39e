"""The scales: the same code and the same rows, with other models and training budgets.

The models are in `reproduce.datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from questlib.errors import unknown
from reproduce.datasets import NOTHING

# What draws the images of quantized rows, beside an engine's name (`row_engine`).
SIMULATED = "fake"
FASTEST = "fastest"

# conv_out of the mini models has three outputs of 48 channels: 4-bit weights there alone drown the
# image, whatever the method. So all rows of these models keep the weights of the first and the
# last layer at 8 bits.
MINI_LAYERS: dict[str, Any] = dict(first_last_weight_bits=8)


@dataclass(frozen=True)
class Scale:
    """What a scale decides.

    It shortens what a preset does and never switches on what the preset leaves off (see
    `Plan.config`).
    """

    name: str
    features: str
    """mini: the embedded classifier; inception: FID's Inception-v3."""

    seeds: tuple[int, ...]
    engine: str
    """What draws the images of quantized rows; see `row_engine`."""

    overrides: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    """Values of `QuantConfig` by name, for all presets."""

    preset_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: NOTHING)
    """The same for single presets; they win over `overrides`."""

    about: str = ""


SCALES: dict[str, Scale] = {
    "smoke": Scale(
        name="smoke",
        features="mini",
        seeds=(0,),
        engine=FASTEST,
        overrides=MINI_LAYERS
        | dict(
            adaround_iters=3,
            adaround_lr=5.0,
            adaround_batch_size=4,
            act_iters=2,
            tla_iters=2,
            cma_iters=2,
            batch_size=4,
            calib_batch=8,
            recon_samples=8,
        ),
        about="checks that everything runs; its numbers mean nothing",
    ),
    "mini": Scale(
        name="mini",
        features="mini",
        seeds=(0, 1),
        engine=FASTEST,
        # Budgets for two cores: 9 to 320 times fewer iterations than the presets have, by stage.
        # AdaRound and Q-Diffusion, with which most rows start, get higher learning rates for it.
        # Finetuning keeps its own: ten times as much broke the W8A8 rows.
        overrides=MINI_LAYERS
        | dict(
            adaround_iters=150,
            adaround_lr=1e-1,
            act_iters=60,
            act_lr=4e-3,
            recon_samples=128,
            tla_iters=50,
            cma_iters=120,
        ),
        # In Table 8 EfficientDM takes 15 times QuEST's iterations (here 3.5 times), and full
        # finetuning as many as QuEST.
        preset_overrides=dict(
            efficientdm=dict(cma_iters=600),
            **{
                "full-finetune": dict(cma_iters=170),
                # whose batches are 8 to 16 times as small as the others'
                "quest-release": dict(tla_iters=240, cma_iters=320),
            },
        ),
        about="the embedded models in place of the paper's, every method for real",
    ),
    # The presets' own iterations on the embedded models: what the small budgets of `mini` cost.
    "full": Scale(
        name="full",
        features="mini",
        seeds=(0, 1),
        engine=FASTEST,
        overrides=MINI_LAYERS,
        about="the embedded models with the paper's iterations; days on two cores",
    ),
    "paper": Scale(
        name="paper",
        features="inception",
        seeds=(0,),
        engine=SIMULATED,  # as in the paper, on GPUs
        overrides=dict(save_memory=True),
        about="the paper's models and numbers of samples, on GPUs",
    ),
}


def get_scale(name: str) -> Scale:
    """The scale of this name. ConfigError names those there are."""
    if name not in SCALES:
        raise unknown("scale", name, SCALES)
    return SCALES[name]
