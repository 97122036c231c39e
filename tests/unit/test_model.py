import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from questlib.config import QuantConfig
from questlib.errors import ConfigError, NotCalibratedError
from questlib.finetuning.stages import stages
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
        c: set(stages(q, QuantConfig.preset("quest", cma_layers=c))[-1].layers)
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
    with pytest.raises(ConfigError, match="expected a diffusers UNet2DModel.*found Linear"):
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
    """Fig. 3: the others, and the attention products, stay in full precision; the kinds together are all layers."""
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
    with pytest.raises(
        ConfigError, match="act_layers: expected one of all, feed_forward, linear, conv"
    ):
        QuantConfig(act_layers="attention")


def test_everything_is_where_the_model_was(pipe):
    """On a GPU, too; the meta device stands for it. Weights at 16 bits: their ranges need values."""
    unet = copy.deepcopy(pipe.unet).to("meta")
    for preset in ("quest", "ptq-d"):
        q = prepare(unet, QuantConfig.preset(preset, 16, 4), torch.tensor([900, 500, 100]))
        assert {t.device.type for t in (*q.parameters(), *q.buffers())} == {"meta"}
        inside = [v for m in q.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
        assert {t.device.type for t in inside} <= {"meta"}
