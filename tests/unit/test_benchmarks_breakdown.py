"""benchmarks/cpu_breakdown.py: every operation has a kind, and the work is counted right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from questlib.integer.cpu.engine import CPU
from questlib.integer.form import integer_form
from questlib.integer.synthetic import random_layer
from questlib.kernels.library import kernels
from reproduce.figures import engine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

RESULT = {
    "models": {
        "mini-ldm4": {
            "batch": 100,
            "seconds": {
                "fp32": {"products": 0.2, "other": 0.001},
                "w4a4-fused": {"products": 0.05, "quantization": 0.03},
            },
            "bound": {"products": 0.04, "sums and copies": 0.02},
        }
    }
}


@pytest.fixture
def breakdown(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cpu_breakdown

    return cpu_breakdown


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("onednn::qconv2d_pointwise", "products"),
        ("aten::addmm", "products"),
        ("aten::mkldnn_convolution", "products"),
        ("questlib::attention", "attention"),
        ("questlib::quantize", "quantization"),
        ("questlib::quantize_tokens", "quantization"),
        ("questlib::quantize_rows", "norms and activations"),
        ("aten::native_group_norm", "norms and activations"),
        ("aten::cat", "sums and copies"),
        ("ProfilerStep*", "other"),
    ],
)
def test_kinds_of_operations(breakdown, operation, kind):
    assert breakdown.kind_of(operation) == kind


def test_the_work_is_that_of_torchs_own_counter(breakdown, monkeypatch):
    monkeypatch.setitem(breakdown.cpu_unet.MODELS, "mini-ldm4", 1)
    unet = breakdown.cpu_unet.float_unet("mini-ldm4")
    inputs = breakdown.cpu_unet.inputs_of("mini-ldm4", unet.config, torch.float32)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        unet(*inputs)
    work = breakdown.work_of("mini-ldm4")
    assert 2 * (work["products"] + work["attention"]) == counter.get_total_flops()
    assert work["bytes"] > 0


@pytest.mark.skipif(kernels().library is None, reason="there are no compiled kernels here")
def test_torchs_profiler_sees_the_kernels():
    layer, steps = random_layer(nn.Linear(32, 16), 8, 8)
    steps.select_group(0)
    product = CPU.make_layer(integer_form(layer, "linear"), steps, {"fuse": False})
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        product(torch.randn(4, 32))
    assert "questlib::quantize" in {event.key for event in seen.key_averages()}


def test_a_wrong_model_is_said_first():
    script = BENCHMARKS / "cpu_breakdown.py"
    command = [sys.executable, str(script), "--models", "sd15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "models are mini-ldm4, sd14; found sd15" in done.stderr


def test_bars_are_as_long_as_the_step():
    (axes,) = engine.breakdown_figure(RESULT).axes
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in axes.patches}
    assert {0.201, 0.08, 0.06} <= ends
    table = engine.breakdown_table(RESULT, "mini-ldm4").set_index("seconds of one step")
    assert list(table["step"]) == ["0.201", "0.080", "0.060"]
    assert "attention" not in table  # nothing was spent on it
