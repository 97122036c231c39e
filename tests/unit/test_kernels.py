"""The compiled kernels: the bits of torch's operations, and what happens where there are none.

Layers and whole models on kernels are held against the oracle and the reference in
test_integer_engine.py; here each kernel is held against torch's path with odd sizes and layouts.
"""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_integer_engine import make_layer

import questlib
from questlib.errors import EngineError
from questlib.integer.cpu.attention import CpuAttnProcessor
from questlib.integer.cpu.layers import CpuLayer
from questlib.integer.cpu.quantizing import Sender
from questlib.integer.form import Grid, integer_form
from questlib.integer.softmax import exponential_, softmax_codes, sum_by_halves
from questlib.integer.synthetic import random_layer
from questlib.kernels import compiler, library, sums
from questlib.kernels.fake_quant import LEAST, layout, parameters_over
from questlib.quantization import attention
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.layers import QuantLayer
from questlib.quantization.primitives import LearnedQuant, fake_quant
from questlib.quantization.step_groups import StepGroups

pytestmark = pytest.mark.skipif(
    library.kernels().library is None, reason=f"no kernels: {library.kernels().reason}"
)


@pytest.fixture
def without(monkeypatch):
    """Run a function without kernels."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setenv(library.SWITCH, "1")
            return function(*args)

    return run


# ---- activations as bytes ----

SHAPES = [(5, 7), (3, 11, 37), (1, 300, 64), (2, 3, 5, 130), (40000, 3)]
IMAGES = [(2, 6, 9, 8), (1, 130, 5, 13), (3, 64, 1, 1), (2, 3, 65, 2), (4, 1, 7, 7)]


def grid(channels, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    zero = torch.randint(0, 16, (channels,), generator=g, dtype=torch.int32)
    if kind == "tensor":
        zero = torch.tensor([113], dtype=torch.int32)
        return Grid(torch.tensor([37.3]), -zero, 255 - zero, None, 1 / 37.3)
    m = torch.randint(1, 9, (channels,), generator=g, dtype=torch.int32)
    return Grid(11.7 / m, -zero, 15 - zero, m, 1 / 11.7)


def layouts(x, image):
    yield x
    if image:
        yield x.contiguous(memory_format=torch.channels_last)
        yield torch.cat([x, x], 1).narrow(1, x.shape[1] // 2, x.shape[1])
        wide = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)
        yield wide.narrow(1, x.shape[1] // 2, x.shape[1])
        yield torch.cat([x, x], 3)[..., : x.shape[3]]
    else:
        yield x.transpose(0, -1).contiguous().transpose(0, -1)
        if x.ndim == 3:
            yield x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("kind", ["tensor", "carrier"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, *IMAGES], ids=str)
def test_bytes_equal_torchs(shape, dtype, signed, kind):
    image = shape in IMAGES
    dim = 1 if image else -1
    own = grid(shape[dim], kind)
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    x.flatten()[:3] = torch.tensor([0.0, -0.0, 1e30 if dtype != torch.float16 else 6e4])
    kernel, plain = (Sender(own, dim, "layer", c, signed) for c in (True, False))
    for laid in layouts(x, image):
        found, expected = kernel(laid).bytes, plain(laid).bytes
        assert torch.equal(found, expected) and found.shape == laid.shape
        last = torch.channels_last if image else torch.contiguous_format
        assert found.is_contiguous(memory_format=last)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 11, 37), (2, 300, 64), (2, 19, 5, 9)], ids=str)
def test_token_grids_equal_torchs(shape, bits):
    """Small and large tokens, one of zeros, one of one sign."""
    dim = 1 if len(shape) == 4 else -1
    layer = torch.nn.Conv2d(shape[1], 4, 1) if dim == 1 else torch.nn.Linear(shape[-1], 4)
    layer, steps = random_layer(layer, 4, bits, token=True, carrier=bits == 4, shift=bits == 4)
    own = integer_form(layer, "layer").grids[0][0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-12, 3, shape[1 if dim == -1 else 2]).unsqueeze(-1)
    x.movedim(dim, -1)[0, 0] = 0.0
    x.movedim(dim, -1)[0, 1].abs_()
    for laid in layouts(x, dim == 1):
        found, expected = (Sender(own, dim, "layer", c)(laid) for c in (True, False))
        assert torch.equal(found.bytes, expected.bytes)
        assert torch.equal(found.scale, expected.scale)


def test_an_empty_batch():
    found = Sender(grid(7, "carrier"), -1, "layer", True)(torch.empty(0, 5, 7))
    assert found.bytes.shape == (0, 5, 7)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["tensor", "carrier"])
def test_what_is_not_finite_is_refused_wherever_it_stands(compiled, bad, kind):
    send = Sender(grid(37, kind), -1, "middle", compiled)
    for place in (0, 17, 9 * 37 - 1):
        x = torch.zeros(9, 37)
        x.view(-1)[place] = bad
        for laid in (x, x.T.contiguous().T, x.bfloat16()):
            with pytest.raises(EngineError, match="middle: the input has NaN or infinite"):
                send(laid)
    send(torch.full((9, 37), 3e38))  # large values are finite, though their sum is not


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_in_bfloat16(kind):
    """The kernel reads bfloat16 itself: the same output."""
    shape = dict(in_features=37, out_features=5)
    if kind == "conv":
        shape = dict(in_channels=9, out_channels=4, kernel_size=3, padding=1)
    layer = make_layer(kind, 4, 4, seed=1, carrier=True, split=True, **shape)
    layer.input_quantizer.steps.select_group(0)
    form = integer_form(layer, "layer")
    x = torch.randn((2, 11, 37) if kind == "linear" else (2, 9, 6, 5)).bfloat16()
    outs = [CpuLayer(form, layer.input_quantizer.steps, kernels=k)(x) for k in (True, False)]
    assert torch.equal(*outs) and outs[0].dtype == torch.bfloat16


# ---- sums of bytes ----

WINDOWS = [  # size, kernel, stride, padding, dilation
    ((9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((7, 12), (1, 3), (1, 2), (0, 2), (1, 2)),
    ((64, 65), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((5, 5), (5, 4), (3, 1), (4, 3), (1, 1)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("channels", [1, 37, 320])
def test_sums_under_a_window(window, channels):
    size, kernel, stride, padding, dilation = window
    generator = torch.Generator().manual_seed(channels)
    x = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    ones = torch.ones(1, channels, *kernel, dtype=torch.float64)
    expected = F.conv2d(x.double() - 113, ones, None, stride, padding, dilation)
    found = sums.window_sums(x, 113, kernel, stride, padding, dilation)
    assert found.dtype == torch.int32 and torch.equal(found.double(), expected)


@pytest.mark.parametrize("shape", [(5, 7), (3, 11, 37), (2, 300, 320), (0, 8)], ids=str)
def test_sums_of_rows(shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = (x.int() - 9).sum(-1, keepdim=True)
    assert torch.equal(sums.row_sums(x, 9), expected.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (300, 321)], ids=str)
def test_products_are_added_by_torchs_operations(dtype, shape):
    """Also NaN and infinity: a half keeps what they are."""
    y = torch.randn(shape).mul_(1e3).to(dtype)
    y[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    counts = torch.randint(-(2**26), 2**26, (shape[0], 1), dtype=torch.int32)
    factor = torch.randn(shape[1])
    expected = (y.float() + counts.float().mul_(0.3) * factor).to(dtype)
    found = sums.add_products(y.clone(), counts, 0.3, factor)
    assert torch.equal(found.nan_to_num(1.0), expected.nan_to_num(1.0))
    assert torch.equal(found.isnan(), expected.isnan())


# ---- attention ----


def test_the_exponential_and_the_sum():
    """Against float64: relative errors of a few units of the last place."""
    x = -torch.cat([torch.zeros(1), torch.logspace(-8, 1.93, 100_000)])
    exact = x.double().exp()
    assert ((exponential_(x.clone()) - exact).abs() / exact)[exact > 1e-3].max() < 1e-6
    assert ((exponential_(x.clone()) - exact).abs() / exact).max() < 2e-5
    assert exponential_(torch.tensor([0.0])) == 1.0
    for n in (1, 2, 3, 77, 4096, 5000):
        e = torch.rand(3, n)
        torch.testing.assert_close(
            sum_by_halves(e).double(), e.double().sum(-1, keepdim=True), rtol=1e-6, atol=0.0
        )


@pytest.mark.parametrize("high", [15, 255])
def test_softmax_codes_are_those_of_the_simulation(high):
    """At most one code in a thousand differs from torch's softmax, by one."""
    scores = 4 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    own = Grid(torch.tensor([900.0]), torch.tensor([0]), torch.tensor([high]), None, 1 / 900)
    expected = (scores.softmax(-1) * 900).round().clamp(0, high)
    found = softmax_codes(scores.clone(), own, "attention")
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() <= 1e-3
    alone = softmax_codes(scores[5:6].clone(), own, "attention")
    assert torch.equal(alone, found[5:6])


def processor(heads_dim, bits, kernels, exact=False, seed=0):
    """A processor with random grids; q, k, v of `bits`."""
    g = torch.Generator().manual_seed(seed)
    steps = StepGroups(torch.arange(2), torch.arange(2))
    steps.select_group(0)
    acts = []
    for name in ("q", "k", "v", "probs"):
        probs = name == "probs"
        channels = 1 if probs else heads_dim
        kind = "tensor" if probs or bits == 8 else "carrier"
        act = ActQuantizer(name, 8 if probs else bits, steps, channels, -1, kind, unsigned=probs)
        top = 2**act.bits - 1
        zero = torch.zeros(1) if probs else torch.randint(0, top, (channels,), generator=g).float()
        if bits == 8 and not probs:
            zero = zero[:1].expand(channels)
        ratio = None
        if act.carrier:
            ratio = torch.randint(1, 9, (channels,), generator=g).float()
        scale = torch.tensor([1 / 700 if probs else 6 / top])
        for group in range(2):
            act.set_group(group, scale, zero, ratio)
        act.calibrated.fill_(True)
        acts.append(act)
    return CpuAttnProcessor(attention.QuantAttnProcessor(*acts), "attn", exact, kernels)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "batch, heads, dim, n, m",
    [(1, 1, 3, 1, 1), (2, 3, 5, 9, 7), (2, 2, 40, 33, 77), (1, 4, 16, 64, 64), (1, 2, 80, 21, 130)]
    + [(1, 1, 160, 17, 1029), (1, 8, 24, 700, 800)],
)
def test_attention_equals_the_reference(batch, heads, dim, n, m, bits):
    kernel = processor(heads * dim, bits, True)
    plain = processor(heads * dim, bits, False)
    reference = processor(heads * dim, bits, None, exact=True)
    assert (kernel.engine, plain.engine) == ("cpu-int8", "cpu-int8-torch")
    attn = SimpleNamespace(heads=heads, scale=dim**-0.5)
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(batch, s, heads * dim, generator=g) for s in (n, m, m))
    full = torch.randn(batch * heads, n, m, generator=g)
    padded = torch.zeros(batch * heads, 1, m)
    padded[..., m // 2 + 1 :] = -float("inf")
    for mask in (None, full[:, :1], full, padded):
        found = kernel.attend(attn, q, k, v, mask)
        assert torch.equal(found, kernel.attend(attn, q, k, v, mask))
        assert torch.equal(found, reference.attend(attn, q, k, v, mask))
        assert torch.equal(found, plain.attend(attn, q, k, v, mask))
    half = kernel.attend(attn, q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, plain.attend(attn, q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_threads_change_nothing():
    """Neither their number, nor how heads are divided among them."""
    kernel = processor(48, 4, True)
    send = Sender(grid(37, "carrier"), -1, "layer", True)
    attn = SimpleNamespace(heads=2, scale=0.3)
    x = [torch.randn(1, 301, 48) for _ in range(3)]
    wide = torch.randn(3000, 37)
    before = torch.get_num_threads()
    outs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        outs.append((kernel.attend(attn, *x), send(wide).bytes))
    torch.set_num_threads(before)
    for out in outs[1:]:
        assert torch.equal(out[0], outs[0][0]) and torch.equal(out[1], outs[0][1])


@pytest.mark.parametrize("kernels", [True, False])
def test_attention_refuses_what_is_not_finite(kernels):
    attend = processor(8, 4, kernels).attend
    attn = SimpleNamespace(heads=2, scale=0.5)
    x = [torch.randn(1, 5, 8) for _ in range(3)]
    for i in range(3):
        bad = [v.clone() for v in x]
        bad[i][0, 3, 2] = float("nan")
        with pytest.raises(EngineError, match="attn: the input has NaN or infinite"):
            attend(attn, *bad)
    mask = torch.zeros(2, 5, 5)
    for bad in (float("nan"), float("inf")):
        mask[1, 4, 3] = bad
        with pytest.raises(EngineError, match="attn: a query has scores that are NaN"):
            attend(attn, *x, mask)
    mask[1, 4] = -float("inf")
    with pytest.raises(EngineError, match="none that is finite"):
        attend(attn, *x, mask)


# ---- fake quantization ----

FAKE = [
    ((256, 33, 9), (1, 1, 1)),
    ((256, 33, 9), (1, 1, 9)),
    ((4, 48, 20, 21), (1, 48, 1, 1)),
    ((4, 48, 20, 21), (4, 48, 1, 1)),
    ((4, 48, 20, 21), (4, 1, 1, 1)),
    ((4, 700, 31), (4, 1, 31)),
    ((4, 700, 31), (4, 700, 1)),
    ((320, 40, 3, 3), (320, 1, 1, 1)),
    ((70000,), (1,)),
]


@pytest.mark.parametrize("shape, own", FAKE, ids=str)
def test_fake_quantization_and_its_gradient_equal_torchs(shape, own, without):
    g = torch.Generator().manual_seed(0)
    scale = 0.02 + torch.rand(own, generator=g)
    zero = torch.randint(0, 16, own, generator=g).float()
    x = 4 * torch.randn(shape, generator=g)
    grad = torch.randn(shape, generator=g)
    assert x.numel() >= LEAST and layout(x.shape, scale.shape) is not None

    def both():
        leaf, learned = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = LearnedQuant.apply(leaf, learned, zero, 4, None)
        y.backward(grad)
        return y.detach(), fake_quant(x, scale, zero, 4), leaf.grad, learned.grad

    for found, expected in zip(both(), without(both), strict=True):
        assert torch.equal(found, expected)
    fixed = x.clone().requires_grad_()
    LearnedQuant.apply(fixed, scale, zero, 4, None).backward(grad)
    assert torch.equal(fixed.grad, both()[2])


def test_what_the_kernel_does_not_serve_is_left_to_torch():
    x, one = torch.randn(300, 300), torch.ones(1, 1)
    assert parameters_over(x, one, one, one, 4) is not None
    assert parameters_over(x.T, one, one, one, 4) is None
    assert parameters_over(x.double(), one, one, one, 4) is None
    assert parameters_over(x.bfloat16(), one, one, one, 4) is None
    assert parameters_over(x, torch.ones(300), one, one, 4) is not None
    assert layout(torch.Size([2, 3, 4, 5, 6]), torch.Size([2, 1, 4, 1, 6])) is None


# ---- compiling ----


def in_a_process(code, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LOAD = "from questlib.kernels.library import kernels; print(kernels().reason)"


def test_two_processes_compile_once(tmp_path):
    found = [in_a_process(LOAD, QUEST_KERNELS=str(tmp_path)) for _ in range(2)]
    for process in found:
        out, err = process.communicate(timeout=300)
        assert out.strip() == "None", err
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def fresh():
    """Kernels are loaded again in the test, and after it."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def failing_compiler(folder):
    path = folder / "c++"
    lines = [
        "#!/bin/sh",
        '[ "$1" = --version ] && echo 1.0 && exit',
        "echo no such flag >&2; exit 1",
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("case", ["no compiler", "fails", "hidden", "folder"])
def test_without_kernels_torch_does_it_and_says_so_once(case, tmp_path, monkeypatch, fresh):
    if case == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif case == "fails":
        monkeypatch.setenv("CXX", failing_compiler(tmp_path))
    if case == "folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("QUEST_KERNELS", str(tmp_path / "file" / "kernels"))
    else:
        monkeypatch.setenv("QUEST_KERNELS", str(tmp_path / "cache"))
    if case == "hidden":
        monkeypatch.setenv(library.SWITCH, "1")
    layer = make_layer("linear", 4, 4, seed=1, carrier=True, in_features=37, out_features=5)
    form = integer_form(layer, "layer")
    steps = layer.input_quantizer.steps
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engines = [CpuLayer(form, steps) for _ in range(2)]
    messages = [str(w.message) for w in told if w.category is library.KernelWarning]
    expected = {
        "no compiler": "no C\\+\\+ compiler: expected one of no-such-compiler",
        "fails": "no such flag",
        "folder": "cannot be kept in",
    }
    if case == "hidden":
        assert not messages
    else:
        assert len(messages) == 1
        pytest.raises(compiler.NoCompilerError, compiler.compiled).match(expected[case])
    assert all(e.engine == "cpu-int8-torch" for e in engines)
    layer.input_quantizer.steps.select_group(0)
    x = torch.randn(4, 37)
    assert torch.equal(engines[0](x), CpuLayer(form, steps, exact=True)(x))
    assert not list(tmp_path.glob("cache/*.so"))


def test_a_damaged_library_is_named(tmp_path):
    code = (
        "from questlib.kernels import compiler, library\n"
        "path = compiler.compiled(); path.write_bytes(b'no library')\n"
        "print(library.kernels().reason)"
    )
    out, err = in_a_process(code, QUEST_KERNELS=str(tmp_path)).communicate(timeout=300)
    assert "cannot be loaded" in out and "delete it" in out, err
    assert "KernelWarning" in err


def test_the_cache_tells_processors_apart(tmp_path, monkeypatch):
    """A folder in a shared home serves machines of several kinds."""
    monkeypatch.setenv("QUEST_KERNELS", str(tmp_path))
    first = compiler.compiled()
    monkeypatch.setattr(compiler, "processor", lambda: "another")
    assert compiler.compiled() != first and first.is_file()


@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v3"])
def test_older_processors(arch, tmp_path):
    """Without VNNI, and without AVX2, the same bits."""
    if " avx2 " not in f"{compiler.processor()} " or not compiler.processor().startswith("x86_64"):
        pytest.skip("another kind of processor")
    code = (
        "import test_kernels as t, questlib\n"
        "for case in [(2, 3, 5, 9, 7), (1, 2, 80, 21, 130)]:\n"
        "    for bits in (4, 8):\n"
        "        t.test_attention_equals_the_reference(*case, bits)\n"
        "t.test_bytes_equal_torchs((2, 6, 9, 8), t.torch.float32, False, 'carrier')\n"
        "t.test_token_grids_equal_torchs((3, 11, 37), 4)\n"
        "print(t.library.kernels().reason)"
    )
    environment = {"QUEST_KERNELS": str(tmp_path), "QUEST_KERNELS_ARCH": arch}
    out, err = in_a_process(code, **environment).communicate(timeout=300)
    assert out.strip() == "None", err


# ---- whole models ----


def test_a_whole_model_with_and_without_kernels(pipe, calib, fast, without):
    fake = questlib.quantize(pipe.unet, fast("quest", 4, 4), calib)
    assert any(isinstance(m, QuantLayer) for m in fake.modules())
    models = [questlib.convert(fake, "cpu"), without(questlib.convert, fake, "cpu")]
    names = [set(questlib.engine_report(m).engines()) for m in models]
    assert names == [{"cpu-int8"}, {"cpu-int8-torch"}]
    x, t = torch.randn(3, 3, 8, 8), fake.quest_steps.timesteps[1]
    assert torch.equal(models[0](x, t).sample, models[1](x, t).sample)
