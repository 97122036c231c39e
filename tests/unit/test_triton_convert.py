"""A whole UNet on the Triton engine, in the interpreter: converted, reported, guarded.

It is equal to the CPU engine.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

import questlib
from questlib import calibrate, convert, engine_report, quantize
from questlib.errors import ConfigError, EngineError
from questlib.integer.triton import runtime
from questlib.integer.triton.fused import FusedResnetBlock

pytestmark = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)


@pytest.fixture(scope="module")
def fake(pipe, calib):
    config = questlib.QuantConfig.preset(
        "quest", 4, 4, adaround_iters=2, tla_iters=0, cma_iters=0, recon_samples=8, calib_batch=8
    )
    return quantize(pipe.unet, config, calib)


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_a_whole_unet(fake, weights):
    unet, cpu = convert(fake, "triton", weights=weights), convert(fake, "cpu")
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = fake.quest_steps.timesteps[1]
    y, expected = unet(x, t).sample, cpu(x, t).sample
    # a code may flip: the epilogues round differently
    assert ((y - expected).abs().max() / expected.abs().max()).item() < 1e-2
    report = engine_report(unet)
    assert set(report.engines()) == {"triton"}
    assert sum(row.checkpoint_bytes for row in report) < sum(row.resident_bytes for row in report)


def test_digests_tell_models_apart(fake):
    states = [convert(m, e).state_dict() for m, e in ((fake, "triton"), (fake, "cpu"))]
    assert torch.equal(states[0]["conv_in.digest"], states[1]["conv_in.digest"])
    assert not torch.equal(states[0]["conv_in.digest"], states[0]["conv_out.digest"])


def test_half_precision_and_not_finite(fake):
    unet = convert(fake, "triton", dtype=torch.bfloat16)
    x = torch.randn(1, 3, 8, 8).bfloat16()
    assert unet(x, fake.quest_steps.timesteps[0]).sample.dtype == torch.bfloat16
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(EngineError, match="conv_in: its input was not finite"):
        unet(x, fake.quest_steps.timesteps[0])


def own_calibration(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    return calibrate(SimpleNamespace(unet=unet, scheduler=scheduler), 6, 5, seed=3)


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
def test_fused_blocks(kind):
    """Norm, SiLU and quantization in one kernel, the shortcut in the epilogue.

    The plain block's output, up to codes that flip.
    """
    torch.manual_seed(0)
    plain = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        resnet_time_scale_shift=kind,
    ).eval()
    for block in (m for m in plain.modules() if isinstance(m, ResnetBlock2D)):
        for norm in (block.norm1, block.norm2):  # as training leaves them
            torch.nn.init.normal_(norm.weight, 1.0, 0.2)
            torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    config = questlib.QuantConfig.preset("quest", 4, 8, adaround=False, calib_batch=8)
    fake = quantize(plain, config, own_calibration(plain))
    unfused, fused = convert(fake, "triton"), convert(fake, "triton", fuse=True)
    blocks = [m for m in fused.modules() if isinstance(m, ResnetBlock2D)]
    assert len(blocks) >= 6 and all(isinstance(b, FusedResnetBlock) for b in blocks)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = fake.quest_steps.timesteps[1]
    y, expected = fused(x, t).sample, unfused(x, t).sample
    assert ((y - expected).square().mean() / expected.square().mean()).item() < 1e-4
    assert not torch.equal(y, plain(x, t).sample)


def test_blocks_that_resample_stay_as_they_are():
    plain = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False,
    ).eval()
    fake = quantize(
        plain, questlib.QuantConfig.preset("minmax", 4, 8, calib_batch=4), own_calibration(plain)
    )
    blocks = [
        m for m in convert(fake, "triton", fuse=True).modules() if isinstance(m, ResnetBlock2D)
    ]
    resampling = [b for b in blocks if b.upsample is not None or b.downsample is not None]
    assert len(resampling) == 2 and not any(isinstance(b, FusedResnetBlock) for b in resampling)
    assert all(isinstance(b, FusedResnetBlock) for b in blocks if b not in resampling)


def test_heads_that_no_kernel_holds_are_refused_or_fall_back(fake, monkeypatch):
    monkeypatch.setattr("questlib.integer.triton.attention.WIDEST", 4)
    with pytest.raises(EngineError, match="attentions.0: .* heads of at most 4 channels"):
        convert(fake, "triton")
    engines = {False: set(), True: set()}
    for row in engine_report(convert(fake, "triton", fallback=True)):
        engines[row.layer.split(".")[-2:-1] == ["attentions"]].add(row.engine)
    assert engines == {True: {"fake"}, False: {"triton"}}


def test_wrong_choices(fake):
    with pytest.raises(ConfigError, match="weights: expected one of packed, int8"):
        convert(fake, "triton", weights="int4")
    with pytest.raises(ConfigError, match="fuse: engine reference"):
        convert(fake, "reference", fuse=True)
