import matplotlib.pyplot as plt
import pytest
import torch

from questlib import finetune, quantize
from questlib.calibration import Calibration
from questlib.quantization.model import quant_layers
from questlib.quantization.primitives import affine, fake_quant
from questlib.quantization.roles import layer_roles
from reproduce.figures import style
from reproduce.figures.activations import (
    SEARCHES,
    channel_figure,
    channel_rows,
    channel_scales,
    grid,
    grid_table,
    histogram_figure,
    input_table,
    layer_inputs,
)
from reproduce.figures.pictures import (
    image_grid,
    layer_error_figure,
    layer_errors,
    loss_figure,
    time_errors,
    time_figure,
    time_outputs,
)
from reproduce.figures.style import save


@pytest.fixture(scope="module")
def heavy():
    """Mostly small values and a few large ones, as in the paper's Fig. 2."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x[:20] = 12.0
    return x


@pytest.fixture(scope="module")
def attention(pipe):
    return [n for n, role in layer_roles(pipe.unet).items() if role in ("qkv", "attn_out")]


def test_image_grid_shows_the_first_images_of_each_row():
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    figure = image_grid({"a": images, "b": images}, columns=2)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a", "b"]
    strip = figure.axes[0].images[0].get_array()
    assert strip.shape == (4, 8, 3) and (strip[:, :4] == 0).all() and (strip[:, 4:] == 1).all()


def test_layer_inputs_are_what_the_layers_receive(pipe, calib):
    found = layer_inputs(pipe.unet, calib, ["conv_in", "time_embedding.linear_1"], samples=2)
    assert torch.equal(found["conv_in"], calib.x[:, :2].flatten(0, 1))
    assert found["time_embedding.linear_1"].shape[0] == 5 * 2
    assert not pipe.unet.conv_in._forward_pre_hooks


def test_input_table_has_every_layer_with_the_heaviest_tails_first(pipe, calib):
    table = input_table(pipe.unet, calib, samples=2)
    assert set(table.index) == set(layer_roles(pipe.unet))
    assert table["kurtosis"].is_monotonic_decreasing
    assert table.loc["conv_in", "max"] == calib.x[:, :2].max().item()


def test_input_table_without_the_inputs_in_memory_has_their_moments(pipe, calib):
    table = input_table(pipe.unet, calib, samples=2)
    for name, x in layer_inputs(
        pipe.unet, calib, ["conv_in", "mid_block.attentions.0.to_q"], samples=2
    ).items():
        x = x.double()
        kurtosis = (x - x.mean()).pow(4).mean() / x.var(correction=0).square()
        expected = [x.min().item(), x.max().item(), x.std().item(), kurtosis.item()]
        assert table.loc[name, ["min", "max", "std", "kurtosis"]].tolist() == pytest.approx(
            expected
        )


def test_grid_rounds_as_the_quantizer_does(heavy):
    levels = grid(heavy, 4, "min-max")
    scale, zero = affine(heavy.min()[None], heavy.max()[None], 4)
    nearest = levels[(heavy[:, None] - levels).abs().argmin(1)]
    assert len(levels) == 16 and torch.allclose(nearest, fake_quant(heavy, scale, zero, 4))


def test_grid_table_splits_the_error_into_its_two_parts(heavy):
    table = grid_table({"x": heavy}, 4)
    minmax, mse, fourth = (table.loc[("x", k)] for k in SEARCHES)
    assert minmax["clipped %"] == 0 and minmax["clipping MSE"] == 0
    assert mse["clipped %"] > 0 and mse["rounding MSE"] < minmax["rounding MSE"]
    assert mse["MSE"] < minmax["MSE"] == pytest.approx(minmax["rounding MSE"])
    assert mse["clipped %"] >= fourth["clipped %"] and minmax["step"] > fourth["step"] > mse["step"]
    assert mse["largest error"] > fourth["largest error"]
    levels = grid(heavy, 4, "mse")
    error = (levels[(heavy[:, None] - levels).abs().argmin(1)] - heavy).square().mean().item()
    assert (
        mse["rounding MSE"] + mse["clipping MSE"]
        == pytest.approx(mse["MSE"])
        == pytest.approx(error, rel=1e-4)
    )


def test_channel_scales_follow_each_channel(pipe, calib, fast):
    rows = (
        torch.randn(16, 500, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-1, 1, 16)[:, None]
    )
    scales = channel_scales(rows, 4, 2.0)
    error = {
        k: (fake_quant(rows, s[:, None], z[:, None], 4) - rows).square().mean().item()
        for k, (s, z) in scales.items()
    }
    assert error["one a channel"] < error["carrier grid"] < error["one for all"]
    carrier = scales["carrier grid"][0]
    ratio = carrier / carrier.min()
    assert len(carrier.unique()) > 1 and torch.allclose(ratio, ratio.round(), atol=1e-4)
    q = quantize(pipe.unet, fast(), calib)
    layer = quant_layers(q)["conv_out"]
    x = layer_inputs(q, calib, ["conv_out"])["conv_out"]
    assert channel_rows(x, layer.input_quantizer.dim).shape == (
        layer.in_channels,
        x.numel() // layer.in_channels,
    )


def test_time_outputs_are_those_of_the_whole_unet_and_errors_compare_them(pipe, calib, fast):
    outputs = time_outputs(pipe.unet, calib.t)
    assert all(x.shape[0] == len(calib.t) for x in outputs.values())
    assert set(outputs) == {
        n for n, role in layer_roles(pipe.unet).items() if role.startswith("time")
    }
    assert torch.equal(time_errors(pipe.unet, pipe.unet, calib.t), torch.zeros(len(calib.t)))
    errors = [
        time_errors(
            quantize(pipe.unet, fast("minmax", bits, bits), calib), pipe.unet, calib.t
        ).mean()
        for bits in (8, 4)
    ]
    assert 0 < errors[0] < errors[1]


def test_layer_errors_vanish_for_the_same_model_and_grow_with_fewer_bits(
    pipe, calib, fast, attention
):
    assert set(layer_errors(pipe.unet, pipe.unet, calib, attention).values()) == {0.0}
    few = Calibration.regular(calib.x[:1], calib.t[:1], calib.eps[:1])
    high, low = (
        layer_errors(quantize(pipe.unet, fast("minmax", b, b), calib), pipe.unet, few, attention)
        for b in (8, 4)
    )
    assert list(high) == attention and all(0 < high[n] < low[n] for n in attention)


def test_figures_show_what_was_given(pipe, calib, fast, heavy, attention):
    student = quantize(pipe.unet, fast(), calib)
    log = finetune(student, pipe.unet, calib, fast())
    errors = layer_errors(student, pipe.unet, calib, attention, samples=2)
    losses = loss_figure(log["loss"])
    assert [axes.get_title(loc="left") for axes in losses.axes] == ["stage TLA", "stage CMA"]
    assert [line.get_label() for line in losses.axes[1].lines] == ["L_CMA", "L_G"]
    assert [
        t.get_text() for t in layer_error_figure({"after": errors}).axes[0].get_yticklabels()
    ] == attention
    times = time_figure(
        pipe.unet, {"quantized": student, "TLA, local loss alone": student}, calib.t
    )
    assert len(times.axes[0].lines) == 5  # full precision; of each student a line and its dots
    colors = {line.get_color() for line in times.axes[0].lines}
    names = ("full precision", "quantized", "TLA, local loss alone")
    assert colors == {style.COLORS[name] for name in names}
    assert len(histogram_figure({"before": heavy, "after": heavy}, 4, "layer").axes) == 2
    assert len(channel_figure(heavy.reshape(10, -1), 4, 4.0).axes[1].lines) == 3
    assert not plt.get_fignums()  # a notebook shows a figure once: as the cell's value


def test_a_stage_without_a_local_loss_shows_the_global_one_alone():
    figure = loss_figure([["cma", 0, 0.0, 2.0], ["cma", 1, 0.0, 1.0]])
    assert [line.get_label() for line in figure.axes[0].lines] == ["L_G"]


def test_a_picture_is_saved_whole_and_the_same_each_time(tmp_path):
    figure = loss_figure([["cma", 0, 1.0, 2.0], ["cma", 1, 0.5, 1.0]])
    paths = [save(figure, tmp_path / name) for name in ("a.png", "b.png")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths
