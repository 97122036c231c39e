import dataclasses

import pytest

from questlib.config import PRESETS, QuantConfig
from questlib.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_every_preset_builds_and_survives_a_round_trip(name, bits):
    config = QuantConfig.preset(name, *bits)
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert config.hash() == QuantConfig.preset(name, *bits).hash()
    assert (config.weight_bits, config.act_bits, config.preset_name) == (*bits, name)


def test_paper_and_release_are_both_here_and_differ_where_the_issue_says():
    paper, release = QuantConfig.preset("quest-paper"), QuantConfig.preset("quest-release")
    assert (paper.step_groups, release.step_groups) == (1, 20)
    assert (paper.te_layers, release.te_layers) == ("all", "projections")
    assert (paper.cma_layers, release.cma_layers) == ("attention", "qkv")
    assert (paper.cma_local_loss, release.cma_local_loss) == (True, False)
    assert (paper.tla_order, release.tla_order) == ("joint", "sequential")
    assert (paper.lr_scale_tla, release.lr_scale_tla) == (None, 1e-5)
    assert paper.tla_iters + paper.cma_iters == 2200
    assert (paper.softmax_bits, release.softmax_bits) == (None, 8)
    assert (paper.act_granularity, release.act_granularity) == ("tensor", "channel")
    assert QuantConfig.preset("quest-release", 4, 8).act_symmetric and QuantConfig.preset("quest-release", 4, 8).act_ema == 0.95
    assert QuantConfig.preset("quest").act_granularity == "carrier"  # ours runs in integers


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: QuantConfig.preset("qest"), "expected one of minmax"),
        (lambda: QuantConfig.preset("quest", wbits=4), "unknown key wbits"),
        (lambda: QuantConfig.preset("quest", 1, 4), "weight_bits: expected 2..8"),
        (lambda: QuantConfig.preset("quest", 4, 9), "act_bits: expected 2..8"),
        (lambda: QuantConfig.preset("quest", softmax_bits=32), "softmax_bits"),
        (lambda: QuantConfig(te="none"), "te: expected one of ptq, fp, finetune"),
        (lambda: QuantConfig(step_groups=0), "step_groups: expected at least 1"),
        (lambda: QuantConfig(tla_iters=-1), "tla_iters"),
        (lambda: QuantConfig(tla_iters=1.0), "tla_iters: expected int, found 1.0"),
        (lambda: QuantConfig(adaround="False"), "adaround: expected bool, found 'False'"),
        (lambda: QuantConfig(lr_weight="2e-2x"), "lr_weight: expected float or int, found '2e-2x'"),
        (lambda: QuantConfig(act_ema=True), "act_ema: expected float or int or null, found True"),
        (lambda: QuantConfig(softmax_bits="8"), "softmax_bits: expected int or null, found '8'"),
    ],
)
def test_bad_values_are_named(call, says):
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        call()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().weight_bits = 8


def test_weight_key_ignores_activation_settings_only():
    a, b = QuantConfig.preset("q-diffusion", 4, 8, first_last_weight_bits=8), QuantConfig.preset("quest", 4, 4)
    assert a.weight_key() == b.weight_key()
    assert a.weight_key() != QuantConfig.preset("quest", 8, 8).weight_key()
    assert a.weight_key() != QuantConfig.preset("quest", 4, 4, adaround_iters=7).weight_key()
