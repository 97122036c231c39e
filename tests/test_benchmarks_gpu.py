"""benchmarks/gpu.py as far as it goes without a GPU: arithmetic, arguments, correctness."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_sections  # noqa: E402
import gpu_shards  # noqa: E402
from gpu_check import jobs  # noqa: E402
from gpu_measure import floor_seconds  # noqa: E402
from gpu_report import FAILED, NO_GPU, WRONG, Report  # noqa: E402
from gpu_shards import ShardError, Shards, run_shards  # noqa: E402
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
    report = Report(tmp_path / "new" / "gpu.json", 1.0)
    assert report.enough("quick", 0.1) and not report.enough("slow", 100)
    report.skip("slow", "slower")
    assert json.loads(report.path.read_text())["skipped"] == ["slow", "slower"]


def test_unknown_sections_and_missing_gpus_end_the_program(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--sections", "layers,speed"])
    assert "found speed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path / "x.json")]) == NO_GPU
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


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "gpu.json", 1000.0)


def written(report: Report) -> dict:
    return json.loads(report.path.read_text())


def test_shares_of_a_section_run_in_processes_of_their_own(report):
    """With it, the correctness section in the interpreter."""
    pytest.importorskip("triton")
    shards = run_shards(report, "correctness", 2, ("--interpret", "--quick"))
    shards.check()
    found = [data["correctness"] for data in shards.results]
    assert [f["failures"] for f in found] == [[], []]
    assert sum(f["checked"] for f in found) == len(jobs(small=True)[::24]) + 2


def test_processes_that_fail_are_not_taken_for_wrong_results(report, monkeypatch):
    """Their own words are there, of each of them; what others found is kept."""
    pytest.importorskip("triton")
    shards = run_shards(report, "nonsense", 2)
    assert not shards.results and len(shards.failures) == 2
    with pytest.raises(
        ShardError, match="process 1 of 2 of section nonsense ended with code 2"
    ) as e:
        shards.check()
    assert str(e.value).count("expected some of sample, unet") == 2

    found = dict(checked=3, largest_relative_error=0.0, failures=["a wrong sum"])
    some = Shards([{"correctness": found}, {"skipped": []}], ["process 1 ended with code -9: oops"])
    monkeypatch.setattr(gpu_sections, "run_shards", lambda *args, **how: some)
    report.run("sample", partial(gpu_sections.sample, report, None))
    assert written(report)["sample"] == found and report.code == WRONG
    assert "ended with code -9: oops" in written(report)["errors"]["sample"]


def test_processes_without_time_or_gpu_say_so(tmp_path):
    pytest.importorskip("triton")
    report = Report(tmp_path / "gpu.json", 0.0)
    shards = run_shards(report, "correctness", 1, ("--interpret", "--quick"))
    shards.check()
    assert "correctness" not in shards.results[0] and written(report)["skipped"] == ["correctness"]
    if not torch.cuda.is_available():
        report.end += 1000
        with pytest.raises(ShardError, match="expected an NVIDIA GPU, found none"):
            run_shards(report, "layers", 1).check()


def test_a_process_that_hangs_is_stopped_after_the_budget(tmp_path, monkeypatch):
    program = tmp_path / "gpu.py"
    program.write_text("import threading\nprint('waiting', flush=True)\nthreading.Event().wait()\n")
    monkeypatch.setattr(gpu_shards, "COMMAND", program)
    monkeypatch.setattr(gpu_shards, "GRACE", 2.0)
    shards = run_shards(Report(tmp_path / "gpu.json", 0.0), "layers", 1)
    with pytest.raises(ShardError, match="(?s)did not end within the budget:.*waiting"):
        shards.check()


def test_a_share_without_time_lists_its_layers(report, monkeypatch):
    """Each of its layers takes a minute; there is time for one."""
    report.end = time.monotonic() + 60

    def check(job, engine, device):
        report.end -= 60
        return 1, 0.0, []

    monkeypatch.setattr(gpu_sections, "check", check)
    monkeypatch.setattr(
        gpu_sections, "load_engine", lambda: SimpleNamespace(tiles=SimpleNamespace())
    )
    found = gpu_sections.check_layers(report, jobs(small=True)[:3], "cpu", "1/2")
    assert len(found) == 1
    assert written(report)["skipped"] == ["correctness: the last 2 layers of share 1/2"]


def test_a_section_that_fails_is_reported_and_the_next_one_runs(report, capsys):
    def broken():
        raise ValueError("no such kernel")

    report.run("peaks", lambda: None)
    assert report.code == 0
    report.run("unet", broken)
    assert report.code == FAILED
    report.run("correctness", lambda: report.found_wrong("correctness", "W4A4: off by 2"))
    assert report.code == WRONG
    report.run("attention", lambda: report.skip("attention: 4096"))
    assert report.code == WRONG
    report.end = time.monotonic()
    report.run("blocks", broken)

    data = written(report)
    assert "ValueError: no such kernel" in data["errors"]["unet"] and len(data["errors"]) == 1
    assert data["wrong"] == {"correctness": ["W4A4: off by 2"]}
    assert data["skipped"] == ["attention: 4096", "blocks"]
    said = capsys.readouterr()
    assert "ValueError: no such kernel" in said.err and "W4A4: off by 2" in said.err
    for line in ("peaks: ok", "unet: FAILED", "correctness: WRONG", "attention: not complete"):
        assert line in said.out
    assert "skipped: attention: 4096" in said.out and "blocks: not complete (0.0 s)" in said.out


def test_a_section_runs_where_compiling_beforehand_fails(report, monkeypatch, capsys):
    shards = Shards([], ["process 0 of 1 of section layers ended with code -9:\nno memory"])
    monkeypatch.setattr(gpu_sections, "run_shards", lambda *args, **how: shards)
    report.run("layers", lambda: gpu_sections.compile_in_shards(report, "layers"))
    assert "no memory" in written(report)["errors"]["layers, compiling"]
    assert "no memory" in capsys.readouterr().err and report.code == FAILED


def test_the_headline_is_early():
    names = list(gpu_sections.SECTIONS)
    assert names[:2] == ["sample", "unet"] and names.index("peaks") < names.index("layers")


def test_the_exit_code_is_that_of_the_report(monkeypatch, tmp_path):
    """In the order of SECTIONS, whatever was asked for first."""
    ran = []

    def section(report, args, name):
        ran.append(name)
        if name == "blocks":
            raise ValueError("no such kernel")

    of = {name: partial(section, name=name) for name in ("peaks", "layers", "blocks")}
    monkeypatch.setattr(gpu, "SECTIONS", of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", dict)
    out = ["--out", str(tmp_path / "gpu.json"), "--sections"]
    assert gpu.main([*out, "layers"]) == 0 and ran == ["peaks", "layers"]
    assert gpu.main([*out, "blocks,peaks"]) == FAILED and ran[2:] == ["peaks", "blocks"]


def test_results_are_written_after_each_row(report, monkeypatch, capsys):
    """A third row that fails: two are there. So is the reason."""
    seen = []

    def layer_row(shape, batch, timer, ceiling, engine):
        seen.append(len(written(report)["layers"]) if seen else 0)
        if len(seen) > 2:
            raise ValueError("no such layer")
        return dict(shape=str(shape), batch=batch, seconds={"W4A4": 1e-6})

    monkeypatch.setattr(gpu_sections, "layer_row", layer_row)
    monkeypatch.setattr(gpu_sections, "run_shards", lambda *args, **how: Shards([], []))
    monkeypatch.setattr(gpu_sections, "load_engine", lambda: None)
    monkeypatch.setattr(gpu_sections, "Timer", lambda: None)
    layers = partial(gpu_sections.layers, report, SimpleNamespace(shard=None))
    report.run("layers", layers)
    assert "expected the section peaks before" in written(report)["errors"]["layers"] and not seen
    report.data["peaks"] = {}
    report.run("layers", layers)
    assert seen == [0, 1, 2] and [row["batch"] for row in written(report)["layers"]] == [2, 2]
    assert "no such layer" in written(report)["errors"]["layers"]
    assert f"layers: {SHAPES[1]}, batch 2 (us): W4A4 1.0" in capsys.readouterr().out


def test_fused_unets_are_compared_before_they_are_timed(report):
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

    models, error = gpu_sections.ours(fake, torch.float32, Steps())
    assert set(models) == {"", ", attention auto", ", not fused"}
    gpu_sections.compare_fused(report, "W8A8", 8, error)
    assert report.code == 0
    _, error = gpu_sections.ours(fake, torch.float32, Steps(1.0))
    gpu_sections.compare_fused(report, "W4A4", 4, error)
    assert report.code == 0
    gpu_sections.compare_fused(report, "W8A8", 8, error)
    assert written(report)["wrong"]["unet"] == [f"W8A8: fused against not fused {error:.1e}"]
