"""The presets: every method of the paper's tables, and `quest`, as choices over the defaults.

Each value stands in `QuantConfig` under the same keyword, with its meaning. Sections and tables
are those of the paper that the preset's comment names.
"""

from __future__ import annotations

from typing import Any

from questlib.errors import unknown

# Li et al., ICCV 2023
Q_DIFFUSION: dict[str, Any] = dict(
    act_range="mse",
    split_skip=True,  # Sec. 3.2: the two halves of a concatenation have other ranges
    adaround=True,  # Sec. 3.1: rounding, block by block
    act_recon=True,  # then the activation scales, block by block
    softmax_bits=8,
    first_last_act_bits=8,
    te="ptq",
    cma_layers="none",
)

# Ours: scales that run in integers, all time-embedding and attention layers, step groups, and both
# losses. Local errors are relative to each layer's power, so that L_G weighs ten times as much as
# in the paper (ablation: global-2).
QUEST: dict[str, Any] = dict(
    act_range="mse",
    adaround=True,
    step_groups=4,
    softmax_bits=8,
    first_last_act_bits=8,
    first_last_weight_bits=8,
    normalize_local=True,
    global_weight=20.0,
    tla_iters=1100,
    cma_iters=1100,
    lr_relative=True,
    lr_decay=True,
    lr_weight=2e-2,
    lr_scale=2e-3,
)

# ---- after the paper: what later methods add to post-training quantization, or to QuEST ----

# Li et al., ICLR 2025, "SVDQuant": outliers of activations go into weights, and the largest
# singular values of the weights into a branch of rank 32 in 16 bits.
SVDQUANT: dict[str, Any] = dict(smoothing=True, low_rank=32)

# Ashkboos et al., NeurIPS 2024, "QuaRot", and Zhao et al., ICLR 2025, "ViDiT-Q": inputs of linear
# layers, queries and keys are rotated.
ROTATION: dict[str, Any] = dict(rotation=True)

# Zhao et al., ECCV 2024, "MixDQ": bits of each layer by its sensitivity. A mean of 4 bits needs
# candidates below 4 for activations, too.
MIXDQ: dict[str, Any] = dict(weight_choices=[2, 4, 8], act_choices=[2, 4, 8])

# What all three start from: learned rounding, where SVDQuant and QuaRot have GPTQ, and 8 bits where
# every baseline of ours has them. The first two have a grid for each token as it comes.
LATER: dict[str, Any] = dict(
    act_range="mse",
    adaround=True,
    softmax_bits=8,
    first_last_act_bits=8,
    te="ptq",
    cma_layers="none",
)

PRESETS: dict[str, dict[str, Any]] = {
    # Naive post-training quantization: the ranges are what was seen.
    "minmax": dict(
        act_range="minmax",
        weight_range="minmax",
        split_skip=False,
        softmax_bits=8,
        first_last_act_bits=8,
        te="ptq",
        cma_layers="none",
    ),
    # One set of activation scales over all steps.
    "q-diffusion": Q_DIFFUSION,
    # Shang et al., CVPR 2023, "PTQ4DM"
    "ptq4dm": dict(
        act_range="mse",
        range_norm=2.4,  # ranges by |error|^2.4
        calib_steps="normal",  # Sec. 3.3: calibration at normally distributed steps
        split_skip=False,
        softmax_bits=8,
        first_last_act_bits=8,
        te="ptq",
        cma_layers="none",
    ),
    # He et al., NeurIPS 2023, "PTQD", Sec. 4: Q-Diffusion, then the predicted noise is corrected.
    "ptq-d": Q_DIFFUSION | dict(noise_correction=True),
    # He et al., ICLR 2024, "EfficientDM". Rank and iterations are those that QuEST's Table 8 and
    # text give it. The learning rates are ours.
    "efficientdm": dict(
        act_range="mse",
        step_groups=1000,  # activation scales for each step
        te="ptq",
        cma_layers="all",
        lora_rank=32,  # low-rank updates of all layers, merged before quantization
        local_loss=False,  # the model's output alone is compared
        cma_iters=32000,
        softmax_bits=8,
        first_last_act_bits=8,
        lr_relative=True,  # Sec. 3.2 there: in units of each layer's quantization step
        lr_decay=True,
        lr_weight=1e-3,
        lr_scale=2e-3,
    ),
    # Huang et al., CVPR 2024, "TFMQ-DM": the time path is one block, with a range for each t.
    "tfmq-dm": Q_DIFFUSION | dict(temporal_block=True, te_token=True),
    # Table 8: all weights and activation scales on the global loss, as many iterations as QuEST.
    "full-finetune": dict(
        act_range="mse",
        adaround=True,
        te="ptq",
        cma_layers="all",
        local_loss=False,
        cma_iters=2200,
        softmax_bits=8,
        first_last_act_bits=8,
        lr_weight=1e-5,
        lr_scale=1e-4,
    ),
    # The paper's text (Sec. 3.3, 4.1): everything at the stated bits, one set of scales, local and
    # global losses, 2,200 iterations.
    "quest-paper": dict(
        act_range="mse",
        adaround=True,
        tla_iters=1100,
        cma_iters=1100,
        lr_weight=1e-5,
        lr_scale=1e-4,
    ),
    # The official release's settings for LSUN-Bedrooms, as facts read off it. For other data sets
    # see reproduce/datasets.py. Four things differ from it: codes are at most 2^b, where its first
    # and last activations have 514; AdaRound's blocks are whole attention blocks, and its samples
    # are drawn at random; at A4 the operands of attention have a scale for each channel, not for
    # each position.
    "quest-release": dict(
        act_range="minmax",
        act_symmetric=True,
        act_ema=0.95,
        step_groups=20,
        calib_steps="first",
        calib_model="quantized",
        weight_range_norm=2.4,
        split_skip=False,
        adaround=True,
        softmax_bits=8,
        first_last_act_bits=8,
        te_layers="projections",
        cma_layers="qkv",
        cma_local_loss=False,
        global_weight=1.0,
        global_per_layer=True,
        scale_layers="own",
        train_biases=True,
        tla_order="sequential",
        tla_iters=16000,
        tla_batch_size=2,
        tla_samples=8,
        cma_order="rounds",
        cma_iters=6400,
        cma_batch_size=4,
        cma_samples=64,
        lr_weight=1e-5,
        lr_scale=1e-4,
        lr_scale_tla=1e-5,
    ),
    "quest": QUEST,
    "svdquant": LATER | SVDQUANT | dict(act_granularity="token"),
    "rotation": LATER | ROTATION | dict(act_granularity="token"),
    "mixdq": LATER | MIXDQ,
    "svdquant-quest": QUEST | SVDQUANT,
    "rotation-quest": QUEST | ROTATION,
    "mixdq-quest": QUEST | MIXDQ,
}

# What changes at activations of up to 4 bits.
PRESETS_A4: dict[str, dict[str, Any]] = {
    "quest-release": dict(act_granularity="channel", act_ema=None),
    **dict.fromkeys(
        ("quest", "svdquant-quest", "rotation-quest", "mixdq-quest"),
        dict(act_granularity="carrier"),
    ),
}


def preset_values(name: str, act_bits: int) -> dict[str, Any]:
    """The choices of a preset at these activation bits. ConfigError for an unknown name."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name] | (PRESETS_A4.get(name, {}) if act_bits <= 4 else {})
