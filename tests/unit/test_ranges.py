import pytest
import torch

from questlib.quantization import carrier, primitives, range_search, token_grid


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_at_most_two_to_the_b_values(bits, symmetric, method):
    x = (
        torch.randn(3, 5000, generator=torch.Generator().manual_seed(bits))
        * torch.tensor([[0.1], [1.0], [30.0]])
        + 0.3
    )
    scale, zero = range_search.choose_qparams(x, x.amin(1), x.amax(1), bits, method, symmetric)
    wide = torch.linspace(-200, 200, 20001).expand(3, -1)
    for row, s, z in zip(
        primitives.fake_quant(wide, scale[:, None], zero[:, None], bits), scale, zero, strict=True
    ):
        values = row.unique()
        assert len(values) <= 2**bits
        codes = values / s + z
        assert codes.min() >= -1e-3 and codes.max() <= 2**bits - 1 + 1e-3
        assert torch.equal(z, z.round()) and 0 in values  # integer zero point, zero exact


def test_min_max_error_is_at_most_half_a_step():
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    s, z = range_search.choose_qparams(x, x.amin(1), x.amax(1), 8, "minmax")
    # the rounded zero point may shift the range by half a step more
    assert (
        (primitives.fake_quant(x, s[:, None], z[:, None], 8) - x).abs() <= 1.0001 * s[:, None]
    ).all()


def test_mse_beats_min_max_and_equals_a_loop_over_rows():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4000, generator=g) ** 3  # heavy tails
    lo, hi = x.amin(1), x.amax(1)
    s, z = range_search.choose_qparams(x, lo, hi, 4, "mse")
    rows = [
        range_search.choose_qparams(x[i : i + 1], lo[i : i + 1], hi[i : i + 1], 4, "mse")
        for i in range(6)
    ]
    assert torch.equal(s, torch.cat([r[0] for r in rows])) and torch.equal(
        z, torch.cat([r[1] for r in rows])
    )
    s0, z0 = range_search.choose_qparams(x, lo, hi, 4, "minmax")

    def err(s, z):
        return (primitives.fake_quant(x, s[:, None], z[:, None], 4) - x).square().mean(1)

    assert (err(s, z) < 0.8 * err(s0, z0)).all()


def test_percentile_clips_a_lone_outlier_when_that_pays():
    x = torch.randn(1, 20000, generator=torch.Generator().manual_seed(2))
    x[0, 0] = 30.0
    s, _ = range_search.choose_qparams(x, x.amin(1), x.amax(1), 4, "percentile")
    assert s.item() < 0.7
    s, _ = range_search.choose_qparams(x, x.amin(1), x.amax(1), 4, "minmax")
    assert s.item() > 2


def test_constant_and_zero_inputs_do_not_divide_by_zero():
    for value in (0.0, 3.0, -3.0):
        x = torch.full((1, 10), value)
        s, z = range_search.choose_qparams(x, x.amin(1), x.amax(1), 4, "mse")
        assert torch.allclose(primitives.fake_quant(x, s[:, None], z[:, None], 4), x, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 64, 200])
def test_carrier_grid_is_integers_that_fit_a_byte(channels):
    g = torch.Generator().manual_seed(channels)
    spread = torch.logspace(-1.5, 1.0, channels)[torch.randperm(channels, generator=g)]
    x = torch.randn(channels, 500, generator=g) * spread[:, None]
    s, z = range_search.choose_qparams(x, x.amin(1), x.amax(1), 4, "mse")
    e = carrier.block_shifts(s[None])
    base, ratio, zero = carrier.snap_to_carrier(x, s, z, e, 4)
    m = ratio / 2**e
    assert torch.equal(m, m.round()) and m.min() >= 1 and m.max() <= 8
    assert e.min() == 0 and e.max() <= 3
    assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= 15
    codes = torch.arange(16.0)
    assert ((codes[None] - zero[:, None]) * m[:, None]).abs().max() <= 127
    # it must come closer to the free scales than one scale for all does
    free = (primitives.fake_quant(x, s[:, None], z[:, None], 4) - x).square().sum()
    ours = (primitives.fake_quant(x, (base * ratio)[:, None], zero[:, None], 4) - x).square().sum()
    s1, z1 = range_search.choose_qparams(x.reshape(1, -1), x.min()[None], x.max()[None], 4, "mse")
    one = (primitives.fake_quant(x, s1[:, None], z1[:, None], 4) - x).square().sum()
    assert free <= ours * 1.001 and ours < 0.8 * one


@pytest.mark.parametrize("bits", [4, 8])
def test_grids_a_token_fit_tokens_of_different_sizes(bits):
    """Channels with outliers, tokens of different sizes: the error is far below a static grid's.

    Only 4 bits have ratios.
    """
    g = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1.0, 1.0, 96)[torch.randperm(96, generator=g)]
    x = torch.randn(96, 400, generator=g) * spread[:, None] * torch.logspace(-1.5, 1.5, 400)
    s, z = range_search.choose_qparams(x, x.amin(1), x.amax(1), bits, "mse")
    clip, ratio = carrier.snap_to_tokens(x, s, carrier.block_shifts(s[None]), bits)
    assert (
        0.4 <= clip <= 1
        and torch.equal(ratio, ratio.round())
        and (len(ratio.unique()) > 2) == (bits <= 4)
    )
    grid = token_grid.token_grid(x / ratio[:, None], clip, bits, 0)
    ours = (
        primitives.fake_quant(
            x, grid.scale * ratio[:, None], grid.zero_point, bits, grid.inverse / ratio[:, None]
        )
        - x
    )
    free = primitives.fake_quant(x, s[:, None], z[:, None], bits) - x
    size = x.square().mean(0)  # of each token
    assert (ours.square().mean(0) / size).mean() < 0.5 * (free.square().mean(0) / size).mean()
