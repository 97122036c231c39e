import dataclasses

import pytest
import torch

from questlib.config import AFTER_RANGES, CHOICES, QuantConfig
from questlib.errors import ConfigError
from questlib.observers import init_ranges
from questlib.presets import PRESETS
from questlib.quantization.model import act_quantizers
from questlib.quantization.preparation import prepare


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_every_preset_builds_and_survives_a_round_trip(name, bits):
    config = QuantConfig.preset(name, *bits)
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert config.hash() == QuantConfig.preset(name, *bits).hash()
    assert (config.weight_bits, config.act_bits, config.preset_name) == (*bits, name)


def test_paper_and_release_are_both_here_and_differ_where_the_issue_says():
    paper, release = QuantConfig.preset("quest-paper"), QuantConfig.preset("quest-release")
    assert (paper.ranges.step_groups, release.ranges.step_groups) == (1, 20)
    assert (paper.finetuning.te_layers, release.finetuning.te_layers) == ("all", "projections")
    assert (paper.finetuning.cma_layers, release.finetuning.cma_layers) == ("attention", "qkv")
    assert (paper.finetuning.cma_local_loss, release.finetuning.cma_local_loss) == (True, False)
    assert (paper.finetuning.tla_order, release.finetuning.tla_order) == ("joint", "sequential")
    assert (paper.finetuning.lr_scale_tla, release.finetuning.lr_scale_tla) == (None, 1e-5)
    assert paper.finetuning.tla_iters + paper.finetuning.cma_iters == 2200
    assert (paper.softmax_bits, release.softmax_bits) == (None, 8)
    assert (paper.ranges.act_granularity, release.ranges.act_granularity) == ("tensor", "channel")
    assert (
        QuantConfig.preset("quest-release", 4, 8).act_symmetric
        and QuantConfig.preset("quest-release", 4, 8).act_ema == 0.95
    )
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
        (lambda: QuantConfig(act_ema=1.0), "act_ema: expected 0 or more, below 1, found 1.0"),
        (
            lambda: QuantConfig(lr_scale=-1e-4),
            "lr_scale: expected 0 or more, below inf, found -0.0001",
        ),
        (
            lambda: QuantConfig(global_weight=float("nan")),
            "global_weight: expected 0 or more, below inf, found nan",
        ),
        (lambda: QuantConfig(range_norm=0.0), "range_norm: expected a positive number, found 0.0"),
    ],
)
def test_bad_values_are_named(call, says):
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        call()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().weight_bits = 8


def test_weight_key_ignores_activation_settings_only():
    a, b = (
        QuantConfig.preset("q-diffusion", 4, 8, first_last_weight_bits=8),
        QuantConfig.preset("quest", 4, 4),
    )
    assert a.weight_key() == b.weight_key()
    assert a.weight_key() != QuantConfig.preset("quest", 8, 8).weight_key()
    assert a.weight_key() != QuantConfig.preset("quest", 4, 4, adaround_iters=7).weight_key()


def test_range_key_is_shared_by_presets_with_the_same_ranges():
    a = QuantConfig.preset("q-diffusion", 4, 8)
    assert {
        c.range_key()
        for c in (a, QuantConfig.preset("ptq-d", 4, 8), QuantConfig.preset("q-diffusion", 8, 8))
    } == {a.range_key()}
    carrier = [
        QuantConfig.preset("quest", w, 4).range_key() for w in (4, 8)
    ]  # 2^e of the ratios fits beside 4-bit weights alone
    other = [
        QuantConfig.preset(n, 4, 8).range_key()
        for n in ("minmax", "ptq4dm", "tfmq-dm", "quest", "efficientdm")
    ]
    assert len({a.range_key(), *carrier, *other}) == 8


OTHER = {
    "int": lambda v: v + 1,
    "float": lambda v: v * 2 + 1,
    "bool": lambda v: not v,
    "NoneType": lambda v: 1e-5,
}


def test_keys_after_the_ranges_do_not_change_them(pipe, calib, fast):
    a = fast("quest", 4, 4, te="ptq", cma_layers="none", noise_correction=True)

    def other(key):
        value = getattr(a, key)
        if isinstance(value, str):
            return next(v for v in CHOICES.get(key, ["other"]) if v != value)
        return OTHER[type(value).__name__](value)

    b = a.replace(**{key: other(key) for key in AFTER_RANGES})
    assert a.range_key() == b.range_key() and not any(
        getattr(a, key) == getattr(b, key) for key in AFTER_RANGES
    )
    found = []
    for config in (a, b.replace(te="finetune")):
        q = prepare(pipe.unet, config, calib.t)
        init_ranges(q, calib, config)
        found.append([v for act in act_quantizers(q) for v in act.state_dict().values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_ranges_with_a_grid_a_token_depend_on_the_weight_bits():
    """8-bit weights leave no room for 2^e in the time path's ratios, also where all else has one scale a tensor."""
    wide, narrow = (QuantConfig.preset("tfmq-dm", bits, 4) for bits in (8, 4))
    assert wide.range_key() != narrow.range_key()
    assert wide.replace(te_token=False).range_key() == narrow.replace(te_token=False).range_key()
