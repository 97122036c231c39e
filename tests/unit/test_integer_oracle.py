"""The central promise in its smallest form: integer arithmetic equals the simulation.

The largest relative error is 1e-5, in float32.
"""

import copy

import pytest
import torch

from questlib import finetune, quantize
from questlib.errors import ConfigError
from questlib.integer.form import integer_form
from questlib.integer.oracle import accumulate, attention_scores, carry, layer_forward
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.model import quant_layers


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize(("w", "a"), [(8, 8), (4, 8), (4, 4), (3, 5)])
@pytest.mark.parametrize("trained", [False, True])
def test_every_layer_of_a_quest_model_equals_its_simulation(pipe, calib, fast, w, a, trained):
    """Real inputs, every layer, three step groups; also with scales that finetuning has trained."""
    config = fast("quest", w, a, tla_iters=4 * trained, cma_iters=4 * trained)
    q = quantize(pipe.unet, config, calib)
    finetune(q, pipe.unet, calib, config)
    seen = {}
    for name, layer in quant_layers(q).items():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i[0], o)))
    for step in (0, 2, 4):
        with torch.no_grad():
            q(calib.x[step, :1], calib.t[step])
        assert len(seen) == len(quant_layers(q))
        for name, (x, out) in seen.items():
            y, acc = layer_forward(q.get_submodule(name), x)
            assert acc.dtype == torch.int64
            assert relative(y, out) <= 1e-5, name


def test_carrier_layers_really_use_several_multipliers(pipe, calib, fast):
    q = quantize(pipe.unet, fast("quest", 4, 4), calib)
    ratios = [m.input_quantizer.ratio for m in quant_layers(q).values() if m.role == "conv"]
    assert sum(len(r.unique()) > 2 for r in ratios) > len(ratios) / 2


def test_free_per_channel_scales_are_refused(pipe, calib, fast):
    q = quantize(pipe.unet, fast("quest-release", 4, 4), calib)
    q.quest_steps.select_group(0)
    with pytest.raises(ConfigError, match="cannot run in integers"):
        layer_forward(q.conv_in, torch.randn(1, 3, 8, 8))


def test_batches_of_several_groups_are_refused(pipe, calib, fast):
    q = quantize(pipe.unet, fast("quest", 4, 4, step_groups=5), calib)
    q.quest_steps.select_group(torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="one step group a call"):
        layer_forward(q.conv_in, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (0, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_integer_convolution_equals_float64(stride, padding, dilation, groups):
    """float64 is exact for integers of this size: an independent implementation of every shape."""
    conv = torch.nn.Conv2d(
        4, 6, (3, 2), stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False
    )
    x = torch.randint(-120, 121, (2, 4, 9, 8))
    w = torch.randint(-15, 16, conv.weight.shape)
    conv.weight.data = w.double()
    assert torch.equal(accumulate(x, w, conv), conv(x.double()).long())


def test_attention_products(pipe, calib, fast):
    q = quantize(pipe.unet, fast("quest", 4, 4), calib)
    q.quest_steps.select_group(0)
    processor = next(m for m in q.modules() if isinstance(m, QuantAttnProcessor))
    a, b = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        fa, fb = processor.q(a), processor.k(b)
    fa, fb = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (fa, fb))  # [B, heads, N, 8]
    found = attention_scores(carry(a, processor.q), carry(b, processor.k), 4)
    assert relative(found, fa @ fb.transpose(-1, -2)) <= 1e-5


def test_ratios_off_the_grid_are_refused(pipe, calib, fast):
    q = copy.deepcopy(quantize(pipe.unet, fast("quest", 4, 4), calib))
    q.quest_steps.select_group(0)
    act = q.conv_in.input_quantizer
    x = torch.randn(1, 3, 8, 8)
    for ratio, shift in ((11, 0), (11, 1), (8, 4), (16, 0), (2, 2)):
        act.ratio.fill_(ratio)
        act.shift.fill_(shift)
        with pytest.raises(ConfigError, match=r"not m \* 2\^e"):
            layer_forward(q.conv_in, x)
        with pytest.raises(ConfigError, match=r"not m \* 2\^e"):
            integer_form(q.conv_in, "conv_in")


def test_the_kept_shift_is_the_one_that_is_used(pipe, calib, fast):
    """A ratio of 4 is 4 * 2^0, 2 * 2^1 or 1 * 2^2: another place for the same factor."""
    q = copy.deepcopy(quantize(pipe.unet, fast("quest", 4, 4), calib))
    q.quest_steps.select_group(0)
    layer = next(m for m in quant_layers(q).values() if m.role == "conv")
    act = layer.input_quantizer
    act.ratio.fill_(4.0)
    x = torch.randn(1, layer.in_channels, 8, 8)
    sums = []
    for shift in (0, 1, 2):
        act.shift.fill_(shift)
        carried = carry(x, act)
        assert set(carried.shift.tolist()) == {shift}
        assert int(carried.values.abs().max()) <= 15 * 2 ** (2 - shift)
        assert set(integer_form(layer, "conv").parts[0].shift.tolist()) == {shift}
        sums.append(layer_forward(layer, x)[1])
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
