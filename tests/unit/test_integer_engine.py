"""The CPU engine: equal to fake quantization to 1e-5, and to the reference bit for bit.

Its sums are the oracle's.
"""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

import questlib
from questlib import convert, engine_report, finetune, quantize
from questlib.config import QuantConfig
from questlib.diffusion.sampling import denoise
from questlib.errors import ConfigError, EngineError
from questlib.integer.cpu import attention
from questlib.integer.cpu.layers import CpuLayer
from questlib.integer.cpu.products import saturates
from questlib.integer.cpu.quantizing import engine_name
from questlib.integer.engines import ENGINES, choose_engine, register
from questlib.integer.explain import one_output
from questlib.integer.form import integer_form
from questlib.integer.oracle import layer_forward
from questlib.integer.synthetic import random_layer
from questlib.kernels.library import kernels
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.preparation import prepare

# What runs a layer here: compiled kernels, or torch's operations where there is no compiler.
CPU_INT8 = engine_name(exact=False, compiled=kernels().library is not None)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def make_layer(
    kind, weight_bits, act_bits, *, seed, split=False, carrier=False, groups=1, token=False, **shape
) -> QuantLayer:
    """A layer with random weights and grids, two step groups."""
    torch.manual_seed(seed)
    layer = (
        torch.nn.Linear(**shape) if kind == "linear" else torch.nn.Conv2d(groups=groups, **shape)
    )
    channels = shape.get("in_features") or shape["in_channels"]
    shift = carrier and weight_bits <= 4 and groups == 1
    third = channels // 3 if split else None
    return random_layer(
        layer,
        weight_bits,
        act_bits,
        split=third,
        carrier=carrier,
        shift=shift,
        token=token,
        seed=seed,
    )[0]


CASES = [
    ("linear", dict(in_features=37, out_features=5)),
    ("linear", dict(in_features=64, out_features=33, bias=False)),
    ("conv", dict(in_channels=6, out_channels=7, kernel_size=3, padding=1)),
    ("conv", dict(in_channels=16, out_channels=8, kernel_size=3, stride=2, padding=1)),
    (
        "conv",
        dict(
            in_channels=9,
            out_channels=4,
            kernel_size=(1, 3),
            padding=(0, 2),
            dilation=(1, 2),
            bias=False,
        ),
    ),
    ("conv", dict(in_channels=12, out_channels=8, kernel_size=1)),
]
BITS = [(8, 8), (4, 8), (4, 4), (8, 4), (2, 3), (5, 7)]


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_layers(case, bits, split, seed):
    """Every format equals its simulation, the oracle's sums, and the reference bit for bit."""
    kind, shape = CASES[case]
    layer = make_layer(kind, *bits, seed=seed, split=split, carrier=bool(seed), **shape)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(3, 11, layer.in_features, generator=generator) if kind == "linear" else None
    x = torch.randn(2, layer.in_channels, 9, 8, generator=generator) if x is None else x
    form = integer_form(layer, "layer")
    engines = [
        CpuLayer(form, layer.input_quantizer.steps, **kw)
        for kw in ({}, {"exact": True}, {"split": True})
    ]
    for group in (0, 1):
        layer.input_quantizer.steps.select_group(group)
        expected, sums = layer(x), layer_forward(layer, x)[1]
        outs = [e(x) for e in engines]
        assert all(relative(y, expected) <= 1e-5 for y in outs)
        assert torch.equal(outs[0], outs[1]) or saturates()
        for engine in engines:
            assert all(torch.equal(a, b) for a, b in zip(engine.accumulators(x), sums, strict=True))
    if bits == (8, 8):
        assert "-split" in engines[2].engine and engines[1].engine == "reference"


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8), (8, 4), (5, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("case", [0, 1, 5])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("carrier", [False, True])
def test_layers_with_a_grid_a_token(case, bits, split, carrier):
    """Tokens of very different sizes, one of them all zeros."""
    kind, shape = CASES[case]
    layer = make_layer(kind, *bits, seed=case, split=split, carrier=carrier, token=True, **shape)
    generator = torch.Generator().manual_seed(9)
    x = (
        torch.randn(3, 11, 37 if case == 0 else 64, generator=generator)
        if kind == "linear"
        else None
    )
    x = torch.randn(2, layer.in_channels, 9, 8, generator=generator) if x is None else x
    x = x * torch.logspace(-3, 3, x.shape[1 if kind == "linear" else 2]).unsqueeze(-1)
    x.movedim(layer.input_quantizer.dim, -1)[0, 0] = 0.0
    form = integer_form(layer, "layer")
    assert form.token and form.format.endswith("token" + " carrier" * (carrier and bits[1] <= 4))
    engines = [
        CpuLayer(form, layer.input_quantizer.steps, **kw)
        for kw in ({}, {"exact": True}, {"split": True})
    ]
    for group in (0, 1):
        layer.input_quantizer.steps.select_group(group)
        expected, (y, sums) = layer(x), layer_forward(layer, x)
        outs = [e(x) for e in engines]
        assert all(relative(y, expected) <= 1e-5 for y in (*outs, y))
        assert torch.equal(outs[0], outs[1]) or saturates()
        for engine in engines:
            assert all(torch.equal(a, b) for a, b in zip(engine.accumulators(x), sums, strict=True))


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_groups_and_channels_last(weight_bits, exact):
    """Weights of 8 bits add what their zero points make of the sums of each group's channels."""
    shape = dict(in_channels=8, out_channels=12, kernel_size=3, groups=4, padding=1)
    layer = make_layer("conv", weight_bits, 8, seed=0, **shape)
    x = torch.randn(2, 8, 6, 6)
    form = integer_form(layer, "layer")
    assert (form.parts[0].compensation is not None) == (weight_bits == 8)
    engine = CpuLayer(form, layer.input_quantizer.steps, exact=exact)
    y = engine(x.to(memory_format=torch.channels_last))
    assert relative(y, layer(x)) <= 1e-5 and torch.equal(y, engine(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    found, expected = engine.accumulators(x), layer_forward(layer, x)[1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outside_the_integers(dtype):
    """The codes are those of the input as it is; only the output is rounded to `dtype`."""
    layer = make_layer(
        "conv", 8, 8, seed=0, in_channels=8, out_channels=12, kernel_size=3, padding=1
    )
    x = torch.randn(2, 8, 6, 6).to(dtype)
    y = CpuLayer(integer_form(layer, "layer"), layer.input_quantizer.steps)(x)
    assert y.dtype == dtype and relative(y.float(), layer(x.float())) <= 2 ** -(
        6 if dtype == torch.bfloat16 else 9
    )


TOKEN = {"act_granularity": "token"}


MODELS = [
    ("quest", 4, 4, {}),
    ("quest", 8, 8, {}),
    ("q-diffusion", 4, 8, {}),
    ("quest", 4, 4, TOKEN),
    ("quest", 4, 8, TOKEN),
]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def models(request, pipe, calib):
    preset, w, a, overrides = request.param
    config = QuantConfig.preset(
        preset,
        w,
        a,
        **overrides,
        adaround_iters=3,
        act_iters=2,
        tla_iters=3,
        cma_iters=3,
        batch_size=4,
        recon_samples=8,
        calib_batch=8,
    )
    fake = quantize(pipe.unet, config, calib)
    finetune(fake, pipe.unet, calib, config)
    return SimpleNamespace(
        fake=fake, cpu=convert(fake, "cpu"), reference=convert(fake, "reference")
    )


def test_a_whole_run_equals_the_reference_bit_for_bit(models, pipe):
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    runs = [denoise(m, pipe.scheduler, x, 5) for m in (models.cpu, models.reference, models.fake)]
    assert torch.equal(runs[0], runs[1])
    assert torch.isfinite(runs[0]).all()
    assert relative(runs[0], runs[2]) < 0.5  # codes may flip: see benchmarks/equality.py
    alone = denoise(models.cpu, pipe.scheduler, x[1:2], 5)
    assert torch.equal(alone, runs[0][1:2])  # integer sums do not depend on the batch


def test_the_model_stays_what_it_was(models):
    assert type(models.cpu) is type(models.fake)
    assert all(
        isinstance(layer, QuantLayer) for layer in quant_layers(models.fake).values()
    ) and not quant_layers(models.cpu)


def test_report(models):
    report = engine_report(models.cpu)
    attentions = sum(isinstance(m, QuantAttnProcessor) for m in models.fake.modules())
    count = len(quant_layers(models.fake)) + attentions
    assert report.engines() == {CPU_INT8: count}
    assert engine_report(models.fake).engines() == {"fake": count}
    assert len(report) == len(list(report)) == sum(report.formats().values()) == count
    assert all(row.checkpoint_bytes <= row.resident_bytes for row in report)


def test_report_as_text_and_as_a_frame(models):
    report = engine_report(models.cpu)
    frame = report.frame()
    assert list(frame.itertuples(index=False, name=None)) == [tuple(row) for row in report]
    totals = report.totals()
    assert sum(t.resident_bytes for t in totals) == frame["resident bytes"].sum()
    lines = str(report).splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    assert len(lines) == 1 + len(report) + len(totals) + 2  # two rules
    assert all(any(row.layer in line for line in lines) for row in report)


def test_report_of_a_plain_unet(pipe):
    report = engine_report(pipe.unet)
    assert report.engines() == {"float32": len(report)}
    size = sum(
        m.weight.nbytes
        for m in pipe.unet.modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    )
    assert sum(row.resident_bytes for row in report) == size


def test_time_rows_are_computed_once_and_bit_identical(models):
    table = models.cpu.time_embedding
    table.rows.clear()
    x, t = torch.randn(2, 3, 8, 8), models.cpu.quest_steps.timesteps[1]
    first = models.cpu(x, t).sample
    assert set(table.rows) == {int(t)}
    mixed = models.cpu.quest_steps.timesteps[:1].repeat(2)
    again = models.cpu(x, t).sample
    assert torch.equal(first, again)
    table.rows = {int(mixed[0]): None}
    steps = models.cpu.quest_steps
    # the timestep is unknown, as for a batch of several: the layer itself runs
    steps.select_group(steps.lookup(mixed[0]))
    direct = table(torch.ones(2, 16))
    table.rows.clear()
    steps.select(mixed[0])
    assert torch.equal(direct, table(torch.ones(2, 16)))


def test_time_rows_are_forgotten_with_the_device(models):
    table = models.cpu.time_embedding
    models.cpu(torch.randn(1, 3, 8, 8), models.cpu.quest_steps.timesteps[1])
    assert table.rows
    models.cpu.to("cpu")
    assert not table.rows


def test_from_pretrained(models, tmp_path):
    questlib.save_pretrained(models.fake, tmp_path)
    x, t = torch.randn(2, 3, 8, 8), models.fake.quest_steps.timesteps[2]
    expected = models.cpu(x, t).sample
    for engine in ("cpu", "reference", "auto"):
        assert torch.equal(questlib.from_pretrained(tmp_path, engine=engine)(x, t).sample, expected)
    half = questlib.from_pretrained(tmp_path, engine="cpu", dtype=torch.bfloat16)
    assert half(x.bfloat16(), t).sample.dtype == torch.bfloat16
    simulated = questlib.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert simulated(x.bfloat16(), t).sample.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="weights: engine cpu"):
        questlib.from_pretrained(tmp_path, engine="cpu", weights="int8")


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_attention_by_bytes_equals_attention_in_float(pipe, calib, fast, n, bits, monkeypatch):
    """Without kernels both ways multiply the same integers, as with them; also the reference's."""
    q = convert(quantize(pipe.unet, fast("quest", 4, bits), calib), "cpu")
    q.quest_steps.select_group(0)
    processor = next(m for m in q.modules() if isinstance(m, attention.CpuAttnProcessor))
    attn = SimpleNamespace(heads=4, scale=0.3)
    x = [torch.randn(2, n, 32) for _ in range(3)]
    for mask in (None, torch.randn(8, 1, n), torch.randn(8, n, n)):
        expected = processor.attend(attn, *x, mask)
        monkeypatch.setattr(processor, "compiled", False)
        assert torch.equal(processor.attend(attn, *x, mask), expected)
        monkeypatch.setattr(attention, "SMALL", 0)
        assert torch.equal(processor.attend(attn, *x, mask), expected)
        monkeypatch.setattr(processor, "exact", True)
        assert torch.equal(processor.attend(attn, *x, mask), expected)
        monkeypatch.undo()


def test_conditional_unet(fast):
    """Cross attention, several heads, a mask, as in Stable Diffusion."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    fake = prepare(unet, fast("quest", 4, 4, adaround=False), torch.arange(4))
    for act in act_quantizers(fake):
        for group in range(act.scale.shape[0]):
            middle = 0.0 if act.unsigned else 2.0 ** (act.bits - 1)
            scale = torch.full_like(act.scale[group], 1 / 255 if act.unsigned else 0.1)
            act.set_group(group, scale, torch.full_like(act.zero_point[group], middle))
        act.calibrated.fill_(True)
    fake.requires_grad_(False)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    outs = [
        m(x, 1, encoder_hidden_states=text, encoder_attention_mask=mask).sample
        for m in (fake, convert(fake, "cpu"), convert(fake, "reference"))
    ]
    assert torch.equal(outs[1], outs[2]) and relative(outs[1], outs[0]) < 1e-2


# ---- failure paths ----


def test_not_finite_input_names_the_layer(models):
    x = torch.zeros(1, 3, 8, 8)
    for bad in (float("nan"), float("inf")):
        x[0, 0, 0, 0] = bad
        with pytest.raises(EngineError, match="conv_in: the input has NaN or infinite"):
            models.cpu(x, 1)


def test_mixed_step_groups_are_refused(models):
    steps = models.cpu.quest_steps
    if steps.num_groups > 1:
        with pytest.raises(EngineError, match="one step group a call"):
            models.cpu(torch.zeros(2, 3, 8, 8), steps.timesteps[[0, -1]])


def test_overflow_is_refused_by_name():
    layer = make_layer("linear", 8, 8, seed=0, in_features=300_000, out_features=1)
    with pytest.raises(EngineError, match="middle: accumulators up to .* could overflow int32"):
        integer_form(layer, "middle")


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_softmax_that_is_not_quantized_has_no_integer_form(pipe, calib, fast, engine):
    fake = quantize(pipe.unet, fast("quest", 8, 8, softmax_bits=16), calib)
    with pytest.raises(
        EngineError, match="expected quantized q, k, v and softmax output; not quantized: .*probs"
    ):
        convert(fake, engine)
    mixed = convert(fake, engine, fallback=True)
    x, t = torch.randn(1, 3, 8, 8), fake.quest_steps.timesteps[0]
    assert relative(mixed(x, t).sample, fake(x, t).sample) < 1e-4


def test_free_scales_need_a_fallback_that_is_reported(pipe, calib, fast):
    fake = quantize(pipe.unet, fast("quest-release", 4, 4), calib)
    with pytest.raises(EngineError, match="free per-channel scales cannot run in integers"):
        convert(fake, "cpu")
    mixed = convert(fake, "cpu", fallback=True)
    assert "fake" in engine_report(mixed).engines()
    x, t = torch.randn(1, 3, 8, 8), fake.quest_steps.timesteps[0]
    assert relative(mixed(x, t).sample, fake(x, t).sample) < 1e-2
    half = convert(fake, "cpu", fallback=True, dtype=torch.bfloat16)
    out = half(x.bfloat16(), t).sample
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_wrong_engines(models, monkeypatch):
    with pytest.raises(ConfigError, match="engine: expected one of cpu"):
        convert(models.fake, "gpu")
    with pytest.raises(ConfigError, match="plain UNet2DModel"):
        convert(type(models.fake).from_config(models.fake.config), "cpu")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    saturates.cache_clear()
    with pytest.raises(EngineError, match="engine cpu needs torch with oneDNN"):
        convert(models.fake, "cpu")
    convert(models.fake, "reference")
    monkeypatch.undo()
    saturates.cache_clear()


# ---- the registry ----


def test_an_engine_that_is_registered_is_used(models, pipe, monkeypatch):
    """Adding one engine takes its description alone."""
    monkeypatch.setattr("questlib.integer.engines.ENGINES", dict(ENGINES))
    calls = []
    mine = replace(
        ENGINES["cpu"],
        name="mine",
        options=frozenset({"fuse"}),
        finish=lambda unet, options: calls.append(options["fuse"]),
        after_call=lambda unet: calls.append(type(unet)),
    )
    register(mine)
    assert choose_engine("mine") is mine
    unet = convert(models.fake, "mine", fuse=True)
    x, t = torch.randn(1, 3, 8, 8), models.fake.quest_steps.timesteps[1]
    assert torch.equal(unet(x, t).sample, models.cpu(x, t).sample)
    assert calls == [True, type(models.fake)]
    with pytest.raises(ConfigError):
        convert(models.fake, "mine", weights="int8")
    with pytest.raises(ConfigError):
        register(mine)


def test_auto_is_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine("auto") is ENGINES["cpu"]


def test_the_registry_loads_no_kernel_and_no_pandas():
    """Each engine's kernels are imported when they are first asked for."""
    code = (
        "import sys, questlib.integer.engines as e; e.ENGINES\n"
        "print('torch' in sys.modules)\n"
        "import questlib.integer.conversion, questlib.integer.report, questlib.integer.explain\n"
        "print([m for m in sys.modules if m == 'pandas' or m.endswith(('_kernels', '.runtime'))\n"
        "       and m.startswith(('pandas', 'questlib'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"], done.stderr


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_older_instruction_sets_are_exact(isa):
    """Without VNNI 8-bit products saturate: found out at load, and the layer is split."""
    code = (
        "import torch, test_integer_engine as t\n"
        "layer = t.make_layer('linear', 8, 8, seed=0, in_features=64, out_features=16)\n"
        "e = t.CpuLayer(t.integer_form(layer, 'x'), layer.input_quantizer.steps)\n"
        "layer.input_quantizer.steps.select_group(0); x = 9 * torch.randn(50, 64)\n"
        "assert torch.equal(e.accumulators(x)[0], t.layer_forward(layer, x)[1][0])\n"
        "print(t.saturates(), e.engine)"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    saturated, engine = done.stdout.split()
    assert ("-split" in engine) == (saturated == "True")


@pytest.mark.parametrize("case", [0, 3])
def test_one_output_number_by_number(case):
    kind, shape = CASES[case]
    layer = make_layer(kind, 4, 4, seed=1, carrier=True, **shape)
    layer.input_quantizer.steps.select_group(1)
    x = torch.randn(2, 3, 37) if kind == "linear" else torch.randn(2, 16, 9, 8)
    found = one_output(layer, x, output=2, position=4)
    assert int((found.a * found.w).sum()) == found.total
    assert abs(found.in_integers - found.simulated) < 1e-5
    assert len(found) == (37 if kind == "linear" else 16 * 9)
    assert found.a.abs().max() <= 120
    assert torch.equal(found.a, (found.code - found.zero_point) * found.multiplier)
    frame = found.frame()
    assert len(frame) == len(found) and frame["a w"].sum() == found.sums()["sum of a w"]
