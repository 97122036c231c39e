"""benchmarks/gpu.py as far as it goes without a GPU: arithmetic, arguments, correctness."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
from gpu_check import jobs  # noqa: E402
from gpu_measure import floor_seconds  # noqa: E402
from gpu_subjects import SHAPES, Shape, input_of, module_of, random_unet  # noqa: E402


def test_floors():
    linear = Shape("m", 10, 20, 30)
    assert linear.operations(2) == 2 * 2 * 30 * 10 * 20
    assert linear.bytes(2, 2.0, 0.5) == 2 * 30 * 10 * 2 + 200 * 0.5 + 2 * 30 * 20 * 2
    conv = Shape("m", 10, 20, 16, 3, 2)
    assert conv.operations(1) == 2 * 16 * 10 * 20 * 9
    assert conv.bytes(1, 1.0, 1.0) == 64 * 10 + 10 * 20 * 9 + 16 * 20 * 2
    assert floor_seconds(100, 10, 10, 1) == 10 and floor_seconds(100, 30, 10, 1) == 30


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_are_what_they_say(shape):
    small = shape._replace(inputs=4, outputs=2)
    y = module_of(small)(input_of(small, 1, "cpu", torch.float32))
    assert y.numel() == 2 * shape.pixels


def test_what_does_not_fit_the_budget_is_listed_and_saved(tmp_path):
    report = gpu.Report(tmp_path / "new" / "gpu.json", 1.0)
    assert report.enough("quick", 0.1) and not report.enough("slow", 100)
    assert json.loads(report.path.read_text())["skipped"] == ["slow"]


def test_unknown_sections_and_missing_gpus_end_the_program(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--sections", "layers,speed"])
    assert "found speed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path / "x.json")]) == 2
        assert "found none" in capsys.readouterr().err


def test_the_engine_loads_where_diffusers_is_missing():
    pytest.importorskip("triton")
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'diffusers' else find(n, *a)\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import common, gpu_subjects as gpu; from torch import nn\n"
        "engine = gpu.load_engine()\n"
        "layer, steps = gpu.random_layer(nn.Linear(8, 4), 4, 4)\n"
        "print(engine.TritonLayer(engine.integer_form(layer, 'layer'), steps).kind)\n"
        "print('diffusers.models.resnet' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == ["packed", "False"], run.stderr


def test_shares_of_a_section_run_in_processes_of_their_own():
    """With it, the correctness section in the interpreter."""
    pytest.importorskip("triton")
    found = gpu.run_shards("correctness", 2, ("--interpret", "--quick"))
    assert [f["correctness"]["failures"] for f in found] == [[], []]
    assert sum(f["correctness"]["checked"] for f in found) == len(jobs(small=True)[::24]) + 2
    with pytest.raises(RuntimeError, match="ended with code 2"):
        gpu.run_shards("nonsense", 1)


def test_a_process_that_fails_is_not_taken_for_a_wrong_result():
    """Its own words are there. A machine with a GPU compiles instead."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("of machines without a GPU")
    with pytest.raises(RuntimeError, match="expected an NVIDIA GPU, found none"):
        gpu.run_shards("layers", 1)


def test_a_section_that_fails_is_reported_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    ran = []

    def broken(report, args):
        raise ValueError("no such kernel")

    def skips(report, args):
        ran.append("attention")
        report.data["skipped"].append("attention: no time")
        return True

    monkeypatch.setitem(gpu.RUN, "unet", broken)
    monkeypatch.setitem(gpu.RUN, "attention", skips)
    monkeypatch.setitem(gpu.RUN, "correctness", lambda report, args: ran.append("correctness"))
    report = gpu.Report(tmp_path / "gpu.json", 100.0)
    args = SimpleNamespace(shard=None)
    assert gpu.run_section(report, "unet", args) == 1
    assert gpu.run_section(report, "correctness", args) == gpu.WRONG
    assert gpu.run_section(report, "attention", args) == 0
    assert ran == ["correctness", "attention"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert "ValueError: no such kernel" in written["errors"]["unet"]
    said = capsys.readouterr().out
    assert "unet: FAILED" in said and "skipped: attention: no time" in said
    assert gpu.SECTIONS.index("sample") < gpu.SECTIONS.index("unet") < 2  # the headline is early


def test_fused_unets_are_compared_before_they_are_timed():
    pytest.importorskip("triton")
    size = dict(
        sample_size=8,
        cross_attention_dim=768,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    fake = random_unet("quest", 8, device="cpu", **size)

    class Steps:
        def __init__(self, wrong=0.0):
            self.wrong = [wrong, 0.0]  # added to the fused one's output, which comes first

        def outputs(self, model, batch):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(1, 4, 4, 4, generator=generator)
            text = torch.randn(1, 3, 768, generator=generator)
            with torch.no_grad():
                return model(x, torch.tensor(500), text).sample + self.wrong.pop(0)

    models, error = gpu.ours(fake, torch.float32, Steps())
    assert set(models) == {"", ", attention auto", ", not fused"} and error < gpu.FUSED_ERROR
    assert gpu.ours(fake, torch.float32, Steps(1.0))[1] > gpu.FUSED_ERROR
