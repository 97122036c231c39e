"""benchmarks/cpu_unet.py: what it says before any work."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu_unet.py"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--models", "sd15"], "models are mini-ldm4, sd14"),
        (["--variants", "int2"], "found int2"),
        pytest.param(
            ["--variants", "openvino-int8"],
            "expected openvino and nncf",
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
