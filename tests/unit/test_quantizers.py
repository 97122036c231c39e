import pytest
import torch
from torch import nn

from questlib.errors import NotCalibratedError
from questlib.quantization import primitives
from questlib.quantization.act_quantizer import ActQuantizer
from questlib.quantization.primitives import LearnedQuant
from questlib.quantization.step_groups import StepGroups
from questlib.quantization.weight_quantizer import WeightQuantizer


def act(bits=4, channels=6, groups=2, dim=1, granularity="tensor"):
    steps = StepGroups(torch.arange(groups) * 100, torch.arange(groups))
    q = ActQuantizer("layer.input_quantizer", bits, steps, channels, dim, granularity)
    return q, steps


def test_uncalibrated_raises_and_names_itself():
    q, _ = act()
    with pytest.raises(NotCalibratedError, match="layer.input_quantizer.*never calibrated"):
        q(torch.randn(2, 6, 3, 3))


def test_each_sample_gets_its_own_groups_scale():
    q, steps = act(groups=2)
    for g in (0, 1):
        q.set_group(g, torch.tensor([0.1 * (g + 1)]), torch.full((6,), 8.0))
    q.calibrated.fill_(True)
    x = torch.randn(2, 6, 3, 3)
    steps.select(torch.tensor([100, 0]))
    mixed = q(x)
    for i, t in enumerate((100, 0)):
        steps.select(torch.tensor(t))
        assert isinstance(steps.current, int)
        assert torch.equal(q(x[i : i + 1])[0], mixed[i])


@pytest.mark.parametrize("dim", [1, -1])
def test_training_and_inference_paths_agree_exactly(dim):
    q, _ = act(channels=5, groups=1, dim=dim, granularity="channel")
    q.set_group(0, torch.rand(5) + 0.05, torch.tensor([0.0, 3, 8, 15, 7]))
    q.calibrated.fill_(True)
    x = torch.randn(4, 5, 7, 5) * 2
    with torch.no_grad():
        expected = q(x)
    assert torch.equal(q(x.clone().requires_grad_()), expected)
    assert len(expected.unique()) <= 5 * 16


def token_act(bits, dim=-1, parts=None):
    """Six channels, two step groups: clips 0.9 and 0.7, with ratios where the bits allow them."""
    steps = StepGroups(torch.arange(2) * 100, torch.arange(2))
    q = ActQuantizer("layer.input_quantizer", bits, steps, 6, dim, "token", parts=parts)
    for g in (0, 1):
        ratio = torch.tensor([1.0, 2, 3, 5, 8, 1]) if bits <= 4 else None
        q.set_group(g, torch.full_like(q.scale[g], 0.9 - 0.2 * g), torch.zeros(6), ratio)
    q.calibrated.fill_(True)
    return q


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("dim", [1, -1])
def test_each_token_has_a_grid_of_its_own(bits, dim):
    """The grid covers the token's range over the ratios, times the clip, by at most 2^b codes.

    No token changes another one's grid.
    """
    torch.manual_seed(0)
    q = token_act(bits, dim)
    q.steps.select_group(0)
    x = torch.randn(3, 6, 5, 6) * torch.logspace(-4, 4, 5)[:, None]
    y = q(x)
    tokens, back = x.movedim(dim, -1).reshape(-1, 6), y.movedim(dim, -1).reshape(-1, 6)
    ratio = q.ratio[0]
    for a, b in zip(tokens.double(), back.double(), strict=True):
        u = a / ratio
        span = 2 * u.abs().max() if bits == 8 else u.clamp_min(0).max() - u.clamp_max(0).min()
        step = 0.9 * span / (2**bits - 1)
        codes = b / (step * ratio)
        assert (
            codes - codes.round()
        ).abs().max() < 1e-3 and codes.max() - codes.min() < 2**bits - 0.5
        # half a step for the code, half for the zero point, and what the clip cuts off
        assert ((a - b).abs() / ratio).max() <= 1.001 * (step + 0.1 * span)
    assert torch.equal(q(x[1:2])[0], y[1])


def test_tokens_train_the_clip_and_take_each_samples_group():
    q = token_act(4)
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
    q.steps.select_group(torch.tensor([1, 0]))
    mixed = q(x)
    for i, g in enumerate((1, 0)):
        q.steps.select_group(g)
        assert torch.equal(q(x[i : i + 1])[0], mixed[i])
    leaf = x.clone().requires_grad_()
    y = q(leaf)  # group 0
    with torch.no_grad():
        assert torch.equal(y, q(x))
    y.square().sum().backward()
    assert (
        q.scale.grad[0].abs().sum() > 0 and not q.scale.grad[1].any() and leaf.grad.abs().sum() > 0
    )


def test_shift_is_kept_beside_the_ratio():
    q, _ = act(granularity="carrier")
    assert q.shift.tolist() == [0] * 6 and not q.shift.is_floating_point()
    ratio = torch.tensor([1.0, 2, 4, 8, 16, 48])
    q.set_group(1, torch.tensor([0.1]), torch.zeros(6), ratio, torch.tensor([0, 1, 2, 0, 2, 3]))
    assert q.shift.tolist() == [0, 1, 2, 0, 2, 3]
    q.set_group(0, torch.tensor([0.1]), torch.zeros(6), ratio)
    assert q.shift.tolist() == [0, 1, 2, 0, 2, 3]  # one shift for all groups


@pytest.mark.parametrize(
    ("granularity", "bits", "sets", "token", "carrier"),
    [
        ("tensor", 4, 2, False, False),
        ("channel", 4, 6, False, False),
        ("carrier", 4, 2, False, True),
        ("token", 4, 2, True, True),
        ("token", 8, 2, True, False),
    ],
)
def test_granularity_decides_the_sets_of_parameters(granularity, bits, sets, token, carrier):
    parts = torch.tensor([0, 0, 0, 0, 1, 1])
    steps = StepGroups(torch.arange(3), torch.arange(3))
    q = ActQuantizer("a", bits, steps, 6, 1, granularity, parts=parts)
    assert q.scale.shape == (3, sets) and q.zero_point.shape == q.ratio.shape == (3, 6)
    assert (q.token, q.carrier) == (token, carrier)


def test_parts_of_a_token_have_ranges_of_their_own():
    q = token_act(4, parts=torch.tensor([0, 0, 0, 1, 1, 1]))
    q.steps.select_group(0)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    y = q(x * torch.tensor([1.0, 1, 1, 1000, 1000, 1000]))
    assert torch.equal(y[:, :3], q(x)[:, :3])


def test_gradients_are_lsq():
    """Against autograd through the straight-through formulation, written out."""
    x = (torch.randn(3, 4, dtype=torch.float64) * 3).requires_grad_()
    s = torch.tensor([[0.3, 0.5, 0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[8.0, 0.0, 15.0, 4.0]], dtype=torch.float64)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (LearnedQuant.apply(x, s, z, 4) * weight).sum().backward()
    got = x.grad.clone(), s.grad.clone()
    x.grad = s.grad = None
    u = x / s
    rounded = u + (u.round() - u).detach()
    ((torch.clamp(rounded, -z - 1e-9, 15 - z + 1e-9) * s) * weight).sum().backward()
    assert torch.allclose(got[0], x.grad) and torch.allclose(got[1], s.grad)


def test_gradients_at_the_edges_of_the_range():
    """On, just inside and just outside the edges in float32.

    The gradients are those of the definition, bit for bit.
    """
    z, s = (
        torch.tensor([[8.0], [0.0], [15.0], [5.0]]),
        torch.full((4, 1), 0.125, requires_grad=True),
    )
    edges = torch.cat(
        [-z - 0.5, 15.5 - z, -z, 15 - z, torch.zeros_like(z), torch.full_like(z, 0.5)], 1
    )
    u = torch.cat(
        [
            edges,
            edges.nextafter(torch.tensor(99.0)),
            edges.nextafter(torch.tensor(-99.0)),
            3 * edges,
        ],
        1,
    )
    x = (u * 0.125).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    LearnedQuant.apply(x, s, z, 4).backward(grad)
    inside = (u >= -z - 0.5) & (u <= 15.5 - z)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(x.grad, grad * inside)
    q = torch.clamp(u.round(), -z, 15 - z)
    assert torch.equal(s.grad, (grad * torch.where(inside, q - u, q)).sum(1, keepdim=True))


@pytest.mark.parametrize("rows", [1, 5])
def test_large_activations_are_quantized_in_parts(rows, monkeypatch):
    """Parts give the bits of one pass, forward and backward, with scales of one or all samples."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(5, 3, 4, 4, generator=generator),
        torch.randn(5, 3, 4, 4, generator=generator),
    )
    scale, zero = (
        torch.rand(rows, 3, 1, 1, generator=generator) + 0.1,
        torch.full((rows, 3, 1, 1), 7.0),
    )

    def run() -> list[torch.Tensor]:
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = LearnedQuant.apply(a, s, zero, 4)
        y.backward(grad)
        return [y.detach(), a.grad, s.grad, primitives.fake_quant(x, scale, zero, 4)]

    whole = run()
    monkeypatch.setattr(primitives, "CACHED", 100)  # two samples of 48 values, then two, then one
    assert [len(part) for part, *_ in primitives.pieces(x, scale)] == [2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))


def test_state_dict_moves_and_saves_everything():
    q, _ = act()
    names = {"scale", "zero_point", "ratio", "shift", "calibrated", "index"}
    assert names == set(q.state_dict())
    assert [n for n, _ in q.named_parameters()] == ["scale"]
    assert q.half().scale.dtype == torch.float32  # codes depend on every digit of a scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3, 3)])
def test_weight_codes_and_decode_are_inverse(bits, shape):
    w = torch.randn(shape)
    index = torch.tensor([0] * 4 + [1] * 6)
    wq = WeightQuantizer.from_weight(w, bits, index, "mse")
    codes = wq.codes(w)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert torch.equal(wq.decode(codes), wq(w))
    assert torch.equal(wq.codes(wq(w)), codes)  # a quantized weight is a fixed point
    assert wq.scale.shape == (6, 2)


def test_a_weight_quantizer_is_empty_until_it_searches():
    w = torch.randn(6, 10, 3, 3)
    index = torch.tensor([0] * 4 + [1] * 6)
    empty, searched = WeightQuantizer(6, 4, index), WeightQuantizer.from_weight(w, 4, index, "mse")
    assert empty.scale.shape == empty.zero_point.shape == (6, 2)
    assert not empty.zero_point.any() and (empty.scale == 1).all()
    empty.search(w, "mse")
    assert torch.equal(empty(w), searched(w))
    loaded = WeightQuantizer(6, 4, index)
    loaded.load_state_dict(searched.state_dict())
    assert torch.equal(loaded(w), searched(w))


def test_split_parts_have_scales_of_their_own():
    w = torch.randn(4, 8)
    w[:, 4:] *= 100
    split = WeightQuantizer.from_weight(w, 4, torch.tensor([0] * 4 + [1] * 4), "mse")
    whole = WeightQuantizer.from_weight(w, 4, torch.zeros(8, dtype=torch.int64), "mse")
    assert (split(w) - w)[:, :4].abs().max() < 0.5 < (whole(w) - w)[:, :4].abs().max()


def test_adaround_starts_at_full_precision_and_hardens_to_its_choice():
    w = torch.randn(8, 16)
    wq = WeightQuantizer.from_weight(w, 4, torch.zeros(16, dtype=torch.int64), "minmax")
    wq.start_adaround(w)
    inner = (wq.codes(w) > 0) & (wq.codes(w) < 15)
    assert torch.allclose(wq(w)[inner], w[inner], atol=1e-5)  # soft rounding = the fraction itself
    with torch.no_grad():  # the opposite of rounding to nearest, everywhere
        wq.alpha.copy_(torch.where(wq.rounding() >= 0.5, -9.0, 9.0))
    soft, nearest = wq(w), primitives.fake_quant(w, wq.scale, wq.zero_point, 4)
    hard = wq.harden(w)
    assert wq.alpha is None
    assert torch.allclose(wq(hard), soft, atol=1e-6)
    inside = (soft != nearest).float().mean()
    assert inside > 0.9  # all but what the range's ends forbid
    assert ((hard - w).abs() <= 1.02 * wq.scale).all()


def test_hardening_gives_what_training_saw_on_the_borders_of_cells_too():
    generator = torch.Generator().manual_seed(0)
    wq = WeightQuantizer.from_weight(
        torch.randn(64, 16, generator=generator), 4, torch.zeros(16, dtype=torch.int64), "minmax"
    )
    borders = (
        wq.scale * torch.arange(16) - wq.scale * wq.zero_point
    )  # [64, 16]: w / s and w * (1 / s) differ in some floors
    alpha = wq.start_adaround(borders)
    alpha.data.copy_(torch.where(torch.rand(alpha.shape, generator=generator) < 0.5, -9.0, 9.0))
    trained = (wq(borders).detach() / wq.scale).round() + wq.zero_point  # codes
    assert torch.equal(wq.codes(wq.harden(borders)), trained.to(torch.uint8))


def test_hardening_keeps_a_weight_that_lies_in_its_cell():
    w = torch.randn(8, 16)
    wq = WeightQuantizer.from_weight(w, 8, torch.zeros(16, dtype=torch.int64), "minmax")
    wq.start_adaround(w)
    assert torch.allclose(wq.harden(w), w, atol=0.02 * wq.scale.max().item())


def test_quantizers_are_modules_not_entries_of_a_dict():
    q, _ = act()
    holder = nn.ModuleDict({"a": q})
    assert len(list(holder.parameters())) == 1
