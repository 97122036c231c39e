"""Rotation, smoothing and low-rank branches: what stands before and beside linear layers."""

from __future__ import annotations

import pytest
import tiny_pipelines as tiny
import torch
import torch.nn.functional as F

import questlib
from questlib import QuantConfig, calibrate, convert, finetune, from_pretrained, quantize
from questlib.baselines.low_rank_branch import STRENGTHS, Inputs, divisors, fit
from questlib.errors import CheckpointError
from questlib.integer.modules import IntegerLayer, TransformedLayer
from questlib.integrity import read_tensors, write_tensors
from questlib.quantization.layers import QuantLayer
from questlib.quantization.model import act_quantizers, quant_layers, set_mode
from questlib.quantization.primitives import fake_quant
from questlib.quantization.range_search import choose_qparams
from questlib.quantization.transforms import Transform, hadamard, largest_block

LATER = ("svdquant", "rotation", "svdquant-quest", "rotation-quest")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_row(x: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Quantized with a range for each row."""
    scale, zero = choose_qparams(x, x.amin(1), x.amax(1), bits, "minmax")
    return fake_quant(x, scale[:, None], zero[:, None], bits)


def power(x: torch.Tensor) -> float:
    return x.pow(2).mean().item()


@pytest.fixture(scope="module")
def text():
    """A UNet with cross-attention and feed-forward layers, and its calls."""
    pipe = tiny.class_conditional(tokens=3)
    return pipe, calibrate(pipe, 6, 3, seed=0, guidance_scale=2.0)


# ---- the rotation ----


@pytest.mark.parametrize(("channels", "block"), [(12, 4), (16, 16), (96, 32), (7, 1)])
def test_the_rotation_is_orthonormal_and_its_own_inverse(channels, block):
    assert largest_block(channels) == block
    x = seeded(5, channels)
    turned = hadamard(x, block)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(hadamard(turned, block), x)
    matrix = hadamard(torch.eye(channels), block)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels))
    assert set((matrix.abs() * block**0.5).round(decimals=4).unique().tolist()) <= {0.0, 1.0}


def test_a_rows_rotation_does_not_depend_on_the_batch():
    x = seeded(33, 64)
    assert torch.equal(hadamard(x, 64)[7], hadamard(x[7:8], 64)[0])


def test_a_rotation_spreads_an_outlier():
    """QuaRot's idea: one large channel takes all the range, until it is shared by its block."""
    x = seeded(256, 64)
    x[:, 5] *= 50
    plain = power(by_row(x) - x)
    turned = hadamard(x, 64)
    rotated = power(by_row(turned) - turned)
    assert rotated < plain / 4


def test_scores_of_rotated_heads_stay(text):
    pipe, calib = text
    config = QuantConfig.preset("rotation", 4, 4, adaround=False, calib_batch=8)
    unet = quantize(pipe.unet, config, calib)
    attentions = [m for m in unet.modules() if hasattr(m, "to_q") and hasattr(m, "processor")]
    assert attentions
    for attn in attentions:
        processor = attn.processor
        q, k = seeded(2, 5, attn.to_q.out_features), seeded(2, 3, attn.to_q.out_features, seed=1)
        turned = processor.turned(attn, q, k)
        assert not torch.equal(turned[0], q)

        def scores(query, key, attn=attn):
            heads = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key))
            query, key = heads
            return query @ key.transpose(-1, -2)

        torch.testing.assert_close(scores(*turned), scores(q, k), rtol=1e-4, atol=1e-4)


# ---- SVDQuant ----


def test_the_branch_takes_the_largest_singular_values():
    """A weight that is of low rank but for noise: what is left needs a far smaller range."""
    torch.manual_seed(0)
    weight = 3 * seeded(64, 4) @ seeded(4, 64, seed=1) + 0.05 * seeded(64, 64, seed=2)
    transform = Transform(64, 64, rotation=False, rank=4, smoothing=False)
    transform.set_branch(weight)
    assert transform.up.dtype == transform.down.dtype == torch.float16
    rest = transform.weight(weight)
    assert power(rest) < 1e-3 * power(weight)
    # Eckart and Young: no product of this rank is closer, but for what 16 bits round.
    least = torch.linalg.svdvals(weight)[4:].pow(2).sum().item() / weight.numel()
    assert power(rest) == pytest.approx(least, rel=0.05)
    plain = power(by_row(weight) - weight)
    assert power(by_row(rest) - rest) < plain / 100


def test_the_rank_is_at_most_a_quarter():
    assert len(Transform(96, 384, rotation=False, rank=32, smoothing=False).down) == 24
    assert len(Transform(384, 384, rotation=False, rank=32, smoothing=False).down) == 32
    assert Transform(3, 64, rotation=False, rank=32, smoothing=False).down is None


def test_smoothing_moves_an_outlier_into_the_weight():
    weight = seeded(8, 16)
    largest = torch.ones(16)
    largest[3] = 100.0
    first, *others = divisors(weight, largest, smoothing=True)
    assert torch.equal(first, torch.ones(16)) and len(others) == len(STRENGTHS)
    for divisor in others:
        assert divisor.argmax() == 3
        torch.testing.assert_close(divisor.log().mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert others[0][3] < others[1][3] < others[2][3]  # a larger share of the outlier


def test_the_best_of_the_candidates_is_taken(text):
    """With an outlier in the inputs some smoothing is chosen, and the layer's error falls."""
    pipe, calib = text
    config = QuantConfig.preset("svdquant", 4, 4, adaround=False, calib_batch=8)
    unet = quantize(pipe.unet, config, calib)
    layer = next(x for x in quant_layers(unet).values() if x.transform is not None)
    full = seeded(layer.out_features, layer.in_features)
    x = seeded(64, layer.in_features, seed=1)
    x[:, 2] *= 40
    inputs = Inputs(0)
    inputs.add(x, 64)

    def error() -> float:
        def run(rows):
            return F.linear(by_row(rows), layer.weight_quantizer(layer.weight))

        return power(layer.transform.around(x, run) - F.linear(x, full))

    fit(layer, full, inputs, config)
    smoothed = error()
    assert layer.transform.divisor.argmax() == 2
    fit(layer, full, inputs, config.replace(smoothing=False))
    assert torch.equal(layer.transform.divisor, torch.ones(layer.in_features))
    assert smoothed < error() / 2


# ---- the whole way ----


@pytest.mark.parametrize("preset", LATER)
def test_without_quantizers_the_model_is_what_it_was(text, fast, preset):
    pipe, calib = text
    unet = quantize(pipe.unet, fast(preset, adaround_lr=0.2), calib)
    transformed = [x for x in quant_layers(unet).values() if x.transform is not None]
    assert len(transformed) >= 10
    assert {x.role for x in transformed}.isdisjoint({"time_embed", "time_proj", "first", "last"})
    batch = calib.batch(1, torch.arange(calib.width(1)))
    quantized = batch.run(unet)
    set_mode(unet, weights=False, acts=False)
    for layer in transformed:  # AdaRound has moved weights inside their cells
        layer.weight.data = layer.own_weight(full_weight(pipe.unet, unet, layer))
    others = [n for n, x in quant_layers(unet).items() if x.transform is None]
    for name in others:
        unet.get_submodule(name).weight.data = pipe.unet.get_submodule(name).weight.clone()
    torch.testing.assert_close(batch.run(unet), batch.eps, rtol=1e-3, atol=1e-3)
    assert power(quantized - batch.eps) > 1e-4  # with them it is not


def full_weight(plain, unet, layer) -> torch.Tensor:
    """The weight of the full-precision model's layer."""
    name = next(n for n, x in quant_layers(unet).items() if x is layer)
    return plain.get_submodule(name).weight.detach()


@pytest.mark.parametrize("preset", ["rotation", "svdquant", "svdquant-quest", "rotation-quest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_gives_it_back_bit_for_bit(text, fast, tmp_path, preset, dtype):
    pipe, calib = text
    unet = quantize(pipe.unet, fast(preset, adaround_lr=0.2), calib)
    if unet.quest_config.finetunes:
        finetune(unet, pipe.unet, calib, unet.quest_config)
    unet = unet.to(dtype)
    questlib.save_pretrained(unet, tmp_path / "own")
    unet.save_pretrained(tmp_path / "diffusers")
    batch = calib.batch(0, torch.arange(2))
    with torch.no_grad():
        expected = batch.run(unet)
        for folder in ("own", "diffusers"):
            again = from_pretrained(tmp_path / folder)
            assert torch.equal(batch.run(again), expected), folder


def test_a_damaged_divisor_is_refused(text, fast, tmp_path):
    pipe, calib = text
    questlib.save_pretrained(quantize(pipe.unet, fast("svdquant", adaround=False), calib), tmp_path)
    path = tmp_path / "model.safetensors"
    state, about = read_tensors(path)
    name = next(name for name in state if name.endswith("transform.divisor"))
    state[name][0] = -1.0
    write_tensors(path, state, {k: v for k, v in about.items() if k == "config"})
    with pytest.raises(CheckpointError, match="divisor .expected positive numbers"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("preset", ["rotation", "svdquant", "svdquant-quest", "rotation-quest"])
@pytest.mark.parametrize(("engine", "fuse"), [("reference", False), ("cpu", False), ("cpu", True)])
def test_integers_are_those_of_the_simulation(text, fast, preset, engine, fuse):
    """Fused blocks leave such layers out; what is around them computes the same."""
    pipe, calib = text
    unet = quantize(pipe.unet, fast(preset, adaround=False, calib_batch=16), calib)
    batch = calib.batch(1, torch.arange(4))
    with torch.no_grad():
        simulated = batch.run(unet)
        converted = convert(unet, engine, fuse=fuse)
        found = batch.run(converted)
    around = [m for m in converted.modules() if isinstance(m, TransformedLayer)]
    assert len(around) == sum(x.transform is not None for x in quant_layers(unet).values()) > 0
    assert not any(isinstance(m, QuantLayer) for m in converted.modules())
    # A fused norm's code may differ by one, and so may a softmax's.
    assert power(found - simulated) < 3e-3 * power(simulated)

    report = questlib.engine_report(converted)
    inner = [m for m in converted.modules() if isinstance(m, IntegerLayer)]
    assert sum(row.engine.startswith(engine) for row in report) >= len(inner)
    words = "rotated" if "rotation" in preset else "beside it"
    assert sum(words in row.format for row in report) == len(around)
    assert len({row.layer for row in report}) == len(report)


def test_a_plain_model_has_nothing_around_it(pipe, calib, fast):
    unet = quantize(pipe.unet, fast("quest", adaround=False), calib)
    assert all(layer.transform is None for layer in quant_layers(unet).values())
    assert all(q.bits == 4 or q.bits == 8 for q in act_quantizers(unet))
