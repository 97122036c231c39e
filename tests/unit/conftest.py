"""A UNet small enough to quantize in a test, with its calibration data."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from questlib import QuantConfig, calibrate

FAST = dict(
    adaround_iters=4,
    act_iters=3,
    tla_iters=4,
    cma_iters=4,
    batch_size=4,
    recon_samples=8,
    calib_batch=8,
)


@pytest.fixture(scope="session")
def pipe():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return SimpleNamespace(
        unet=unet.eval().requires_grad_(False), scheduler=DDIMScheduler(clip_sample=False)
    )


@pytest.fixture(scope="session")
def calib(pipe):
    return calibrate(pipe, 6, 5, seed=3)


@pytest.fixture
def fast():
    """fast("quest", 4, 4) -> a preset with a handful of iterations."""
    return lambda name="quest", w=4, a=4, **kw: QuantConfig.preset(name, w, a, **(FAST | kw))
