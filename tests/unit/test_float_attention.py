"""Attentions whose products stay in floating point: never without being asked for, the same in the
simulation and in integers, and named by config, checkpoint and report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from test_triton_fused import conditional, error, quantized

import questlib
from questlib import convert, engine_report, from_pretrained, quantize, save_pretrained
from questlib.errors import ConfigError
from questlib.integer.float_attention import faster_in_float
from questlib.integer.triton import graphs, runtime
from questlib.quantization.attention import FloatAttnProcessor
from questlib.quantization.model import act_quantizers
from questlib.quantization.preparation import prepare

needs_triton = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)


@pytest.fixture(scope="module")
def fake(pipe, calib):
    config = questlib.QuantConfig.preset("quest", 4, 4, adaround=False, calib_batch=8)
    return quantize(pipe.unet, config, calib)


def attentions(unet) -> set[str]:
    return {name for name, m in unet.named_modules() if isinstance(m, Attention)}


def call(unet, n: int = 2) -> torch.Tensor:
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return unet(x, unet.quest_steps.timesteps[1]).sample


def test_products_are_those_of_diffusers():
    torch.manual_seed(0)
    attn = Attention(16, cross_attention_dim=12, heads=4, dim_head=6)
    x, text = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    mask = torch.zeros(2, 1, 5).masked_fill(torch.rand(2, 1, 5) > 0.6, -1e4)
    for given in ({}, {"encoder_hidden_states": text, "attention_mask": mask}):
        if not given:
            attn.to_k, attn.to_v = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24)
        else:
            attn.to_k, attn.to_v = torch.nn.Linear(12, 24), torch.nn.Linear(12, 24)
        attn.set_processor(AttnProcessor2_0())
        expected = attn(x, **given)
        attn.set_processor(FloatAttnProcessor())
        torch.testing.assert_close(attn(x, **given), expected)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@torch.no_grad()
def test_the_simulation_and_the_integers_agree(fake, tmp_path, engine):
    save_pretrained(fake, tmp_path)
    mine = convert(fake, engine, attention="float")
    simulated = from_pretrained(tmp_path, attention="float")
    found, expected = call(mine), call(simulated)
    assert error(found, expected) < 1e-3  # codes of layers may flip
    assert error(call(fake), expected) > 1e-6  # it is another model
    assert mine.quest_config == simulated.quest_config
    assert set(mine.quest_config.float_attention) == attentions(mine)
    assert not fake.quest_config.float_attention  # the model itself stays what it was
    rows = {row.layer: row for row in engine_report(mine)}
    for name in attentions(mine):
        assert (rows[name].engine, rows[name].format) == ("float32", "not quantized")
    others = {row.engine for name, row in rows.items() if name not in attentions(mine)}
    assert others == {row.engine for row in engine_report(convert(fake, engine))}


def test_a_checkpoint_holds_the_choice(fake, tmp_path):
    save_pretrained(fake, tmp_path / "all")
    simulated = from_pretrained(tmp_path / "all", attention="auto")
    save_pretrained(simulated, tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert set(config["quant"]["float_attention"]) == attentions(fake)
    again = from_pretrained(tmp_path / "float")
    assert torch.equal(call(again), call(simulated))
    integers = from_pretrained(tmp_path / "float", engine="cpu")
    chosen_later = from_pretrained(tmp_path / "all", engine="cpu", attention="auto")
    assert torch.equal(call(integers), call(chosen_later))
    # diffusers' own files as well
    simulated.save_pretrained(tmp_path / "diffusers")
    assert torch.equal(call(from_pretrained(tmp_path / "diffusers")), call(simulated))


def test_a_config_names_attentions_before_quantization(pipe, fast):
    config = fast("quest", 4, 4, float_attention=["mid_block.*"])
    unet = prepare(pipe.unet, config, torch.arange(4))
    inside = {name for name in attentions(unet) if name.startswith("mid_block")}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            assert isinstance(module.processor, FloatAttnProcessor) == (name in inside)
    names = {act.name.rpartition(".")[0] for act in act_quantizers(unet)}
    assert inside and not names & inside and names & (attentions(unet) - inside)


def test_only_narrow_heads_are_faster_in_floating_point(fake, monkeypatch):
    assert [faster_in_float(n) for n in (40, 80, 128, 160)] == [True, True, True, False]
    monkeypatch.setattr("questlib.integer.float_attention.NARROW", 4)
    mine = convert(fake, "cpu", attention="auto")
    assert mine.quest_config == fake.quest_config
    assert torch.equal(call(mine), call(convert(fake, "cpu")))


@needs_triton
def test_the_rule_is_that_of_the_estimate():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import roofline

    out = SimpleNamespace(shape=(2, 4096, 0))
    for dim in (32, 40, 64, 80, 128, 160, 256):
        width = 1 << (dim - 1).bit_length()
        sizes = dict(heads=8, queries=4096, keys=4096, dim=dim, BD=width, BQ=128, BK=64)
        integers = roofline.attention(sizes | dict(OUT=out, P_CONSTANT=False))
        assert faster_in_float(dim) == (roofline.sdpa(sizes, 2) < integers), dim


def test_other_choices_are_refused_at_once(fake, tmp_path):
    with pytest.raises(ConfigError, match="attention: expected one of quantized, float, auto"):
        convert(fake, "cpu", attention="half")
    with pytest.raises(ConfigError, match="found 'int8'"):
        from_pretrained(tmp_path / "nothing", attention="int8")


@needs_triton
@torch.no_grad()
def test_fused_blocks_and_graphs_run_it(monkeypatch):
    def captured(run):
        out = run()
        return lambda: out.copy_(run()), out

    monkeypatch.setattr(graphs, "captured", captured)
    fake = quantized(conditional(False), 8)
    plain = convert(fake, "triton", attention="float")
    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)
    expected = plain(x, 1, encoder_hidden_states=text).sample
    for choices in ({}, {"graphs": True}):
        fused = convert(fake, "triton", attention="float", fuse=True, **choices)
        first = fused(x, 1, encoder_hidden_states=text).sample
        again = fused(x, 1, encoder_hidden_states=text).sample
        assert torch.equal(first, again) and error(first, expected) < 1e-5
        # another context is another input
        other = fused(x, 1, encoder_hidden_states=-text).sample
        assert error(other, plain(x, 1, encoder_hidden_states=-text).sample) < 1e-5
        engines = {row.engine for row in engine_report(fused)}
        assert engines == {"triton", "float32"}
