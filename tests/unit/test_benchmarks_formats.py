"""benchmarks/formats.py: errors are those of each layer alone; its table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import formats

import questlib
from questlib.quantization.model import quant_layers, set_mode
from reproduce.figures.engine import formats_table


def test_errors_of_layers(pipe, calib, fast):
    unet = questlib.quantize(pipe.unet, fast("quest", 4, 4, adaround=False), calib)
    set_mode(unet, weights=False, acts=False)
    assert set(formats.layer_errors(unet, pipe.unet, calib).values()) == {0.0}
    set_mode(unet, weights=False, acts=True)
    found = formats.layer_errors(unet, pipe.unet, calib)
    assert set(found) == set(quant_layers(unet)) and all(0 < v < 1 for v in found.values())
    name = next(n for n, m in quant_layers(unet).items() if m.role == "conv")
    alone = quant_layers(unet)[name].input_quantizer
    set_mode(unet, acts=False)
    alone.enabled = True
    again = formats.layer_errors(unet, pipe.unet, calib)
    assert again[name] == found[name] and not any(v for n, v in again.items() if n != name)


def test_table():
    layers = {
        "a": {"role": "conv", "full weights, x": 9.0, "quantized weights, x": 0.01},
        "b": {"role": "conv", "full weights, x": 9.0, "quantized weights, x": 0.04},
        "c": {"role": "qkv", "full weights, x": 9.0, "quantized weights, x": 0.5},
    }
    table = formats_table({"layers": layers})
    assert table.values.tolist() == [["conv", "0.0200", 2], ["qkv", "0.5000", 1]] and list(
        table
    ) == ["role", "x", "layers"]


def test_arguments(capsys, monkeypatch):
    for bits in ("4A4", "W4", "WxA4"):
        monkeypatch.setattr(sys, "argv", ["formats.py", "--bits", bits])
        with pytest.raises(SystemExit):
            formats.main()
        assert bits in capsys.readouterr().err
