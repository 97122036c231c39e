"""Rows of class- and prompt-conditional models, on tiny random pipelines.

Guidance, prompts, IS and CLIP score.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from kept_networks import clear_caches
from tiny_clip import save_clip
from transformers import CLIPTextConfig, CLIPTextModel

from questlib.errors import MetricError
from reproduce import datasets, notebooks, plan
from reproduce.__main__ import main
from reproduce.choices import Choices
from reproduce.evaluation import drawing, features, metrics
from reproduce.evaluation.clip_score import clip_score, coco_prompts
from reproduce.evaluation.samples import read_samples
from reproduce.models.compvis import clip_tokenizer
from reproduce.models.pipelines import ClassConditionalPipeline, ClassEmbedder
from reproduce.pipeline import run_row
from reproduce.reporting import report
from reproduce.seed_run import SeedRun
from reproduce.tables.registry import get_table


def unet(channels: int, size: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


@pytest.fixture
def conditional(tiny, tmp_path, monkeypatch):
    """make(table) -> a plan at a scale of two steps on a tiny model of the table's data set."""
    torch.manual_seed(0)
    monkeypatch.setattr(features, "MINI_FEATURES", tiny / "classifier")
    clear_caches()
    reference = str(tiny / "reference")

    def setting(name: str, **choices) -> None:
        small = dict(
            samples_per_seed=16,
            num_inference_steps=2,
            sample_batch=8,
            calib_samples=4,
            reference=reference,
        )
        new = dataclasses.replace(
            datasets.DATASETS[name], settings={"smoke": datasets.Setting(**(small | choices))}
        )
        monkeypatch.setitem(datasets.DATASETS, name, new)

    def imagenet() -> None:
        vae = VQModel(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=3,
            num_vq_embeddings=16,
            norm_num_groups=4,
            sample_size=64,
        )
        pipe = ClassConditionalPipeline(
            vae,
            unet(3, 16),
            DDIMScheduler(clip_sample=False),
            ClassEmbedder(num_classes=5, embed_dim=16),
        )
        pipe.save_pretrained(tmp_path / "cin")
        setting("imagenet", model=str(tmp_path / "cin"), guidance_scale=3.0)

    def sd() -> None:
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=49408,
            )
        )
        pipe = StableDiffusionPipeline(
            vae,
            text,
            clip_tokenizer(),
            unet(4, 8),
            PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            None,
            None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(tmp_path / "sd")
        clip = save_clip(tmp_path / "clip")
        entries = [{"id": i, "image_id": i, "caption": f"a picture of {i} cats"} for i in range(30)]
        (tmp_path / "captions.json").write_text(json.dumps({"annotations": entries}))
        setting(
            "sd",
            model=str(tmp_path / "sd"),
            sampler="plms",
            guidance_scale=7.5,
            reference=None,
            captions=str(tmp_path / "captions.json"),
            clip=clip,
        )

    def make(table: str, **choices) -> plan.Plan:
        {"table4": imagenet, "table5": sd}[table]()
        return plan.make_plan(
            table,
            Choices(scale="smoke", results=tmp_path / "results", work=tmp_path / "work", **choices),
        )

    yield make
    clear_caches()


def test_class_conditional_row(conditional, monkeypatch):
    seen = []
    real = drawing.sample

    def sample(*args, **kwargs):
        seen.append((kwargs["guidance_scale"], kwargs["sampler"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(drawing, "sample", sample)
    made = conditional("table4", rows=["imagenet-w4a4-quest"])
    notebooks.preflight(made)
    result = run_row(made.rows[0], made)
    assert result.done, result.reason
    assert set(seen) == {(3.0, "ddim")}
    how = result.conditions
    assert (how.dataset, how.sampling) == ("imagenet", datasets.Sampling("ddim", 2, 0.0, 3.0))
    assert result.metric("inception_score").value >= 1
    assert result.metric("clip_score").value is None
    frame = report.frame(report.finish(made))
    assert "IS" in frame and not any("CLIP" in head for head in frame)


def test_prompt_conditional_row(conditional):
    """The i-th sample is drawn and scored with the i-th prompt; each seed has its own prompts."""
    made = conditional("table5", rows=["sd-fp", "sd-w8a8-q-diffusion"], seeds=[0, 1])
    notebooks.preflight(made)
    full = run_row(made.rows[0], made)
    quantized = run_row(made.rows[1], made.choose(seeds=[0]))
    assert full.done and quantized.done, (full.reason, quantized.reason)
    setting = made.setting(made.rows[0])
    scores = []
    for seed in (0, 1):
        one = SeedRun(made.rows[0], made, seed)
        prompts = coco_prompts(setting.captions, 16, seed)
        assert one.how["prompts"] == prompts and one.how["sampler"] == "plms"
        images = torch.cat([s.images for s in read_samples(one.samples.folder / "shards")])
        scores.append(clip_score(images, prompts, model=setting.clip))
    assert [s.metrics["clip_score"] for s in full.seeds] == pytest.approx(scores)
    how = full.conditions
    assert (how.captions, how.clip, how.reference) == ("captions.json", "clip", None)
    assert full.metric("clip_score").value == pytest.approx(sum(scores) / 2)
    assert full.metric("fid").value is None
    assert quantized.metric("feature_distance_to_fp").value > 0
    sides = report.side_by_side(report.finish(made))
    assert "CLIP score x100 here" in sides and "FID paper" not in sides
    assert "distance to FP verdict" in sides


def test_bad_captions_are_found_before_the_work(conditional, tmp_path):
    made = conditional("table5", rows=["sd-fp"])
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(Exception, match="expected a list `annotations`"):
        notebooks.preflight(made)


def test_prompts_are_as_many_as_samples_of_the_paper():
    assert datasets.DATASETS["sd"].settings["paper"].samples_per_seed == 10_000
    assert {row.dataset for row in get_table("table5").rows} == {"sd"}


def test_pixel_row(tiny, tmp_path, monkeypatch):
    """Table 11 has no autoencoder. Reference and full precision's features are taken once."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDIMPipeline(net, DDIMScheduler()).save_pretrained(tmp_path / "cifar")
    monkeypatch.setattr(features, "MINI_FEATURES", tiny / "classifier")
    monkeypatch.setattr(features.MiniFeatures, "SIZE", 32)
    clear_caches()
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    command = ["reference", str(tmp_path / "images.npz"), str(tmp_path / "r.safetensors")]
    assert main([*command, "--features", "mini"]) == 0
    setting = dataclasses.replace(
        datasets.DATASETS["cifar10"].settings["smoke"],
        model=str(tmp_path / "cifar"),
        reference=str(tmp_path / "r.safetensors"),
        samples_per_seed=16,
        num_inference_steps=2,
        features="mini",
    )
    cifar = dataclasses.replace(datasets.DATASETS["cifar10"], settings={"smoke": setting})
    monkeypatch.setitem(datasets.DATASETS, "cifar10", cifar)
    taken, real = [], metrics.features_of
    monkeypatch.setattr(
        metrics, "features_of", lambda *args: taken.append(len(args[0])) or real(*args)
    )
    made = plan.make_plan(
        "table11",
        Choices(
            scale="smoke",
            results=tmp_path / "results",
            work=tmp_path / "work",
            rows=["cifar10-fp", "cifar10-w8a8-q-diffusion", "cifar10-w4a4-quest"],
        ),
    )
    notebooks.preflight(made)
    results = [run_row(row, made) for row in made.rows]
    assert all(r.done for r in results), [r.reason for r in results]
    assert taken == [16]
    # Row by row, and in each seed by seed: still once a seed.
    again = made.choose(seeds=[1, 2])
    assert all(run_row(row, again).done for row in made.rows)
    assert taken == [16] * 3
    assert results[0].metric("fid").value > 0
    assert results[0].conditions.reference == "r.safetensors"
    one = SeedRun(made.rows[2], made, 0)
    full, ours = (
        torch.cat([s.images for s in read_samples(p.folder / "shards")])
        for p in (one.fp_samples, one.samples)
    )
    alone = metrics.evaluate(ours, reference=images, paired=full)  # nothing of it kept
    for name in ("fid", "sfid", "kid", "feature_distance_to_fp"):
        # The kept features are rounded to fp16.
        expected = pytest.approx(alone[name], rel=2e-3, abs=1e-4)
        assert results[2].metric(name).value == expected, name
    clear_caches()
    other = dataclasses.replace(setting, features="inception")
    monkeypatch.setitem(
        datasets.DATASETS, "cifar10", dataclasses.replace(cifar, settings={"smoke": other})
    )
    with pytest.raises(MetricError, match="holds mini features, not inception"):
        notebooks.preflight(made)
