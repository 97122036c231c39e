from types import SimpleNamespace

import pytest
import torch

from questlib import Calibration, QuantConfig, calibrate, quantize
from questlib.config_groups import RangeConfig
from questlib.diffusion.sampling import sample_generators
from questlib.errors import CheckpointError, ConfigError
from questlib.observers import Observer, init_ranges
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.model import act_quantizers
from questlib.quantization.preparation import prepare
from questlib.quantization.step_groups import StepGroups


def test_pairs_are_what_the_unet_received(pipe, calib):
    """(x_t, t, eps) belong together: the UNet gives the recorded output for the recorded pair."""
    assert calib.x.shape == calib.eps.shape == (5, 6, 3, 8, 8)
    pipe.scheduler.set_timesteps(5)
    assert calib.t.tolist() == pipe.scheduler.timesteps.tolist()
    for i, t in enumerate(calib.t):
        with torch.no_grad():
            assert torch.allclose(pipe.unet(calib.x[i], t).sample, calib.eps[i], atol=1e-6)
            wrong = pipe.unet(calib.x[i], calib.t[i - 1]).sample
        assert not torch.allclose(wrong, calib.eps[i], atol=1e-4)


def test_same_seed_same_data_and_no_hook_stays(pipe, calib):
    again = calibrate(pipe, 6, 5, seed=3, batch_size=2)
    assert torch.allclose(again.x, calib.x, atol=1e-5)
    assert (
        calibrate(pipe, 6, 5, seed=3).hash() == calib.hash() != calibrate(pipe, 6, 5, seed=4).hash()
    )
    assert not pipe.unet._forward_hooks


def test_noise_depends_on_the_index_alone_and_not_on_calibration():
    a = [torch.randn(4, generator=g) for g in sample_generators(1, range(10))]
    b = [torch.randn(4, generator=g) for g in sample_generators(1, range(5, 10))]
    assert all(torch.equal(x, y) for x, y in zip(a[5:], b, strict=True))
    assert len({tuple(x.tolist()) for x in a}) == 10
    assert not torch.equal(a[0], torch.randn(4, generator=sample_generators(2, [0])[0]))


def test_save_load(calib, tmp_path):
    calib.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors").hash() == calib.hash()
    (tmp_path / "bad").write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match="bad"):
        Calibration.load(tmp_path / "bad")


def test_bad_counts(pipe):
    with pytest.raises(ConfigError, match="num_samples and num_inference_steps"):
        calibrate(pipe, 0, 5)


@pytest.mark.parametrize("name", ["minmax", "quest-paper", "quest-release", "quest"])
@pytest.mark.parametrize("a", [4, 8])
@pytest.mark.parametrize(
    "granularity",
    [{}, {"act_granularity": "token", "calib_model": "full"}],
    ids=["preset", "token"],
)
def test_ranges_are_set_for_every_group(pipe, calib, name, a, granularity):
    config = QuantConfig.preset(name, 4, a, calib_batch=8, **granularity)
    q = prepare(pipe.unet, config, calib.t)
    init_ranges(q, calib, config)
    for act in act_quantizers(q):
        assert bool(act.calibrated) and act.observer is None
        assert act.scale.shape[0] == q.quest_steps.num_groups
        assert not act.token or (act.scale <= 1).all()
        assert (act.scale > 0).all() and torch.isfinite(act.scale).all()
        assert (
            (act.zero_point == act.zero_point.round()).all()
            and act.zero_point.min() >= 0
            and act.zero_point.max() < 2**act.bits
        )


@pytest.mark.parametrize("granularity", ["carrier", "token"])
@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 8)])
def test_shifts_of_the_ratios_are_kept(pipe, calib, granularity, bits):
    """m = ratio / 2^e is one of 1..8, and e follows the weights' room."""
    config = QuantConfig.preset("quest", *bits, calib_batch=8, act_granularity=granularity)
    q = prepare(pipe.unet, config, calib.t)
    init_ranges(q, calib, config)
    for act in act_quantizers(q):
        m = act.ratio / 2**act.shift
        assert torch.equal(m, m.round()) and m.min() >= 1 and m.max() <= 8
        assert act.shift.min() >= 0 and act.shift.max() <= 3
        assert act.shifts or not act.shift.any()
        assert act.carrier or (act.ratio == 1).all() and not act.shift.any()


def test_softmax_is_unsigned_in_every_preset(pipe, calib):
    """No bit is wasted on negative values, which do not occur."""
    for name, a in (("minmax", 8), ("quest-paper", 4), ("quest-release", 8), ("quest", 4)):
        config = QuantConfig.preset(name, 4, a, calib_batch=8)
        q = prepare(pipe.unet, config, calib.t)
        init_ranges(q, calib, config)
        probs = [x for x in act_quantizers(q) if x.unsigned]
        assert probs and all(
            (x.zero_point == 0).all() and (x.scale * (2**x.bits - 1) > 0.01).all() for x in probs
        )


def test_distinct_values_at_most_two_to_the_b_in_a_running_model(pipe, calib, fast):
    """4 bits mean 16 levels, in each preset, for each set of parameters."""
    for name in ("minmax", "quest-release", "quest"):
        q = quantize(pipe.unet, fast(name, 4, 4), calib)
        seen = {}
        for act in act_quantizers(q):
            act.register_forward_hook(lambda m, i, o, seen=seen: seen.__setitem__(m.name, (m, o)))
        q(calib.x[0], calib.t[0])
        for act, out in seen.values():
            rows = out.movedim(act.dim, 0).flatten(1) if len(act.index) > 1 else out.reshape(1, -1)
            assert max(len(r.unique()) for r in rows) <= 2**act.bits, act.name


def test_ema_follows_the_batches():
    steps = StepGroups(torch.tensor([0]), torch.tensor([0]))
    act = ActQuantizer("a", 8, steps, 1, -1)
    o = Observer(act, RangeConfig(act_ema=0.9), 0, 2)
    o.update(torch.tensor([[0.0], [1.0]]))
    o.update(torch.tensor([[0.0], [2.0]]))
    assert o.extremes[1].item() == pytest.approx(0.9 * 1 + 0.1 * 2)


@pytest.mark.parametrize(("batches", "kept"), [(1, 2048), (20, 2048), (200, 204), (10**6, 1)])
def test_what_is_kept_for_channels_does_not_grow_with_the_steps(batches, kept):
    steps = StepGroups(torch.tensor([0]), torch.tensor([0]))
    act = ActQuantizer("a", 4, steps, 3, -1, "carrier")
    observer = Observer(act, RangeConfig(), 0, batches)
    observer.update(torch.randn(4096, 3))
    assert observer.values[0].shape == (3, kept)


def test_a_stopped_calibration_goes_on_after_its_last_batch(pipe, tmp_path):
    """The third batch's first call is stopped; the second try samples two batches of four."""
    whole = calibrate(pipe, 8, 2, batch_size=2)
    calls = []

    def stop(module, args, kwargs):
        calls.append(len(args[0]))
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_pre_hook(stop, with_kwargs=True)
    named = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, components={})
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate(named, 8, 2, batch_size=2, cache_dir=tmp_path)
        again = calibrate(named, 8, 2, batch_size=2, cache_dir=tmp_path)
        assert len(calls) == 5 + 4
        other = calibrate(named, 8, 2, batch_size=2, seed=1, cache_dir=tmp_path)
        assert len(calls) == 5 + 4 + 8
    finally:
        handle.remove()
    assert again.hash() == whole.hash() != other.hash()
    with pytest.raises(ConfigError, match="cache_dir is for trajectories"):
        calibrate(named, run=lambda: None, cache_dir=tmp_path)
