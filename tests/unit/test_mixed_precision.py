"""Bits for each layer by its sensitivity (MixDQ)."""

from __future__ import annotations

import itertools
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import questlib
from questlib import QuantConfig, convert, from_pretrained, quantize
from questlib.baselines.mixed_precision import choose_bits, sensitivities, with_chosen_bits
from questlib.errors import ConfigError
from questlib.quantization.model import quant_layers
from questlib.quantization.preparation import plain_copy, prepare


def mean_bits(chosen, sizes) -> float:
    return sum(sizes[name] * bits for name, bits in chosen.items()) / sum(sizes.values())


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_within_the_mean_is_better(seed):
    """Against all combinations of a small case."""
    draw = random.Random(seed)
    names = [f"layer {i}" for i in range(6)]
    sizes = {name: draw.randint(1, 50) for name in names}
    cost = {
        name: {bits: draw.random() * 4.0**-bits * draw.choice((1, 30)) for bits in (2, 4, 8)}
        for name in names
    }
    found = choose_bits(cost, sizes, 4)
    assert mean_bits(found, sizes) <= 4 + 1e-9

    def total(chosen) -> float:
        return sum(cost[name][bits] for name, bits in chosen.items())

    every = (dict(zip(names, c, strict=True)) for c in itertools.product((2, 4, 8), repeat=6))
    best = min(total(chosen) for chosen in every if mean_bits(chosen, sizes) <= 4)
    assert total(found) == pytest.approx(best, rel=1e-9)


def test_candidates_without_so_small_a_mean_are_refused():
    with pytest.raises(ConfigError, match="a mean of at most 3 bits, found 4 at the least"):
        choose_bits({"a": {4: 1.0, 8: 0.5}}, {"a": 7}, 3)


def test_a_layer_that_suffers_gets_more_bits(pipe, calib, fast):
    """The last residual branch is made to outweigh all before it, and so do its errors."""
    name = "up_blocks.1.resnets.1.conv2"
    unet = plain_copy(pipe.unet)
    unet.get_submodule(name).weight.data *= 30
    own = questlib.calibrate(SimpleNamespace(unet=unet, scheduler=pipe.scheduler), 6, 5, seed=3)
    config = fast("mixdq", adaround=False, act_choices=[])
    plain = config.replace(weight_choices=[])
    cost, sizes = sensitivities(unet, own, plain, "weight", [2, 4, 8])
    before = {layer: own[2] for layer, own in cost.items() if layer != "conv_out"}
    branch = (name, name.replace("conv2", "conv1"))
    assert max(before, key=before.__getitem__) in branch
    chosen = with_chosen_bits(unet, own, config)
    assert chosen.layer_act_bits == {}
    assert all(chosen.layer_weight_bits[layer] >= 4 for layer in branch)
    assert mean_bits(chosen.layer_weight_bits, sizes) <= 4 + 1e-9
    layers = quant_layers(prepare(unet, chosen, own.t))
    for key, bits in chosen.layer_weight_bits.items():
        assert layers[key].weight_quantizer.bits == bits


def test_fixed_layers_take_no_part(pipe, calib, fast):
    config = fast("mixdq", first_last_weight_bits=8, adaround=False)
    chosen = with_chosen_bits(pipe.unet, calib, config)
    for bits in (chosen.layer_weight_bits, chosen.layer_act_bits):
        assert bits and not {"conv_in", "conv_out"} & set(bits)


def test_the_whole_way(pipe, calib, fast, tmp_path):
    """The student's config has the bits, a checkpoint is built from them, integers run them."""
    config = fast("mixdq-quest", adaround_lr=0.2)
    unet = quantize(pipe.unet, config, calib)
    bits = unet.quest_config.layer_weight_bits
    assert bits and not config.layer_weight_bits
    questlib.finetune(unet, pipe.unet, calib, config)
    questlib.save_pretrained(unet, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.quest_config.layer_weight_bits == bits
    batch = calib.batch(2, torch.arange(3))
    with torch.no_grad():
        expected = batch.run(unet)
        assert torch.equal(batch.run(again), expected)
        found = batch.run(convert(again, "reference"))
    assert (found - expected).pow(2).mean() < 3e-3 * expected.pow(2).mean()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (dict(weight_choices=[2, 9]), "weight_choices.*expected 2..8"),
        (dict(weight_choices=[6, 8]), "expected one of at most weight_bits"),
        (dict(act_choices=[8]), "expected one of at most act_bits"),
        (dict(layer_weight_bits={"conv_in": 1}), "layer_weight_bits.conv_in.*expected 2..8"),
    ],
)
def test_impossible_choices_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        QuantConfig.preset("mixdq", 4, 4).replace(**values)


def test_a_layer_that_is_not_there_is_named(pipe, calib, fast):
    config = fast("quest").replace(layer_weight_bits={"conv_inn": 8})
    with pytest.raises(ConfigError, match="layer_weight_bits.*found 'conv_inn'.*conv_in"):
        quantize(pipe.unet, config, calib)


def test_bits_that_are_given_are_not_chosen_again(pipe, calib, fast):
    config = fast("mixdq").replace(layer_weight_bits={"conv_in": 8})
    with pytest.raises(ConfigError, match="expected no layer_weight_bits"):
        with_chosen_bits(pipe.unet, calib, config)


def test_without_scipy_it_says_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)  # importing it fails
    with pytest.raises(ConfigError, match="expected scipy"):
        choose_bits({"a": {4: 1.0}}, {"a": 1}, 4)
