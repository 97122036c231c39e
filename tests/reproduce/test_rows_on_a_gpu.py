"""A table's rows on a pretended GPU: all stages, metrics and CLIP score, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import open_clip
import pytest
import torch
from pretended_gpu import GPU, GpuTensor, pretended_gpu
from safetensors.torch import save_file

import questlib
from reproduce import seed_run
from reproduce.evaluation import clip_score, features
from reproduce.evaluation.image_statistics import statistics
from reproduce.pipeline import run_row
from reproduce.seed_run import SeedRun

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def forget() -> None:
    """Networks and features that are kept in a process."""
    seed_run.load.cache_clear()
    seed_run.FULL_FEATURES.clear()
    features._load_extractor.cache_clear()
    clip_score.load_clip.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch) -> Iterator[None]:
    """This process has the pretended GPU."""
    for module in (seed_run, features, clip_score):
        monkeypatch.setattr(module, "device", lambda: GPU)
    forget()
    with pretended_gpu():
        yield
    forget()


# The pretended GPU's device is called "meta", to which torch says that nothing is copied.
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_row_that_was_stopped_goes_on(tiny_plan, on_gpu, monkeypatch):
    plan = tiny_plan()
    row = plan.table.row("bedrooms-w4a4-quest")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(questlib, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            run_row(row, plan)
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
    save_file(open_clip.model.CLIP(**CLIP).state_dict(), tmp_path / "open_clip_model.safetensors")
    about = {"model_cfg": CLIP, "preprocess_cfg": {"size": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    prompts = [f"a picture of {i} cats" for i in range(16)]
    model = f"local-dir:{tmp_path}"
    score = clip_score.clip_score(images, prompts, model=model)
    assert next(clip_score.load_clip(model)[0].parameters()).device == GPU
    assert -100 <= score <= 100
