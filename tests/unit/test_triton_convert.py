"""A whole UNet on the Triton engine, under the interpreter: converted, reported, equal to the CPU engine, guarded."""

import pytest
import torch

import questlib
from questlib import convert, engine_report, quantize
from questlib.errors import ConfigError, EngineError

triton_tiles = pytest.importorskip("questlib.integer.triton_tiles")
pytestmark = pytest.mark.skipif(not triton_tiles.INTERPRET, reason="needs triton with TRITON_INTERPRET=1")


@pytest.fixture(scope="module")
def fake(pipe, calib):
    config = questlib.QuantConfig.preset(
        "quest", 4, 4, adaround_iters=2, tla_iters=0, cma_iters=0, recon_samples=8, calib_batch=8
    )
    return quantize(pipe.unet, config, calib)


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_a_whole_unet(fake, weights):
    unet, cpu = convert(fake, "triton", weights=weights), convert(fake, "cpu")
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), fake.quest_steps.timesteps[1]
    y, expected = unet(x, t).sample, cpu(x, t).sample
    assert ((y - expected).abs().max() / expected.abs().max()).item() < 1e-2  # a code may flip: the epilogues round differently
    report = engine_report(unet)
    assert set(report["engine"]) == {"triton"}
    packed, resident = report["checkpoint bytes"].sum(), report["resident bytes"].sum()
    assert packed < resident


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


def test_wrong_choices(fake):
    with pytest.raises(ConfigError, match="weights: expected one of packed, int8"):
        convert(fake, "triton", weights="int4")
