import copy
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock

from questlib import quantize
from questlib.adaround import blocks, pick_samples, reconstruct_acts, reconstruct_weights
from questlib.capture import capture_calls
from questlib.errors import CheckpointError
from questlib.observers import init_ranges
from questlib.quantization.model import act_quantizers, freeze, quant_layers, set_mode
from questlib.quantization.preparation import prepare


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
    runs = [part.run for part in pick_samples(calib, 7, 0).split(4)]
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
