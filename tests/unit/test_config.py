import pytest
import torch
from pydantic import ValidationError

from questlib.config import KEYWORDS, QuantConfig, field_path
from questlib.config_groups import GROUPS, RangeConfig
from questlib.errors import ConfigError
from questlib.observers import init_ranges
from questlib.presets import PRESETS
from questlib.quantization.model import act_quantizers
from questlib.quantization.preparation import prepare

RANGES = {"range_key"}
ADAROUND = {"adaround_key"}
BOTH = RANGES | ADAROUND
# weights of up to 4 bits make room for the ratios of "carrier" and "token"
WITH_RATIOS = {"weight_bits": BOTH, "first_last_weight_bits": BOTH}

# Every field: a value that is not the default, and the keys beside `hash` that it changes.
FIELDS = {
    "preset_name": ("other", set()),
    "weight_bits": (8, ADAROUND),
    "act_bits": (8, RANGES),
    "softmax_bits": (8, RANGES),
    "first_last_act_bits": (8, RANGES),
    "first_last_weight_bits": (8, ADAROUND),
    "te_act_bits": (8, RANGES),
    "act_layers": ("conv", RANGES),
    "te": ("fp", BOTH),
    "skip_layers": (["mid_block.*"], BOTH),
    "float_attention": (["mid_block.*"], RANGES),
    "weight_range": ("minmax", ADAROUND),
    "split_skip": (False, BOTH),
    "layer_weight_bits": ({"conv_in": 8}, BOTH),
    "layer_act_bits": ({"conv_in": 8}, BOTH),
    "transforms.rotation": (True, BOTH),
    "transforms.smoothing": (True, BOTH),
    "transforms.low_rank": (32, BOTH),
    "mixed.weight_choices": ([2, 4, 8], set()),
    "mixed.act_choices": ([2, 16], set()),
    "mixed.sensitivity_samples": (8, set()),
    "noise_correction": (True, set()),
    "weight_range_norm": (2.4, ADAROUND),
    "batch_size": (16, set()),
    "seed": (1, BOTH),
    "forward_batch": (16, RANGES),
    "save_memory": (True, set()),
    "ranges.act_granularity": ("carrier", RANGES),
    "ranges.act_range": ("minmax", RANGES),
    "ranges.range_norm": (2.4, RANGES),
    "ranges.act_symmetric": (True, RANGES),
    "ranges.act_ema": (0.9, RANGES),
    "ranges.step_groups": (4, RANGES),
    "ranges.calib_batch": (8, RANGES),
    "ranges.calib_steps": ("normal", RANGES),
    "ranges.te_token": (True, RANGES),
    "ranges.calib_model": ("quantized", RANGES),
    "adaround.enabled": (True, ADAROUND),
    "adaround.iters": (7, ADAROUND),
    "adaround.lr": (1e-2, ADAROUND),
    "adaround.batch_size": (8, ADAROUND),
    "adaround.round_weight": (1.0, ADAROUND),
    "adaround.samples": (8, ADAROUND),
    "adaround.temporal_block": (True, ADAROUND),
    "act_recon.enabled": (True, set()),
    "act_recon.iters": (7, set()),
    "act_recon.lr": (1e-2, set()),
    "finetuning.tla_iters": (7, set()),
    "finetuning.cma_iters": (7, set()),
    "finetuning.te_layers": ("projections", set()),
    "finetuning.cma_layers": ("all", set()),
    "finetuning.lora_rank": (4, set()),
    "finetuning.local_loss": (False, set()),
    "finetuning.cma_local_loss": (False, set()),
    "finetuning.teacher_autocast": (True, set()),
    "finetuning.normalize_local": (True, set()),
    "finetuning.global_weight": (20.0, set()),
    "finetuning.global_per_layer": (True, set()),
    "finetuning.tla_order": ("sequential", set()),
    "finetuning.cma_order": ("rounds", set()),
    "finetuning.tla_batch_size": (2, set()),
    "finetuning.cma_batch_size": (4, set()),
    "finetuning.tla_samples": (8, set()),
    "finetuning.cma_samples": (64, set()),
    "finetuning.train_biases": (True, set()),
    "finetuning.scale_layers": ("own", set()),
    "finetuning.lr_weight": (1e-2, set()),
    "finetuning.lr_scale": (1e-2, set()),
    "finetuning.lr_scale_tla": (1e-2, set()),
    "finetuning.lr_relative": (True, set()),
    "finetuning.lr_decay": (True, set()),
}

# keywords of fields that came later
SINCE_FORMAT_2 = {
    "skip_layers",
    "float_attention",
    "layer_weight_bits",
    "layer_act_bits",
    "rotation",
    "smoothing",
    "low_rank",
    "weight_choices",
    "act_choices",
    "sensitivity_samples",
    "weight_range_norm",
    "calib_model",
    "adaround_batch_size",
    "round_weight",
    "global_per_layer",
    "cma_order",
    "tla_batch_size",
    "cma_batch_size",
    "tla_samples",
    "cma_samples",
    "train_biases",
    "scale_layers",
    "teacher_autocast",
}

# config.json of a checkpoint of format 1 that questlib 0.1.0 wrote: quest at W4A4, with changes
FORMAT_1 = {
    "preset_name": "quest",
    "weight_bits": 4,
    "act_bits": 4,
    "softmax_bits": 8,
    "first_last_act_bits": 8,
    "first_last_weight_bits": 8,
    "te_act_bits": None,
    "act_layers": "all",
    "act_granularity": "carrier",
    "act_range": "mse",
    "range_norm": 2.0,
    "act_symmetric": False,
    "act_ema": None,
    "step_groups": 4,
    "weight_range": "mse",
    "split_skip": True,
    "calib_batch": 64,
    "calib_steps": "uniform",
    "te_token": False,
    "adaround": True,
    "adaround_iters": 300,
    "adaround_lr": 0.001,
    "recon_samples": 128,
    "act_recon": False,
    "act_iters": 5,
    "act_lr": 0.0004,
    "temporal_block": False,
    "noise_correction": False,
    "te": "finetune",
    "te_layers": "all",
    "cma_layers": "attention",
    "lora_rank": 0,
    "tla_iters": 1100,
    "cma_iters": 1100,
    "local_loss": True,
    "cma_local_loss": True,
    "normalize_local": True,
    "global_weight": 20.0,
    "tla_order": "joint",
    "lr_weight": 0.02,
    "lr_scale": 0.002,
    "lr_scale_tla": None,
    "lr_relative": True,
    "lr_decay": True,
    "batch_size": 32,
    "seed": 0,
    "forward_batch": 64,
    "save_memory": False,
}


def fields() -> dict[str, object]:
    """Every field's description by its dotted name."""
    own = {n: f for n, f in QuantConfig.model_fields.items() if n not in GROUPS}
    for group, settings in GROUPS.items():
        own |= {f"{group}.{n}": f for n, f in settings.model_fields.items()}
    return {name: field.description for name, field in own.items()}


def keyword(name: str) -> str:
    """The keyword that names a field of a group alone."""
    named = {dotted: key for key, dotted in KEYWORDS.items()}
    group, _, field = name.rpartition(".")
    return named.get(name, group if field == "enabled" else field)


# ---- fields and their names ----


def test_every_field_is_described_where_help_shows_it():
    assert set(fields()) == set(FIELDS)
    words = " ".join((QuantConfig.__doc__ or "").split())
    for name, description in fields().items():
        assert description, name
        assert f"{name} = " in words
        assert " ".join(description.split()) in words


@pytest.mark.parametrize("name", FIELDS)
def test_dotted_name_keyword_and_group_are_the_same(name):
    value, _ = FIELDS[name]
    by_name = QuantConfig(**{name: value})
    assert by_name.get(name) == value != QuantConfig().get(name)
    group, _, field = name.rpartition(".")
    others = [QuantConfig().replace(**{name: value}), QuantConfig(**{keyword(name): value})]
    if group:
        others.append(QuantConfig(**{group: {field: value}}))
        others.append(QuantConfig(**{group: GROUPS[group](**{field: value})}))
    assert all(other == by_name for other in others)
    assert by_name.to_dict() != QuantConfig().to_dict()


def test_a_field_of_a_group_is_changed_alone():
    a = QuantConfig(adaround=True, ranges=RangeConfig(step_groups=3), act_range="minmax")
    assert (a.ranges.step_groups, a.ranges.act_range, a.adaround.enabled) == (3, "minmax", True)
    b = a.replace(adaround_iters=5, step_groups=4)
    assert (b.adaround.enabled, b.adaround.iters) == (True, 5)
    assert (b.ranges.step_groups, b.ranges.act_range) == (4, "minmax")


def test_names_are_unambiguous():
    """No keyword stands for two fields, and none hides another field."""
    assert len({keyword(name) for name in FIELDS}) == len(FIELDS)
    for name in FIELDS:
        path = field_path(keyword(name))
        assert ".".join(path) == name or [*path, "enabled"] == name.split(".")


# ---- keys ----


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_keys_change_with_what_decides_them(name, granularity):
    value, changes = FIELDS[name]
    before = QuantConfig(act_granularity=granularity)
    if granularity == "token":
        changes = WITH_RATIOS.get(name, changes)
        if name == "ranges.calib_model":  # grids of tokens are known when all groups were seen
            return
    after = before.replace(**{name: value})
    found = {key for key in BOTH if getattr(before, key)() != getattr(after, key)()}
    assert found == changes
    own = name.startswith("act_recon.") or name == "batch_size"
    assert (before.act_recon_key() != after.act_recon_key()) == (bool(changes) or own)
    assert before.hash() != after.hash()


def test_ranges_of_the_quantized_model_depend_on_its_weights():
    config = QuantConfig(calib_model="quantized")
    for change in (dict(weight_bits=8), dict(adaround=True), dict(adaround_iters=7)):
        assert config.range_key() != config.replace(**change).range_key()
        assert QuantConfig().range_key() == QuantConfig(**change).range_key()


def test_time_embedding_layers_are_there_or_not():
    """Whether they are finetuned later has no part in ranges and rounding."""
    ptq, finetune, full = (QuantConfig(te=te) for te in ("ptq", "finetune", "fp"))
    for key in BOTH:
        assert getattr(ptq, key)() == getattr(finetune, key)() != getattr(full, key)()


def test_presets_with_the_same_ranges_share_them():
    q_diffusion = QuantConfig.preset("q-diffusion", 4, 8).range_key()
    assert QuantConfig.preset("ptq-d", 4, 8).range_key() == q_diffusion
    assert QuantConfig.preset("q-diffusion", 8, 8).range_key() == q_diffusion
    other = [
        QuantConfig.preset(name, 4, 8).range_key()
        for name in ("minmax", "ptq4dm", "tfmq-dm", "quest", "efficientdm")
    ]
    # 2^e of the ratios fits beside 4-bit weights alone
    carrier = [QuantConfig.preset("quest", bits, 4).range_key() for bits in (4, 8)]
    assert len({q_diffusion, *carrier, *other}) == 8


def test_ranges_of_tokens_depend_on_the_weight_bits():
    """8-bit weights leave no room for 2^e in the time path's ratios, whatever other inputs have."""
    wide, narrow = (QuantConfig.preset("tfmq-dm", bits, 4) for bits in (8, 4))
    assert wide.range_key() != narrow.range_key()
    wide, narrow = (config.replace(te_token=False) for config in (wide, narrow))
    assert wide.range_key() == narrow.range_key()


def test_rounded_weights_do_not_depend_on_activations():
    a = QuantConfig.preset("q-diffusion", 4, 8, first_last_weight_bits=8)
    assert a.adaround_key() == QuantConfig.preset("quest", 4, 4).adaround_key()


def test_what_is_not_in_the_range_key_does_not_change_the_ranges(pipe, calib, fast):
    a = fast("quest", 4, 4)
    others = {n: v for n, (v, changes) in FIELDS.items() if "range_key" not in changes}
    # 4-bit weights make room for the ratios; the correction excludes finetuning
    for name in (*WITH_RATIOS, "noise_correction"):
        del others[name]
    b = a.replace(**others | {"act_recon.iters": 9, "adaround.samples": 16})
    assert a.range_key() == b.range_key()
    found = []
    for config in (a, b):
        q = prepare(pipe.unet, config, calib.t)
        init_ranges(q, calib, config)
        found.append([v for act in act_quantizers(q) for v in act.state_dict().values()])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


# ---- reading and refusing ----


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_every_preset_builds_and_survives_a_round_trip(name, bits):
    config = QuantConfig.preset(name, *bits)
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert config.hash() == QuantConfig.preset(name, *bits).hash()
    assert (config.weight_bits, config.act_bits, config.preset_name) == (*bits, name)


def test_flat_dict_of_format_1_is_read():
    config = QuantConfig.from_dict(FORMAT_1)
    assert set(FORMAT_1) == {keyword(name) for name in FIELDS} - SINCE_FORMAT_2
    assert config == QuantConfig.preset(
        "quest", 4, 4, adaround_iters=300, recon_samples=128, act_iters=5
    )
    assert config.adaround.enabled and not config.act_recon.enabled


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(wbits=4), "wbits"),
        (dict(adaround=dict(rate=1.0)), "adaround.rate"),
        ({"ranges.tla_iters": 1}, "ranges.tla_iters"),
        (dict(weight_bits=1), "weight_bits"),
        (dict(act_bits=9), "act_bits"),
        (dict(softmax_bits=32), "softmax_bits"),
        (dict(softmax_bits="8"), "softmax_bits"),
        (dict(te="none"), "te"),
        (dict(act_granularity="row"), "ranges.act_granularity"),
        (dict(step_groups=0), "ranges.step_groups"),
        (dict(tla_iters=-1), "finetuning.tla_iters"),
        (dict(tla_iters=1.0), "finetuning.tla_iters"),
        (dict(adaround="False"), "adaround"),
        (dict(lr_weight="2e-2x"), "finetuning.lr_weight"),
        (dict(act_ema=True), "ranges.act_ema"),
        (dict(act_ema=1.0), "ranges.act_ema"),
        (dict(lr_scale=-1e-4), "finetuning.lr_scale"),
        (dict(global_weight=float("nan")), "finetuning.global_weight"),
        (dict(range_norm=0.0), "ranges.range_norm"),
    ],
)
def test_bad_values_are_refused_and_named(values, named):
    """By their dotted name, which an error of a new configuration and of a changed one gives."""
    for make in (lambda: QuantConfig(**values), lambda: QuantConfig().replace(**values)):
        with pytest.raises(ConfigError) as error:
            make()
        field = named.rpartition(".")[2]
        assert field in str(error.value).split(":")[0]


def test_unknown_presets_are_refused():
    with pytest.raises(ConfigError, match="qest"):
        QuantConfig.preset("qest")


def test_frozen():
    config = QuantConfig()
    with pytest.raises(ValidationError):
        config.weight_bits = 8
    with pytest.raises(ValidationError):
        config.adaround.iters = 8


# ---- the presets of the paper and of its release ----


def test_paper_and_release_differ_where_they_are_known_to():
    paper = QuantConfig.preset("quest-paper")
    release = QuantConfig.preset("quest-release")
    assert (paper.ranges.step_groups, release.ranges.step_groups) == (1, 20)
    assert (paper.finetuning.te_layers, release.finetuning.te_layers) == ("all", "projections")
    assert (paper.finetuning.cma_layers, release.finetuning.cma_layers) == ("attention", "qkv")
    assert (paper.finetuning.cma_local_loss, release.finetuning.cma_local_loss) == (True, False)
    assert (paper.finetuning.tla_order, release.finetuning.tla_order) == ("joint", "sequential")
    assert (paper.finetuning.lr_scale_tla, release.finetuning.lr_scale_tla) == (None, 1e-5)
    assert paper.iterations == 2200
    assert (paper.softmax_bits, release.softmax_bits) == (None, 8)
    assert (paper.ranges.act_granularity, release.ranges.act_granularity) == ("tensor", "channel")
    wide = QuantConfig.preset("quest-release", 4, 8).ranges
    assert (wide.act_symmetric, wide.act_ema) == (True, 0.95)
    # ours runs in integers
    assert QuantConfig.preset("quest").ranges.act_granularity == "carrier"
