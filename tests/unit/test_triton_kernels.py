"""The Triton engine in the interpreter: accumulators equal to the oracle's, bit for bit.

Outputs are equal to the layer's own simulation.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

import copy
import json

import pytest
import torch
from torch import nn

import questlib
from questlib import quantize
from questlib.errors import EngineError
from questlib.integer.attention_form import attention_form
from questlib.integer.form import WeightPart, integer_form
from questlib.integer.oracle import layer_forward
from questlib.integer.synthetic import GROUPS, random_layer
from questlib.integer.triton import packing, products, quantizing, runtime, tiles
from questlib.integer.triton.attention import TritonAttention
from questlib.integer.triton.flags import check_finite
from questlib.integer.triton.layers import TritonLayer, serves
from questlib.integer.triton.tile_table import table_of
from questlib.integrity import digest_of_json
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.attention import QuantAttnProcessor
from questlib.quantization.model import quant_layers
from questlib.quantization.step_groups import StepGroups

pytestmark = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)

H100 = tiles.Gpu(132, 227 << 10, table_of((9, 0)))
A100 = tiles.Gpu(108, 163 << 10, table_of((8, 0)))


def relative(a, b):
    return ((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def make_layer(module, w_bits, a_bits, carrier=False, split=None, **choices):
    return random_layer(module, w_bits, a_bits, carrier=carrier, split=split, **choices)


def compare(layer, steps, x, weights="packed"):
    """Assert both promises in every step group; the engine's layer back."""
    engine = TritonLayer(integer_form(layer, "layer"), steps, weights)
    for group in range(GROUPS):
        steps.select_group(group)
        _, accs = layer_forward(layer, x)
        found = engine.accumulators(x)
        assert len(found) == len(accs)
        for a, b in zip(found, accs, strict=True):
            assert a.dtype == torch.int32
            assert torch.equal(a.long(), b)
        assert relative(engine(x), layer(x)) <= 1e-5
    check_finite(engine)
    return engine


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize(
    ("w", "a", "carrier"), [(4, 4, True), (4, 8, False), (8, 8, False), (3, 6, False), (8, 4, True)]
)
def test_linear(w, a, carrier, weights):
    """Channels and rows that are no multiples of any block."""
    layer, steps = make_layer(nn.Linear(75, 70), w, a, carrier)
    engine = compare(layer, steps, torch.randn(2, 37, 75) * 2, weights)
    assert engine.kind == (weights if w <= 4 else "int8")
    codes = 70 * 128 // (2 if engine.kind == "packed" else 1)
    assert engine.parts[0].weight.numel() == codes


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize(
    ("w", "a", "carrier", "shift"),
    [
        (4, 4, True, True),
        (4, 4, True, False),
        (4, 8, False, False),
        (8, 8, False, False),
        (8, 4, True, False),
        (4, 6, False, False),
    ],
)
@pytest.mark.parametrize("split", [None, 80])
def test_a_grid_a_token(w, a, carrier, shift, weights, split):
    """Tokens of very different sizes, one of them all zeros; linears and 1 x 1 convolutions."""
    torch.manual_seed(0)
    for module, shape in (
        (nn.Linear(150, 20), (2, 19, 150)),
        (nn.Conv2d(150, 20, 1), (2, 150, 5, 4)),
    ):
        layer, steps = make_layer(module, w, a, carrier, split, shift=shift, token=True)
        x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2]).unsqueeze(-1)
        x.movedim(layer.input_quantizer.dim, -1)[0, 0] = 0.0
        engine = compare(layer, steps, x, weights)
        assert engine.format.endswith("token" + " carrier" * carrier)


@pytest.mark.parametrize("seed", range(10))
def test_convolutions_of_random_geometry(seed):
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(0, len(values), (1,), generator=g))]

    conv = nn.Conv2d(
        pick(3, 40, 64, 70),
        pick(4, 33, 64),
        pick(1, 3, (3, 2)),
        stride=pick(1, 2, (2, 1)),
        padding=pick(0, 1, (0, 2)),
        bias=pick(True, False),
    )
    w, a, carrier = pick((4, 4, True), (4, 8, False), (8, 8, False), (2, 5, False), (8, 4, True))
    layer, steps = make_layer(conv, w, a, carrier, seed=seed)
    x = torch.randn(pick(1, 2), conv.in_channels, pick(5, 8), pick(4, 9), generator=g) * 2
    if pick(True, False):
        x = x.to(memory_format=torch.channels_last)
    engine = compare(layer, steps, x, pick("packed", "int8"))
    assert engine(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("w", "a"), [(4, 4), (8, 8), (4, 8)])
def test_split_shortcuts(w, a):
    layer, steps = make_layer(nn.Conv2d(48, 20, 1), w, a, split=30)
    engine = compare(layer, steps, torch.randn(2, 48, 5, 4))
    assert len(engine.accumulators(torch.randn(1, 48, 2, 2))) == 2


@pytest.mark.parametrize("weights", ["packed", "int8"])
@pytest.mark.parametrize(
    "module", [nn.Linear(150, 32), nn.Conv2d(70, 8, 3, padding=1)], ids=["linear", "conv"]
)
def test_weights_shifted_by_carrier_blocks(module, weights):
    """The columns are put in order of their shift, so that 4-bit codes stay packed."""
    layer, steps = make_layer(copy.deepcopy(module), 4, 4, carrier=True, shift=True)
    x = torch.randn(1, 70, 4, 4) if module.weight.ndim == 4 else torch.randn(20, 150)
    engine = compare(layer, steps, x, weights)
    assert engine.kind == weights
    assert len(engine.parts[0].ends) == (3 if weights == "packed" else 0)
    scale = torch.rand(len(x), x.shape[1]) + 0.5
    shift = torch.randn(len(x), x.shape[1])
    if module.weight.ndim == 4:
        plain = engine(nn.functional.silu(x * scale[..., None, None] + shift[..., None, None]))
        assert relative(engine(x, norm=(scale, shift), silu=True), plain) <= 0.02


def test_a_long_reduction_shared_by_several_programs(monkeypatch):
    config = tiles.Config(64, 64, 32, 4, 1, split=3)
    monkeypatch.setattr(tiles, "INTERPRETED", [config])
    layer, steps = make_layer(nn.Conv2d(40, 20, 3, padding=1), 8, 8)
    for _ in range(2):  # what counts the programs is as it was
        compare(layer, steps, torch.randn(1, 40, 6, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype):
    """Codes are those of the input as float32; the output is rounded once."""
    layer, steps = make_layer(nn.Conv2d(20, 24, 3, padding=1), 4, 8)
    x = torch.randn(1, 20, 5, 5).to(dtype)
    y = TritonLayer(integer_form(layer, "layer"), steps)(x)
    assert y.dtype == dtype
    expected = layer(x.float())
    assert torch.equal(y, expected.to(dtype)) or relative(y, expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize(("w", "a"), [(4, 4), (8, 8)])
def test_every_layer_of_a_quest_model(pipe, calib, fast, w, a):
    q = quantize(pipe.unet, fast("quest", w, a), calib)
    seen = {}
    for name, layer in quant_layers(q).items():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i[0], o)))
    engines = {
        n: TritonLayer(integer_form(m, n), q.quest_steps) for n, m in quant_layers(q).items()
    }
    with torch.no_grad():
        q(calib.x[4, :1], calib.t[4])
    for name, (x, out) in seen.items():
        _, accs = layer_forward(q.get_submodule(name), x)
        assert all(
            torch.equal(f.long(), e)
            for f, e in zip(engines[name].accumulators(x), accs, strict=True)
        ), name
        assert relative(engines[name](x), out) <= 1e-5, name
    kinds = [e.kind for e in engines.values()]
    assert kinds.count("packed") > 0 if w == 4 else set(kinds) == {"int8"}


def test_groupnorm_and_silu_are_fused_into_quantization():
    """Equal to normalizing first, but for inputs whose rounding lies on an edge."""
    layer, steps = make_layer(nn.Conv2d(16, 8, 3, padding=1), 4, 8)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    x, scale, shift = torch.randn(2, 16, 5, 5), torch.rand(2, 16) + 0.5, torch.randn(2, 16)
    plain = engine(nn.functional.silu(x * scale[..., None, None] + shift[..., None, None]))
    assert relative(engine(x, norm=(scale, shift), silu=True), plain) <= 0.02
    assert relative(engine(nn.functional.silu(x)), engine(x, silu=True)) <= 0.02


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_affine_form_of_a_groupnorm(channels_last):
    norm = nn.GroupNorm(4, 40)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 40, 9, 7) * 3 + 5
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    scale, shift = quantizing.group_norm_affine(x, norm.weight, norm.bias, 4, norm.eps)
    assert relative(x * scale[..., None, None] + shift[..., None, None], norm(x)) <= 1e-5


@pytest.mark.parametrize("split", [None, 6])
def test_layers_run_under_torch_compile(split):
    layer, steps = make_layer(nn.Conv2d(16, 8, 1), 4, 8, split=split)
    engine, x = TritonLayer(integer_form(layer, "layer"), steps), torch.randn(2, 16, 4, 4)
    compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
    for group in range(GROUPS):
        steps.select_group(group)
        assert torch.equal(compiled(x), engine(x))


def test_inputs_without_rows_or_in_slices():
    layer, steps = make_layer(nn.Linear(64, 8), 4, 8)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    assert engine(torch.randn(0, 64)).shape == (0, 8)
    wide = torch.randn(6, 128)
    assert torch.equal(engine(wide[::2, :64]), engine(wide[::2, :64].contiguous()))
    assert torch.equal(engine(wide.T[:64].T), engine(wide[:, :64]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_is_reported_once_by_name(bad):
    layer, steps = make_layer(nn.Conv2d(8, 4, 3), 4, 8)
    model = nn.Sequential(
        TritonLayer(integer_form(layer, "first"), steps),
        TritonLayer(integer_form(layer, "second"), steps),
    )
    x = torch.randn(1, 8, 4, 4)
    x[0, 3, 2, 1] = bad
    model[0](torch.randn(1, 8, 4, 4))
    model[1](x)
    with pytest.raises(EngineError, match="second: its input was not finite"):
        check_finite(model)
    check_finite(model)


def test_what_is_not_served_is_named():
    layer, steps = make_layer(nn.Conv2d(8, 4, 3, dilation=2), 4, 8)
    form = integer_form(layer, "middle.conv")
    assert "dilation" in serves(form)
    with pytest.raises(EngineError, match="middle.conv: engine triton: expected no dilation"):
        TritonLayer(form, steps)
    layer, steps = make_layer(nn.Conv2d(8, 4, 3), 4, 8)
    form = integer_form(layer, "middle.conv")
    with pytest.raises(
        EngineError, match="middle.conv: weights: expected 'packed' or 'int8', found 'int4'"
    ):
        TritonLayer(form, steps, "int4")
    engine = TritonLayer(form, steps)
    with pytest.raises(EngineError, match="middle.conv: expected 8 input channels, found 7"):
        engine(torch.randn(1, 7, 4, 4))
    with pytest.raises(
        EngineError,
        match="middle.conv: expected float32, float16 or bfloat16 input, found torch.float64",
    ):
        engine(torch.randn(1, 8, 4, 4).double())
    steps.select_group(torch.tensor([0, 1]))
    with pytest.raises(
        EngineError, match="middle.conv: integer execution takes one step group a call"
    ):
        engine(torch.randn(2, 8, 4, 4))


def test_packed_weights_are_an_eighth_of_float32():
    layer, steps = make_layer(nn.Linear(640, 640), 4, 8)
    form = integer_form(layer, "layer")
    packed, wide = TritonLayer(form, steps), TritonLayer(form, steps, "int8")
    sizes = [of.parts[0].weight.nbytes for of in (packed, wide)]
    assert sizes[0] * 8 == sizes[1] * 4 == layer.weight.nbytes
    assert packed.resident_bytes < 0.14 * layer.weight.nbytes


def test_candidate_tiles_serve_every_shape():
    for m in (1, 77, 4096, 65536):
        for o in (4, 320, 10240):
            for span in (32, 64, 96, 160, 320, 1280):
                for taps in (1, 9):
                    found = tiles.fitting(m, o, span, taps, True, H100)
                    assert found and all(span % c.bk == 0 for c in found), (m, o, span)
    assert tiles.fitting(64, 1280, 1280, 9, False, H100)[0].split > 1  # few tiles, a long reduction
    assert all(c.split == 1 for c in tiles.fitting(65536, 1280, 1280, 1, False, H100))


@pytest.mark.parametrize(("o", "most", "most_split"), [(320, 128, 64), (150, 32, 32)])
def test_tiles_fit_the_shared_memory_and_the_registers(o, most, most_split):
    for gpu in (H100, A100):
        own = most if gpu is H100 else min(most, 64)
        for packed in (True, False):
            found = [c for c in gpu.table.tiles if tiles.serves(c, o, packed, gpu)]
            halves = (c._replace(split=2) for c in found)
            split = [c for c in halves if tiles.serves(c, o, packed, gpu)]
            assert max(c.bm * c.bn // (32 * c.warps) for c in found) <= own
            assert max(c.bm * c.bn // (32 * c.warps) for c in split) <= most_split
    large = tiles.Config(256, 128, 128, 8, 3)
    assert tiles.serves(large, 320, True, H100)
    assert not tiles.serves(large, 320, True, A100)


def pretend(monkeypatch, capability, compilers=()):
    """A machine with one GPU, and these compilers."""
    monkeypatch.setattr(runtime, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("shutil.which", lambda name: name if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)


def test_a_machine_that_lacks_something_is_told_what(monkeypatch):
    pretend(monkeypatch, (9, 0), ["gcc"])
    runtime.require_engine()
    pretend(monkeypatch, (8, 9))
    with pytest.raises(EngineError, match="needs a C compiler, found neither gcc nor clang"):
        runtime.require_engine()
    monkeypatch.setenv("CC", "/opt/cc")
    runtime.require_engine()
    pretend(monkeypatch, (7, 5), ["gcc"])
    with pytest.raises(EngineError, match=r"8\.0 or newer .*, found Tesla T4 with 7\.5; engine"):
        runtime.require_engine()
    # What the whole library says, before any long work.
    with pytest.raises(EngineError, match="compute capability"):
        questlib.from_pretrained("no-such-folder", engine="triton")


def test_without_gpu_or_triton_the_reason_is_given(monkeypatch):
    def too_old():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020).\nGet"
        )

    pretend(monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "init", too_old)
    says = r"needs an NVIDIA GPU, found none \(The NVIDIA driver .* too old \(found version 12020\)"
    with pytest.raises(EngineError, match=says):
        runtime.require_engine()
    layer, steps = make_layer(nn.Linear(8, 4), 4, 8)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        engine(torch.randn(2, 8))
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(EngineError, match="expected the package triton"):
        runtime.require_engine()


def test_chosen_tiles_are_remembered_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test/1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    two = list(H100.table.tiles[:2])
    times = dict(zip(two, (2.0, 1.0), strict=True))
    monkeypatch.setattr(tiles.ConfigCache, "seconds", lambda self, config, run: times[config])
    assert tiles.ConfigCache().choose("key", lambda: two, lambda c: None) == two[1]
    times[two[0]] = 0.0
    assert tiles.ConfigCache().choose("key", lambda: two, lambda c: None) == two[1]
    own = next(tmp_path.rglob("*.json"))
    whole = json.loads(own.read_text())
    other_gpu = whole | {"about": whole["about"] | {"gpu": "NVIDIA-Test-2"}}
    other_triton = whole | {"about": whole["about"] | {"triton": "0.0"}}
    no_such_tile = whole | {"tiles": {"key": [1, 2, 3, 4, 5, 6]}}
    for other in (other_gpu, other_triton, no_such_tile):
        # Saved as it is, by another.
        other["digest"] = digest_of_json({k: v for k, v in other.items() if k != "digest"})
    another_tile = whole | {"tiles": {"key": list(two[0])}}
    others = (other_gpu, other_triton, no_such_tile, another_tile)
    damaged = ("{", "[]", "{}", *map(json.dumps, others))
    for text in damaged:
        own.write_text(text)
        with pytest.warns(UserWarning, match="ignored .*; the kernels are tuned again"):
            assert tiles.ConfigCache().choose("key", lambda: two, lambda c: None) == two[0]
    assert json.loads(own.read_text())["tiles"] == {"key": list(two[0])}


def test_processes_keep_each_others_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test/1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles.ConfigCache, "seconds", lambda self, config, run: 1.0)
    two = list(H100.table.tiles[:2])
    processes = [tiles.ConfigCache() for _ in range(2)]
    for process in processes:
        process.path = process.load()  # before the other one has written
    for i, process in enumerate(processes):
        process.choose(f"key {i}", lambda: two, lambda c: None)
    third = tiles.ConfigCache()
    third.load()
    assert set(third.chosen) == {"key 0", "key 1"}


def test_what_32_bits_do_not_reach_is_refused_before_a_launch():
    room = torch.empty(2**31 + 512, dtype=torch.int8)  # never written, and so never in memory
    far = room.as_strided((2, 2, 2, 64), (2**31, 128, 64, 1))
    table, flag = torch.zeros(4, 1), torch.zeros(1, dtype=torch.int32)
    norm = torch.ones(64)
    near = torch.zeros(2, 16, 64, dtype=torch.int8)
    calls = (
        lambda x: quantizing.quantize(x, table, flag, 15, [0, 0], False),
        lambda x: quantizing.quantize_rows(x[:, 0], [table], [], flag, 15, False),
        lambda x: quantizing.group_norm_affine(x.permute(0, 3, 1, 2), norm, norm, 4, 1e-5),
        lambda x: products.integer_attention(
            x[:, 0], near, near.mT, norm, 8, [0, 0], 1.0, 255.0, 255, torch.float32
        ),
    )
    for call in calls:
        with pytest.raises(EngineError, match="too large for 32-bit indices; take a smaller batch"):
            call(far)
    # Enough images for a product whose output is too large; nothing is allocated on "meta".
    with pytest.raises(EngineError, match=r"\[70000, 64, 64, 8\] is too large"):
        runtime.check_size(torch.empty(70000, 64, 64, 8, device="meta"))


def test_operators_are_well_formed_for_torch_compile():
    layer, steps = make_layer(nn.Conv2d(8, 4, 3, padding=1), 8, 8)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    x = torch.randn(1, 4, 4, 8)
    part = engine.parts[0]
    args = (x, part.table[0], engine.flag, engine.levels, [1, 1], True)
    torch.library.opcheck(
        torch.ops.questlib.quantize, args, test_utils=("test_schema", "test_faketensor")
    )
    a, sums, _ = quantizing.quantize(*args)
    tables = (part.scale[0], engine.bias, None, part.correction[0], part.compensation)
    args = (a, part.weight, *tables, sums, [3, 3], [1, 1], [], x.dtype, engine.arrived)
    torch.library.opcheck(
        torch.ops.questlib.integer_gemm, args, test_utils=("test_schema", "test_faketensor")
    )


def attention_pair(bits, p_bits, heads=2, dim=20):
    """(engine, a simulation by fake quantization: q, k, v -> out) with random grids."""
    steps = StepGroups(torch.arange(4), torch.tensor([0, 0, 1, 1]))
    width = heads * dim
    kind = "carrier" if bits <= 4 else "tensor"
    q, k, v = (ActQuantizer(x, bits, steps, width, -1, kind, shifts=x == "v") for x in "qkv")
    probs = ActQuantizer("probs", p_bits, steps, 1, -1, unsigned=True)
    acts = (q, k, v, probs)
    e = torch.where(torch.arange(width) < 20, 0, 1)  # of v
    g = torch.Generator().manual_seed(bits)
    for group in range(GROUPS):
        for act in acts[:3]:
            ratio = shift = None
            if act.carrier:
                ratio = torch.randint(1, 9, (width,), generator=g).float()
            if act.carrier and act is v:
                ratio = torch.where(e == 0, ratio, ratio.clamp_min(5) * 2)
                shift = e
            zero = torch.full((width,), float(2 ** (bits - 1) + group - 1))
            scale = torch.full((1,), (0.15 if bits <= 4 else 4.0) / 2**bits)
            act.set_group(group, scale, zero, ratio, shift)
        probs.set_group(group, torch.full((1,), 0.15 / (2**p_bits - 1)), torch.zeros(1))
    for act in acts:
        act.calibrated.fill_(True)

    def split(x):  # [B, N, heads * dim] -> [B, heads, N, dim]
        return x.unflatten(-1, (heads, dim)).transpose(1, 2)

    def simulate(query, key, value):
        scores = split(q(query)) @ split(k(key)).mT * dim**-0.5
        return (probs(scores.softmax(-1)) @ split(v(value))).transpose(1, 2).flatten(2)

    form = attention_form(QuantAttnProcessor(*acts), "middle.attention")
    return TritonAttention(form.name, form.grids, form.v_shift, steps), simulate, steps


@pytest.mark.parametrize(("bits", "p_bits"), [(4, 8), (8, 8), (4, 4), (6, 8)])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (9, 77)])
@torch.no_grad()
def test_attention(bits, p_bits, queries, keys):
    """Equal to the simulation, but for probabilities on an edge of rounding.

    The two softmaxes differ in their last bit. One probability that flips is 2.8% of the smallest
    case's outputs.
    """
    engine, simulate, steps = attention_pair(bits, p_bits)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 40, generator=g) for n in (queries, keys, keys))
    for group in range(GROUPS):
        steps.select_group(group)
        expected = simulate(q, k, v)
        error = (engine.attend(q, k, v, 2, 20**-0.5) - expected).abs() / expected.abs().max()
        assert (error > 1e-5).float().mean() < 0.02 and error.max() < 0.05
    check_finite(engine)
    q[0, 0, 0] = float("nan")
    engine.attend(q, k, v, 2, 1.0)
    with pytest.raises(EngineError, match="middle.attention: its input was not finite"):
        check_finite(engine)


def test_tables_keep_their_precision_when_the_model_is_cast():
    layer, steps = make_layer(nn.Linear(40, 8), 4, 4, carrier=True)
    engine = TritonLayer(integer_form(layer, "layer"), steps)
    x, table = torch.randn(5, 40), engine.parts[0].table.clone()
    y = engine(x)
    nn.Sequential(engine).half().to("cpu", torch.bfloat16)
    assert engine.parts[0].table.dtype == torch.float32
    assert torch.equal(engine.parts[0].table, table)
    assert torch.equal(engine(x), y)


def test_weights_are_packed_where_their_codes_have_four_bits():
    """-14..14 in steps of 2 has four bits once halved, as its shift says; an odd step has not."""
    weight = (torch.arange(-7, 8, dtype=torch.int8) * 2)[:12].reshape(3, 4)
    weight[0, 0] = -14
    weight[1:, 0] = 14
    ones = torch.ones(4, dtype=torch.int64)
    part = WeightPart(0, 4, weight, None, torch.ones(3), ones)
    assert packing.packable(part)
    assert torch.equal(packing.unshifted(part), weight.short() // 2)
    assert not packing.packable(part._replace(shift=0 * ones))
    assert not packing.packable(part._replace(compensation=torch.ones(3)))
