import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from questlib.config import QuantConfig
from questlib.errors import ConfigError, NotCalibratedError
from questlib.finetuning.stages import select_stages
from questlib.quantization.model import act_quantizers, quant_layers, set_mode
from questlib.quantization.preparation import prepare
from questlib.quantization.roles import layer_roles, skip_splits

T = torch.tensor([801, 601, 401, 201, 1])


def test_roles_cover_every_layer(pipe):
    roles = layer_roles(pipe.unet)
    layers = [n for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert list(roles) == layers
    assert roles["conv_in"] == "first" and roles["conv_out"] == "last"
    assert roles["time_embedding.linear_1"] == "time_embed"
    assert roles["mid_block.resnets.0.time_emb_proj"] == "time_proj"
    assert (
        roles["mid_block.attentions.0.to_q"] == "qkv"
        and roles["mid_block.attentions.0.to_out.0"] == "attn_out"
    )
    assert roles["up_blocks.0.resnets.0.conv_shortcut"] == "shortcut"
    assert {
        "first",
        "last",
        "time_embed",
        "time_proj",
        "qkv",
        "attn_out",
        "conv",
        "shortcut",
    } == set(roles.values())


def test_roles_follow_structure_not_names(pipe):
    """A layer whose name looks like another role keeps the role of the module that owns it."""
    unet = copy.deepcopy(pipe.unet)
    unet.mid_block.to_q = nn.Linear(4, 4)
    assert layer_roles(unet)["mid_block.to_q"] == "linear"


def test_conditional_unet_has_feed_forward_and_cross_attention():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    roles = layer_roles(unet)
    ff = [n for n, r in roles.items() if r == "feed_forward"]
    assert ff and all(".ff.net." in n for n in ff)
    own, cross = (
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    )
    assert {roles[f"{own}.{x}"] for x in ("to_q", "to_k", "to_v")} == {"qkv"}
    assert [roles[f"{cross}.{x}"] for x in ("to_q", "to_k", "to_v")] == [
        "qkv",
        "context_kv",
        "context_kv",
    ]
    q = prepare(unet, QuantConfig.preset("quest"), T)
    set_mode(q, weights=False, acts=False)
    tuned = {
        c: set(select_stages(q, QuantConfig.preset("quest", cma_layers=c))[-1].layers)
        for c in ("attention", "no_context", "qkv")
    }
    assert tuned["attention"] - tuned["no_context"] == {
        n for n, r in roles.items() if r in ("context_kv", "attn_out")
    }
    assert tuned["no_context"] - tuned["qkv"] == set(ff) and f"{cross}.to_k" in tuned["qkv"]
    x, ctx = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        assert torch.allclose(q(x, 401, ctx).sample, unet.eval()(x, 401, ctx).sample, atol=1e-5)


def test_split_points_are_where_the_concatenation_joins(pipe):
    """Against the channels that really arrive from below, seen by a hook."""
    seen = {}
    unet = copy.deepcopy(pipe.unet)
    for i, block in enumerate(unet.up_blocks):

        def hook(module, args, kwargs, i=i):
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            seen[f"up_blocks.{i}.resnets.0.conv_shortcut"] = hidden.shape[1]

        block.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        unet(torch.randn(1, 3, 8, 8), 5)
    splits = skip_splits(pipe.unet)
    assert {n: splits[n] for n in seen} == seen
    assert len(splits) == sum(len(b.resnets) for b in unet.up_blocks)


def test_all_off_equals_full_precision(pipe):
    q = prepare(pipe.unet, QuantConfig.preset("quest"), T)
    set_mode(q, weights=False, acts=False)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(q(x, 401).sample, pipe.unet(x, 401).sample, atol=1e-5)
    assert type(q) is UNet2DModel and not hasattr(pipe.unet, "quest_steps")


def test_bits_by_role(pipe):
    q = prepare(pipe.unet, QuantConfig.preset("quest", 4, 4, te_act_bits=6), T)
    bits = {n: m.input_quantizer.bits for n, m in quant_layers(q).items()}
    assert bits["conv_in"] == bits["conv_out"] == 8
    assert bits["time_embedding.linear_1"] == bits["mid_block.resnets.0.time_emb_proj"] == 6
    assert bits["mid_block.attentions.0.to_q"] == 4
    assert (
        q.mid_block.attentions[0].processor.probs.bits == 8
        and q.mid_block.attentions[0].processor.q.bits == 4
    )
    assert {
        m.weight_quantizer.bits for m in quant_layers(q).values() if m.role not in ("first", "last")
    } == {4}
    assert q.conv_in.weight_quantizer.bits == q.conv_out.weight_quantizer.bits == 8
    paper = prepare(pipe.unet, QuantConfig.preset("quest-paper", 4, 4), T)
    assert (
        {a.bits for a in act_quantizers(paper)}
        == {m.weight_quantizer.bits for m in quant_layers(paper).values()}
        == {4}
    )  # fully quantized


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("tensor", {"tensor"}),
        ("channel", {"tensor", "channel"}),
        ("carrier", {"tensor", "carrier"}),
        ("token", {"tensor", "carrier", "token"}),
    ],
)
def test_granularity_by_layer(pipe, granularity, expected):
    """Softmax outputs and 8-bit inputs have one scale; tokens have theirs where they can."""
    config = QuantConfig.preset("quest", 4, 4, act_granularity=granularity)
    q = prepare(pipe.unet, config, T)
    assert {act.granularity for act in act_quantizers(q)} == expected
    layers = quant_layers(q)
    linear, conv = layers["mid_block.attentions.0.to_q"], layers["mid_block.resnets.0.conv1"]
    assert linear.input_quantizer.granularity == granularity
    convs = "carrier" if granularity == "token" else granularity
    assert conv.input_quantizer.granularity == convs
    assert layers["conv_in"].input_quantizer.bits == 8
    if granularity == "carrier":  # wide codes leave no room for ratios
        assert layers["conv_in"].input_quantizer.granularity == "tensor"
    processor = q.mid_block.attentions[0].processor
    assert processor.probs.granularity == "tensor" and processor.v.granularity == convs


def test_time_layers_can_have_a_range_for_each_timestep(pipe):
    q = prepare(pipe.unet, QuantConfig.preset("tfmq-dm", 4, 8), T)
    for layer in quant_layers(q).values():
        time = layer.role in ("time_embed", "time_proj")
        assert layer.input_quantizer.granularity == ("token" if time else "tensor")


def test_weight_ranges_are_searched_on_request(pipe):
    config = QuantConfig.preset("quest")
    empty = prepare(pipe.unet, config, T, search_weights=False)
    searched = prepare(pipe.unet, config, T)
    shapes = {name: value.shape for name, value in searched.state_dict().items()}
    assert {name: value.shape for name, value in empty.state_dict().items()} == shapes
    assert empty.quest_config == config
    for name, layer in quant_layers(empty).items():
        assert (layer.weight_quantizer.scale == 1).all()
        found = searched.get_submodule(name).weight_quantizer.scale
        assert (found > 0).all() and not (found == 1).any()


def test_frozen_weights_move_with_the_model(pipe, calib, fast):
    from questlib import quantize

    q = quantize(pipe.unet, fast("minmax", 4, 8), calib)
    keys = set(q.state_dict())
    q.double()
    assert {m.w_hat.dtype for m in quant_layers(q).values()} == {torch.float64}
    assert not any(k.endswith("w_hat") for k in keys)  # it follows from the weight: never saved


def test_te_fp_leaves_time_layers_alone(pipe):
    q = prepare(pipe.unet, QuantConfig.preset("quest", te="fp"), T)
    assert not any(m.role in ("time_embed", "time_proj") for m in quant_layers(q).values())


def test_never_calibrated_raises_at_the_first_forward(pipe):
    q = prepare(pipe.unet, QuantConfig.preset("quest"), T)
    with pytest.raises(NotCalibratedError, match="time_embedding.linear_1.input_quantizer"):
        q(torch.randn(1, 3, 8, 8), 401)


def test_wrong_models_are_refused(pipe):
    with pytest.raises(
        ConfigError, match="a Linear cannot be quantized; expected a diffusers model"
    ):
        prepare(nn.Linear(2, 2), QuantConfig(), T)
    q = prepare(pipe.unet, QuantConfig.preset("quest"), T)
    with pytest.raises(ConfigError, match="quantized already"):
        prepare(q, QuantConfig(), T)


def test_a_copy_looks_up_its_own_steps(pipe, calib, fast):
    from questlib import quantize

    q = quantize(pipe.unet, fast("minmax", 8, 8, step_groups=5), calib)
    other = copy.deepcopy(q)
    x = torch.randn(1, 3, 8, 8)
    other(x, 801)
    q(x, 1)
    assert (q.quest_steps.current, other.quest_steps.current) == (4, 0)
    assert next(act_quantizers(other)).steps is other.quest_steps


def test_inputs_of_one_kind_of_layer(pipe):
    """Fig. 3: all else stays in full precision, attention's products too.

    The kinds together are all layers.
    """
    seen = {}
    for kind in ("feed_forward", "linear", "conv", "all"):
        q = prepare(pipe.unet, QuantConfig.preset("quest-paper", 16, 6, act_layers=kind), T)
        seen[kind] = {n for n, layer in quant_layers(q).items() if layer.input_quantizer.enabled}
        inputs = {id(layer.input_quantizer) for layer in quant_layers(q).values()}
        products = [a for a in act_quantizers(q) if a.enabled and id(a) not in inputs]
        assert bool(products) == (kind == "all")
        assert all(layer.weight_quantizer is None for layer in quant_layers(q).values())
    modules = dict(pipe.unet.named_modules())
    assert seen["conv"] == {n for n in seen["all"] if isinstance(modules[n], nn.Conv2d)}
    assert (
        seen["linear"] == seen["all"] - seen["conv"] and not seen["feed_forward"]
    )  # this UNet has no feed-forward layers
    with pytest.raises(ConfigError, match="act_layers"):
        QuantConfig(act_layers="attention")


def test_everything_is_where_the_model_was(pipe):
    """On a GPU too, for which the meta device stands.

    Weights have 16 bits: a range search would need values.
    """
    unet = copy.deepcopy(pipe.unet).to("meta")
    for preset in ("quest", "ptq-d"):
        q = prepare(unet, QuantConfig.preset(preset, 16, 4), torch.tensor([900, 500, 100]))
        assert {t.device.type for t in (*q.parameters(), *q.buffers())} == {"meta"}
        inside = [v for m in q.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
        assert {t.device.type for t in inside} <= {"meta"}
