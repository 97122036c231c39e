"""Cells of class- and prompt-conditional models, on tiny random pipelines: guidance, prompts, IS and CLIP score."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import open_clip
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
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from questlib.__main__ import main
from questlib.errors import MetricError
from reproduce import datasets, notebooks, pipeline, plan
from reproduce.evaluation import drawing, features, metrics
from reproduce.evaluation.clip_score import clip_score, coco_prompts, load_clip
from reproduce.evaluation.samples import read_samples
from reproduce.models.compvis import clip_tokenizer
from reproduce.models.pipelines import ClassConditionalPipeline, ClassEmbedder
from reproduce.reporting import report
from reproduce.tables.registry import get_table

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


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
    features._load_extractor.cache_clear(), pipeline.load.cache_clear(), load_clip.cache_clear()
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
        (tmp_path / "clip").mkdir()
        save_file(
            open_clip.model.CLIP(**CLIP).state_dict(),
            tmp_path / "clip" / "open_clip_model.safetensors",
        )
        about = {"model_cfg": CLIP, "preprocess_cfg": {"size": 32}}
        (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(about))
        entries = [{"id": i, "image_id": i, "caption": f"a picture of {i} cats"} for i in range(30)]
        (tmp_path / "captions.json").write_text(json.dumps({"annotations": entries}))
        setting(
            "sd",
            model=str(tmp_path / "sd"),
            sampler="plms",
            guidance_scale=7.5,
            reference=None,
            captions=str(tmp_path / "captions.json"),
            clip=f"local-dir:{tmp_path / 'clip'}",
        )

    def make(table: str, **choices) -> plan.Plan:
        {"table4": imagenet, "table5": sd}[table]()
        return plan.make_plan(
            table, scale="smoke", results=tmp_path / "results", work=tmp_path / "work", **choices
        )

    yield make
    features._load_extractor.cache_clear(), pipeline.load.cache_clear(), load_clip.cache_clear()


def test_class_conditional_cell(conditional, monkeypatch):
    seen = []
    real = drawing.sample

    def sample(*args, **kwargs):
        seen.append((kwargs["guidance_scale"], kwargs["sampler"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(drawing, "sample", sample)
    made = conditional("table4", cells=["imagenet-w4a4-quest"])
    notebooks.preflight(made)
    result = pipeline.run_cell(made.cells[0], made)
    assert result["status"] == "done", result["reason"]
    assert set(seen) == {(3.0, "ddim")} and (result["guidance_scale"], result["dataset"]) == (
        3.0,
        "imagenet",
    )
    score = result["metrics"]["inception_score"]
    assert (
        score["value"] >= 1
        and score["paper"] == 202.45
        and score["independent"] == {"survey": 197.02}
    )
    assert result["metrics"]["clip_score"]["value"] is None
    text = report.terminal(made, report.finish(made))
    assert (
        "DDIM 2 steps, eta 0, guidance 3, 16 samples" in text
        and " IS " in text
        and "CLIP" not in text
    )


def test_prompt_conditional_cell(conditional):
    """The i-th sample has the i-th prompt, in drawing and in scoring; seeds have prompts of their own."""
    made = conditional("table5", cells=["sd-fp", "sd-w8a8-q-diffusion"], seeds=[0, 1])
    notebooks.preflight(made)
    full = pipeline.run_cell(made.cells[0], made)
    quantized = pipeline.run_cell(made.cells[1], dataclasses.replace(made, seeds=(0,)))
    assert full["status"] == quantized["status"] == "done", (full["reason"], quantized["reason"])
    setting = made.setting(made.cells[0])
    scores = []
    for seed in (0, 1):
        one = pipeline.SeedRun(made.cells[0], made, seed)
        prompts = coco_prompts(setting.captions, 16, seed)
        assert one.how["prompts"] == prompts and one.how["sampler"] == "plms"
        images = torch.cat([s.images for s in read_samples(one.samples.folder / "shards")])
        scores.append(clip_score(images, prompts, model=setting.clip))
    assert [s["metrics"]["clip_score"] for s in full["per_seed"]] == pytest.approx(scores)
    assert (full["captions"], full["clip"]) == ("captions.json", "clip")
    entry = full["metrics"]["clip_score"]
    assert entry["value"] == pytest.approx(sum(scores) / 2) and entry["paper"] == 31.50
    assert full["metrics"]["fid"]["value"] is None and full["reference"] is None
    assert quantized["metrics"]["feature_distance_to_fp"]["value"] > 0
    sides = report.side_by_side(report.finish(made))
    assert "CLIP score x100 ours" in sides and "FID paper" not in sides
    assert "verdict by distance to FP" in sides


def test_bad_captions_are_found_before_the_work(conditional, tmp_path):
    made = conditional("table5", cells=["sd-fp"])
    (tmp_path / "captions.json").write_text("{}")
    with pytest.raises(Exception, match="expected a list `annotations`"):
        notebooks.preflight(made)


def test_prompts_are_as_many_as_samples_of_the_paper():
    assert datasets.DATASETS["sd"].settings["paper"].samples_per_seed == 10_000
    assert {c.dataset for c in get_table("table5").cells} == {"sd"}


def test_pixel_cell(tiny, tmp_path, monkeypatch):
    """Table 11 without an autoencoder, from a reference taken once; the features of full precision are too, for all rows."""
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
    (
        features._load_extractor.cache_clear(),
        pipeline.load.cache_clear(),
        pipeline.FULL_FEATURES.clear(),
    )
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    assert (
        main(
            [
                "reference",
                str(tmp_path / "images.npz"),
                str(tmp_path / "r.safetensors"),
                "--features",
                "mini",
            ]
        )
        == 0
    )
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
        scale="smoke",
        results=tmp_path / "results",
        work=tmp_path / "work",
        cells=["cifar10-fp", "cifar10-w8a8-q-diffusion", "cifar10-w4a4-quest"],
    )
    notebooks.preflight(made)
    results = [pipeline.run_cell(cell, made) for cell in made.cells]
    assert [r["status"] for r in results] == ["done"] * 3, [r["reason"] for r in results]
    assert taken == [16]
    again = dataclasses.replace(
        made, seeds=(1, 2)
    )  # cell by cell, and in each seed by seed: still once a seed
    assert [pipeline.run_cell(cell, again)["status"] for cell in made.cells] == [
        "done"
    ] * 3 and taken == [16] * 3
    assert results[0]["metrics"]["fid"]["value"] > 0 and results[0]["reference"] == "r.safetensors"
    one = pipeline.SeedRun(made.cells[2], made, 0)
    full, ours = (
        torch.cat([s.images for s in read_samples(p.folder / "shards")])
        for p in (one.fp_samples, one.samples)
    )
    alone = metrics.evaluate(ours, reference=images, paired=full)  # nothing of it kept
    for name in (
        "fid",
        "sfid",
        "kid",
        "feature_distance_to_fp",
    ):  # the kept features are rounded to fp16
        assert results[2]["metrics"][name]["value"] == pytest.approx(
            alone[name], rel=2e-3, abs=1e-4
        ), name
    (
        features._load_extractor.cache_clear(),
        pipeline.load.cache_clear(),
        pipeline.FULL_FEATURES.clear(),
    )
    other = dataclasses.replace(setting, features="inception")
    monkeypatch.setitem(
        datasets.DATASETS, "cifar10", dataclasses.replace(cifar, settings={"smoke": other})
    )
    with pytest.raises(MetricError, match="holds mini features, not inception"):
        notebooks.preflight(made)
