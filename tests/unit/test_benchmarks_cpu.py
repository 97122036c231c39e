"""benchmarks/cpu_unet.py: what it says before any work."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_unet.py"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--models", "sd15"], "models are mini-ldm4, sd14"),
        (["--variants", "int2"], "found int2"),
        pytest.param(
            ["--variants", "openvino-int8"],
            "expected openvino, nncf and torchao",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("openvino") is not None, reason="OpenVINO is installed"
            ),
        ),
    ],
)
def test_what_is_not_there_is_said_first(given, says):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_torchaos_weights_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import torchao_unet

    unet = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GroupNorm(1, 5))
    unet.append(torch.nn.Conv2d(5, 2, 3))
    assert torchao_unet.size_of(unet) == 3 * 5 + 5 * 2 * 9 + 4 * (5 + 2 + 10)


def test_a_program_loses_its_dtype_checks(monkeypatch):
    """Under autocast the exported program's own checks would refuse its tensors."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import torchao_unet

    class Model(torch.nn.Module):
        def forward(self, x):
            """Twice x, in single precision."""
            return torch.nn.functional.linear(x, x).to(torch.float32) * 2

    x = torch.eye(3)
    program = torch.export.export(Model(), (x,)).module()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises((RuntimeError, AssertionError)):
            program(x)
        assert torch.equal(torchao_unet.without_dtype_checks(program)(x), 2 * x)
