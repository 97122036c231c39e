"""The central promise in its smallest form: integer arithmetic equals the simulation (max relative error 1e-5 in float32)."""

import copy

import pytest
import torch

from questlib import finetune, quantize
from questlib.errors import ConfigError
from questlib.integer.oracle import accumulate, attention_scores, carry, layer_forward
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.model import quant_layers


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


@pytest.mark.parametrize(("w", "a"), [(8, 8), (4, 8), (4, 4), (3, 5)])
@pytest.mark.parametrize("trained", [False, True])
def test_every_layer_of_a_quest_model_equals_its_simulation(pipe, calib, fast, w, a, trained):
    """Real inputs, every layer, three step groups; after finetuning too, when the scales have been trained."""
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
    q.quest_steps.current = 0
    with pytest.raises(ConfigError, match="cannot run in integers"):
        layer_forward(q.conv_in, torch.randn(1, 3, 8, 8))


def test_batches_of_several_groups_are_refused(pipe, calib, fast):
    q = quantize(pipe.unet, fast("quest", 4, 4, step_groups=5), calib)
    q.quest_steps.current = torch.tensor([0, 1])
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
    q.quest_steps.current = 0
    processor = next(m for m in q.modules() if isinstance(m, QuantAttnProcessor))
    a, b = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        fa, fb = processor.q(a), processor.k(b)
    expected = fa.unflatten(-1, (4, 8)).transpose(1, 2) @ fb.unflatten(-1, (4, 8)).transpose(
        1, 2
    ).transpose(-1, -2)
    assert (
        relative(attention_scores(carry(a, processor.q), carry(b, processor.k), 4), expected)
        <= 1e-5
    )


def test_ratios_off_the_grid_are_refused(pipe, calib, fast):
    q = copy.deepcopy(quantize(pipe.unet, fast("quest", 4, 4), calib))
    q.quest_steps.current = 0
    q.conv_in.input_quantizer.ratio.fill_(11.0)
    with pytest.raises(ConfigError, match=r"not m \* 2\^e"):
        layer_forward(q.conv_in, torch.randn(1, 3, 8, 8))
