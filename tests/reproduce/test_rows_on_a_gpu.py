"""A table's rows on a pretended GPU: all stages, metrics and CLIP score, and runs that go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kept_networks import clear_caches
from pretended_gpu import GPU, GpuTensor, pretended_gpu
from tiny_clip import save_clip

from reproduce import seed_run
from reproduce.evaluation import clip_score, features
from reproduce.evaluation.image_statistics import statistics
from reproduce.pipeline import run_row
from reproduce.seed_run import SeedRun


@pytest.fixture
def on_gpu(monkeypatch) -> Iterator[None]:
    """This process has the pretended GPU."""
    for module in (seed_run, features, clip_score):
        monkeypatch.setattr(module, "device", lambda: GPU)
    clear_caches()
    with pretended_gpu():
        yield
    clear_caches()


# The pretended GPU's device is called "meta", to which torch says that nothing is copied.
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_row_that_was_stopped_goes_on(tiny_plan, on_gpu, stop_at_the_end):
    plan = tiny_plan()
    row = plan.table.row("bedrooms-w4a4-quest")

    stop_at_the_end(row, plan)
    result = run_row(row, plan)
    assert result.done, result.reason
    assert result.metric("fid").value > 0 and result.seeds[0].interrupted == 1
    one = SeedRun(row, plan, 0)
    assert one.pipe.device == GPU
    assert isinstance(next(one.pipe.unet.parameters()), GpuTensor)
    assert one.samples.done and one.checkpoint.done  # the same keys: nothing would be made again


def test_an_engine_of_the_cpu_leaves_the_gpu_alone(tiny_plan, on_gpu):
    plan = tiny_plan(engine="cpu")
    result = run_row(plan.table.row("bedrooms-w4a4-quest"), plan)
    assert result.done and result.engine == "cpu"
    assert seed_run.load(str(plan.setting(plan.rows[0]).model), "cpu")[0].device.type == "cpu"


def test_inception_is_there_and_its_features_come_back(on_gpu, monkeypatch):
    """The mini network in its place, which is quicker."""

    def small(name, layers, weights):
        net = features.MiniFeatures("quest-mini", ["pooled", "spatial"], None)
        net.has_classifier = False
        return net

    monkeypatch.setattr(features, "InceptionFeatures", small)
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    there = features.load_extractor("inception", "none")
    assert isinstance(next(there.parameters()), GpuTensor)
    found = statistics(images, there)
    assert found.pooled.device.type == "cpu"
    torch.testing.assert_close(found.pooled, statistics(images, there.cpu()).pooled)


def test_clip_scores_there(tmp_path, on_gpu):
    torch.manual_seed(0)
    model = save_clip(tmp_path / "clip")
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    prompts = [f"a picture of {i} cats" for i in range(16)]
    score = clip_score.clip_score(images, prompts, model=model)
    assert next(clip_score.load_clip(model)[0].parameters()).device == GPU
    assert -100 <= score <= 100
