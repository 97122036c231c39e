import copy
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock

from questlib import quantize
from questlib.adaround import (
    BlockRecorder,
    blocks,
    reconstruct_acts,
    reconstruct_weights,
    round_weight,
)
from questlib.calibration import pick_samples
from questlib.capture import capture_calls
from questlib.errors import CheckpointError, ConfigError
from questlib.observers import init_ranges
from questlib.quantization.model import act_quantizers, freeze, quant_layers, set_mode
from questlib.quantization.preparation import prepare
from questlib.quantization.weight_quantizer import WeightQuantizer
from reproduce.scales import SCALES


def error(student, teacher, calib, acts):
    set_mode(student, weights=True, acts=acts)
    with torch.no_grad():
        return sum(
            (student(x, t).sample - e).pow(2).mean().item()
            for x, t, e in zip(calib.x, calib.t, calib.eps, strict=True)
        )


def test_blocks_cover_each_layer_once_in_order_of_execution(pipe, calib, fast):
    q = prepare(pipe.unet, fast(), calib.t)
    set_mode(q, weights=False, acts=False)
    names = blocks(q, calib.batch(0, torch.arange(6)))
    covered = [n for b in names for n in quant_layers(q) if n == b or n.startswith(b + ".")]
    assert sorted(covered) == sorted(quant_layers(q))
    order = []
    for b in names:
        q.get_submodule(b).register_forward_hook(lambda m, i, o, b=b: order.append(b))
    q(calib.x[0], calib.t[0])
    assert order == names


def test_capture_gives_the_blocks_own_calls(pipe, calib):
    name = "up_blocks.0.resnets.0"
    runs = [part.run for part in pick_samples(calib, 7, 0)[0].split(4)]
    calls = capture_calls(pipe.unet, name, runs)
    assert [len(call.output) for call in calls] == [4, 3]
    with torch.no_grad():
        again = pipe.unet.get_submodule(name)(*calls[1].args, **calls[1].kwargs)
    assert torch.equal(again, calls[1].output)
    assert not pipe.unet.get_submodule(name)._forward_hooks


def test_adaround_beats_rounding_to_nearest(pipe, calib, fast):
    # nearest at 3 bits, so that rounding matters; the tiny model learns in 150 iterations a block
    config = fast("q-diffusion", 3, 8, adaround_iters=150, adaround_lr=1e-2, recon_samples=30)
    q = prepare(pipe.unet, config, calib.t)
    init_ranges(q, calib, config)
    before = error(q, pipe.unet, calib, acts=False)
    nearest = {n: m.weight_quantizer.codes(m.weight) for n, m in quant_layers(q).items()}
    reconstruct_weights(q, pipe.unet, calib, config)
    after = error(q, pipe.unet, calib, acts=False)
    assert after < 0.8 * before
    moved = [
        (nearest[n].int() - m.weight_quantizer.codes(m.weight).int()).abs()
        for n, m in quant_layers(q).items()
    ]
    assert max(int(d.max()) for d in moved) == 1  # up or down, never farther
    assert sum(int(d.sum()) for d in moved) > 0
    assert all(m.weight_quantizer.alpha is None for m in quant_layers(q).values())


def test_activation_stage_lowers_the_error_and_leaves_weights(pipe, calib, fast):
    config = fast("q-diffusion", 8, 4, act_iters=60, act_lr=5e-3, recon_samples=30)
    q = prepare(pipe.unet, config, calib.t)
    init_ranges(q, calib, config)
    weights = {n: m.weight.clone() for n, m in quant_layers(q).items()}
    scales = copy.deepcopy([a.scale.detach() for a in act_quantizers(q)])
    before = error(q, pipe.unet, calib, acts=True)
    reconstruct_acts(q, pipe.unet, calib, config)
    assert error(q, pipe.unet, calib, acts=True) < before
    assert all(torch.equal(weights[n], m.weight) for n, m in quant_layers(q).items())
    assert any(not torch.equal(a.scale, s) for a, s in zip(act_quantizers(q), scales, strict=True))


def test_cache_gives_the_same_model_and_the_first_runs_seconds(pipe, calib, fast, tmp_path):
    first = quantize(pipe.unet, fast("quest", 4, 4), calib, cache_dir=tmp_path)
    other = quantize(
        pipe.unet, fast("quest-paper", 4, 8, first_last_weight_bits=8), calib, cache_dir=tmp_path
    )
    assert not first.quest_log["reconstruct_cached"] and other.quest_log["reconstruct_cached"]
    assert (
        other.quest_log["seconds"]["reconstruct"] == first.quest_log["seconds"]["reconstruct"] > 0
    )
    for a, b in zip(quant_layers(first).values(), quant_layers(other).values(), strict=True):
        assert torch.equal(a.w_hat, b.w_hat)
    assert Counter(f.name.split("-")[0] for f in tmp_path.glob("*.safetensors")) == {
        "adaround": 1,
        "ranges": 2,
    }


def test_a_second_process_waits_for_the_cache(pipe, calib, fast, tmp_path):
    """While its lock is held nothing is made. Then what the other process has made is read."""
    config = fast("minmax", 4, 8)
    made = quantize(pipe.unet, config, calib, cache_dir=tmp_path / "other")
    (cache,) = (tmp_path / "other").glob("ranges-*.safetensors")
    (tmp_path / "here").mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "here" / f"{cache.name}.lock"):
            waiting = pool.submit(quantize, pipe.unet, config, calib, cache_dir=tmp_path / "here")
            with pytest.raises(TimeoutError):
                waiting.result(timeout=5)
            shutil.copy(cache, tmp_path / "here")
        read = waiting.result()
    assert read.quest_log["ranges_cached"] and not made.quest_log["ranges_cached"]
    assert read.quest_log["seconds"]["ranges"] < 5  # as first computed: not those of waiting


def test_a_damaged_cache_is_named(pipe, calib, fast, tmp_path):
    quantize(pipe.unet, fast("minmax", 4, 8), calib, cache_dir=tmp_path)
    (cache,) = tmp_path.glob("*.safetensors")
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{cache.name} cannot be read .*remove it"):
        quantize(pipe.unet, fast("minmax", 4, 8), calib, cache_dir=tmp_path)


def test_cached_ranges_are_those_of_a_search(pipe, calib, fast, tmp_path):
    first, again = (
        quantize(pipe.unet, fast("quest", 4, 4, te=te, adaround=False), calib, cache_dir=tmp_path)
        for te in ("ptq", "finetune")
    )
    searched = quantize(pipe.unet, fast("quest", 4, 4, adaround=False), calib)
    assert [q.quest_log["ranges_cached"] for q in (first, again, searched)] == [False, True, False]
    assert again.state_dict().keys() == searched.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in searched.state_dict().items())
    assert torch.equal(
        again(calib.x[0], calib.t[0]).sample, searched(calib.x[0], calib.t[0]).sample
    )


def test_rerun_is_bit_identical(pipe, calib, fast):
    a, b = (quantize(pipe.unet, fast("q-diffusion", 4, 4), calib) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(
            freeze(a)(calib.x[1], calib.t[1]).sample, freeze(b)(calib.x[1], calib.t[1]).sample
        )


# ---- AdaRound: its gradient, its decisions, its parts ----


def test_roundings_gradient_is_that_of_autograd():
    """Closed form against Eq. 22 to 24 written out in float64."""
    w = 0.5 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer.from_weight(w, 3, torch.zeros(16, dtype=torch.int64), "mse")
    alpha = quantizer.start_adaround(w)
    with torch.no_grad():
        alpha += torch.randn_like(alpha)  # some beyond the sigmoid's flat ends
    exact = alpha.detach().double().requires_grad_()
    h = (exact.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    low = -quantizer.zero_point.double()
    lower = (w * (1.0 / quantizer.scale)).floor().double()
    w_hat = (lower + h).clamp(low, low + 7) * quantizer.scale.double()
    slope = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    regularizer = 0.5 * (1 - (2 * h - 1).abs().pow(3.7)).mean()
    ((w_hat * slope).sum() + regularizer).backward()

    ours = quantizer(w)
    (ours * slope).sum().backward()
    quantizer.regularize(3.7, 0.5)
    torch.testing.assert_close(ours.double(), w_hat, rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    assert 0 < int((h == 0).sum() + (h == 1).sum()) < h.numel()
    assert ((lower < low) | (lower >= low + 7)).any()  # weights beyond the grid's ends


def test_the_regularizer_keeps_its_place_beside_an_error_of_any_bits():
    """Rounding errors of uniform weights have a fourth of the power with each bit more."""
    w = torch.rand(4, 4096, generator=torch.Generator().manual_seed(0))
    one_part = torch.zeros(4096, dtype=torch.int64)
    ratios = []
    for bits in (3, 4, 6, 8):
        quantizer = WeightQuantizer.from_weight(w, bits, one_part, "minmax")
        error = (quantizer(w) - w).pow(2).mean().item()
        ratios.append(round_weight(10.0, bits) / error)
    assert ratios == pytest.approx([ratios[1]] * 4, rel=0.35)
    assert round_weight(10.0, 4) == 10.0


@pytest.mark.parametrize("scale", ["smoke", "mini"])
def test_the_scales_budgets_decide_the_roundings(pipe, calib, fast, scale):
    """Hardening throws away what an undecided rounding has learned."""
    names = ("adaround_iters", "adaround_lr", "adaround_batch_size", "recon_samples")
    values = SCALES[scale].overrides
    budget = {name: values[name] for name in names if name in values} | {"recon_samples": 30}
    config = fast("q-diffusion", 4, 8, act_recon=False, **budget)
    assert quantize(pipe.unet, config, calib).quest_log["decided"] > 0.95


def test_a_stopped_adaround_goes_on_after_its_last_block(pipe, calib, fast, tmp_path, monkeypatch):
    config = fast("full-finetune", 4, 4)
    whole = quantize(pipe.unet, config, calib, cache_dir=tmp_path / "whole")

    recorded = []
    record = BlockRecorder.record

    def stop_at_the_third(self, name):
        recorded.append(name)
        if len(recorded) == 3:
            raise KeyboardInterrupt
        return record(self, name)

    monkeypatch.setattr(BlockRecorder, "record", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize(pipe.unet, config, calib, cache_dir=tmp_path / "stopped")
    again = quantize(pipe.unet, config, calib, cache_dir=tmp_path / "stopped")
    assert recorded[3] == recorded[2]  # the finished blocks are not learned again
    assert len(set(recorded)) == len(recorded) - 1
    assert again.quest_log["decided"] == whole.quest_log["decided"]
    for a, b in zip(quant_layers(whole).values(), quant_layers(again).values(), strict=True):
        assert torch.equal(a.weight, b.weight)
    assert not [path for path in (tmp_path / "stopped").iterdir() if path.is_dir()]


def test_a_damaged_part_is_named(pipe, calib, fast, tmp_path, monkeypatch):
    config = fast("full-finetune", 4, 4)
    record = BlockRecorder.record

    def stop_later(self, name):
        if list(tmp_path.glob("*/*.safetensors")):
            raise KeyboardInterrupt
        return record(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(BlockRecorder, "record", stop_later)
        with pytest.raises(KeyboardInterrupt):
            quantize(pipe.unet, config, calib, cache_dir=tmp_path)
    (part,) = tmp_path.glob("*/*.safetensors")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{part.name} cannot be read .*remove it"):
        quantize(pipe.unet, config, calib, cache_dir=tmp_path)


# ---- ranges of the model quantized so far ----


def test_ranges_of_the_quantized_model_cover_what_it_receives(pipe, calib, fast):
    """Each min-max range is that of the layer's input in the quantized model, at the first step."""
    config = fast(
        "quest-release", 4, 4, step_groups=2, calib_batch=6, act_ema=None, act_granularity="tensor"
    )
    unet = freeze(quantize(pipe.unet, config, calib))
    first = calib.batch(0, torch.arange(6))
    name = "up_blocks.1.resnets.0.conv1"
    (call,) = capture_calls(unet, name, [first.run])
    quantizer = unet.get_submodule(name).input_quantizer
    x = call.args[0]
    assert quantizer.scale[0].item() == pytest.approx(x.abs().max().item() / 7)
    full = quantize(pipe.unet, config.replace(calib_model="full"), calib)
    assert full.get_submodule(name).input_quantizer.scale[0] != quantizer.scale[0]


def test_carrier_grids_need_the_full_models_ranges(fast):
    with pytest.raises(ConfigError, match="calib_model: expected full"):
        fast("quest", 4, 4, calib_model="quantized")
    fast("quest", 4, 8, calib_model="quantized")
