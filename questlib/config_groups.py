"""The groups of `questlib.config.QuantConfig`: fields, bounds, defaults and meanings.

Section numbers are those of the paper (arXiv 2402.03666v6).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Granularity = Literal["tensor", "channel", "carrier", "token"]
Search = Literal["minmax", "mse", "percentile"]

OFF = 16  # a bit-width of 16 switches a quantizer off


def _check_bits(bits: int) -> int:
    if not (2 <= bits <= 8 or bits == OFF):
        raise ValueError(f"expected 2..8, or {OFF} for off")
    return bits


Bits = Annotated[int, AfterValidator(_check_bits)]
Count = Annotated[int, Field(ge=1)]
Iterations = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Power = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A frozen group of choices, which refuses unknown names and values of another type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class RangeConfig(Settings):
    """How the range of each activation is found, and how many scales there are (Sec. 3.1)."""

    act_granularity: Granularity = "tensor"
    """What has a scale of its own. tensor: a layer's input. channel: each of its channels; these
    scales cannot run in integers. carrier: each channel, by scales base * m_k * 2^e that do run in
    integers; only up to 4 bits, wider codes are per tensor. token: each token of linear layers and
    1x1 convolutions, from the range of the token at hand, times static ratios m_k * 2^e; all other
    inputs as with carrier."""

    act_range: Search = "mse"
    """The search for an activation's range: its extremes, the least error, or a percentile."""

    range_norm: Power = 2.0
    """The "mse" search minimizes |x_hat - x|^range_norm. Above 2 it clips less (paper: 2)."""

    act_symmetric: bool = False
    """Whether activation ranges are symmetric around zero."""

    act_ema: Momentum | None = None
    """Weight of the past in a running min-max over calibration batches (release: 0.95); None: the
    true extremes."""

    step_groups: Count = 1
    """Sets of activation scales over the sampler's steps, at most one a step (paper: one)."""

    calib_batch: Count = 64
    """Samples of each step group that ranges are searched on."""

    calib_steps: Literal["uniform", "normal", "first"] = "uniform"
    """Steps of these samples. normal: more of the late, less noisy ones (PTQ4DM). first: the first
    step of each group alone, on which finetuning in sequential order then goes, too (release)."""

    calib_model: Literal["full", "quantized"] = "full"
    """The model whose activations are seen. quantized: weights are quantized, and so are the
    activations of the layers that ran before, each when its own range is set (release)."""

    te_token: bool = False
    """Whether inputs of the time-embedding layers, which depend on t alone, have a range for each
    t (TFMQ-DM)."""


class AdaRoundConfig(Settings):
    """AdaRound: learned rounding of weights, block by block (Q-Diffusion, BRECQ)."""

    enabled: bool = False
    """Whether rounding is learned; otherwise weights are rounded to nearest."""

    iters: Iterations = 20000
    """Iterations of each block."""

    lr: Rate = 1e-3
    """Learning rate of Adam."""

    batch_size: Count = 16
    """Calls of a block in one iteration (release: 16)."""

    round_weight: Rate = 10.0
    """Weight of the rounding regularizer, a mean over each layer's weights, beside the block's
    relative error, at 4 bits; a bit more has a fourth of it, as a rounding error has. Ten decides
    over 95% of the roundings of 4 bits at every scale's budget (`benchmarks/adaround.py`); an
    undecided one loses what it learned when it is hardened."""

    samples: Count = 256
    """Calibration inputs that are kept for a block, also for the activation scales' blocks."""

    temporal_block: bool = False
    """Whether all time-embedding layers are one block, over all steps (TFMQ-DM)."""


class ActReconConfig(Settings):
    """Q-Diffusion's second stage: activation scales are trained block by block."""

    enabled: bool = False
    """Whether the stage runs."""

    iters: Iterations = 5000
    """Iterations of each block."""

    lr: Rate = 4e-4
    """Learning rate of Adam, as a fraction of each scale."""


class FinetuningConfig(Settings):
    """QuEST's selective finetuning in two stages, TLA and CMA (Sec. 3.3)."""

    tla_iters: Iterations = 0
    """Iterations of stage TLA, which trains the time-embedding layers; 0: no such stage."""

    cma_iters: Iterations = 0
    """Iterations of stage CMA, which trains the attention-related layers; 0: no such stage."""

    te_layers: Literal["all", "projections"] = "all"
    """Layers of TLA. projections: those inside the ResBlocks alone (release)."""

    cma_layers: Literal["attention", "qkv", "no_context", "feed_forward", "all", "none"] = (
        "attention"
    )
    """Layers of CMA. attention: all attention-related layers (paper). all: every layer of the
    model, full finetuning. For the others see `questlib.finetuning.stages.CMA_ROLES`."""

    lora_rank: Rank = 0
    """Rank of low-rank updates that CMA trains in place of the weights (EfficientDM); 0: none."""

    local_loss: bool = True
    """Whether the stages have their local losses L_TLA and L_CMA beside the global loss L_G."""

    cma_local_loss: bool = True
    """Whether stage CMA has its local loss (release: not on LSUN and ImageNet)."""

    teacher_autocast: bool = False
    """Whether the full-precision model computes the targets of L_CMA in bfloat16
    (torch.autocast), which a GPU does faster. Its predicted noise, for L_G, comes from the
    calibration and stays as it was computed there."""

    normalize_local: bool = False
    """Whether each layer's local error is divided by its power in full precision."""

    global_weight: Rate = 2.0
    """Weight of L_G in the total loss L_TLA + L_CMA + 2 L_G."""

    global_per_layer: bool = False
    """Whether L_G counts once for each layer of the stage's local loss (release)."""

    tla_order: Literal["joint", "sequential"] = "joint"
    """Order of the steps in TLA. joint: all steps in one expectation (paper). sequential: one step
    after another (release)."""

    cma_order: Literal["joint", "rounds"] = "joint"
    """Order of the steps in CMA. joint: all steps in one expectation (paper). rounds: some
    iterations on each step group, round after round, with a new Adam for the scales at each visit
    (release)."""

    tla_batch_size: Count | None = None
    """Calls of the UNet in one iteration of TLA (release: 2); None: `batch_size`."""

    cma_batch_size: Count | None = None
    """Calls of the UNet in one iteration of CMA (release: 4); None: `batch_size`."""

    tla_samples: Count | None = None
    """Trajectories that TLA draws from (release: 8); None: all that are calibrated."""

    cma_samples: Count | None = None
    """Trajectories that CMA draws from (release: 64); None: all that are calibrated."""

    train_biases: bool = False
    """Whether the biases of the stages' layers are trained with their weights (release)."""

    scale_layers: Literal["all", "own"] = "all"
    """Activation scales that the stages train. all: both train all of them (paper). own: TLA those
    of its own layers, CMA those outside of the time path (release)."""

    lr_weight: Rate = 1e-5
    """Learning rate of the weights."""

    lr_scale: Rate = 1e-4
    """Learning rate of the activation scales."""

    lr_scale_tla: Rate | None = None
    """Learning rate of the activation scales in stage TLA (release: 1e-5); None: `lr_scale`."""

    lr_relative: bool = False
    """Whether learning rates are fractions of each scale, and of each weight's step."""

    lr_decay: bool = False
    """Whether learning rates fall along a cosine to zero over each stage (paper: constant)."""


class TransformConfig(Settings):
    """What stands before and beside linear layers outside of the time path, in methods that came
    after QuEST (`questlib.quantization.transforms`)."""

    rotation: bool = False
    """Whether inputs of linear layers, and queries and keys of attention, are rotated by a Hadamard
    matrix before they are quantized (QuaRot, ViDiT-Q)."""

    smoothing: bool = False
    """Whether channels of linear layers' inputs are divided by factors that weights are multiplied
    with, chosen for the least error of each layer (SmoothQuant, SVDQuant)."""

    low_rank: Rank = 0
    """Rank of a branch in 16 bits beside each linear layer, which takes the largest singular values
    off its weight (SVDQuant); at most a quarter of the layer's inputs and outputs. 0: none."""

    @property
    def any(self) -> bool:
        """Whether there is anything."""
        return self.rotation or self.smoothing or self.low_rank > 0


class MixedConfig(Settings):
    """Bits for each layer by its sensitivity, with `weight_bits` and `act_bits` as the means that
    may not be exceeded (MixDQ, `questlib.baselines.mixed_precision`)."""

    weight_choices: list[Bits] = []
    """Bits that the weights of a layer may have; empty: all layers have `weight_bits`."""

    act_choices: list[Bits] = []
    """Bits that the inputs of a layer may have; empty: all layers have `act_bits`."""

    sensitivity_samples: Count = 40
    """Calls of the model that a layer's sensitivity is measured on, over all steps."""

    @property
    def enabled(self) -> bool:
        """Whether any bits are chosen."""
        return bool(self.weight_choices or self.act_choices)


GROUPS: dict[str, type[Settings]] = {
    "ranges": RangeConfig,
    "adaround": AdaRoundConfig,
    "act_recon": ActReconConfig,
    "finetuning": FinetuningConfig,
    "transforms": TransformConfig,
    "mixed": MixedConfig,
}
