"""The support table is true, and the samples of docs/pipelines.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import pytest
import tiny_cases
import tiny_parts as parts
import torch
from support_table import FAST, WRITTEN, try_pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import questlib
from reproduce.reporting import support
from reproduce.results import ResultError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pipelines.md"
QUICK = ["sdxl_half", "sd_controlnet", "sd_adapter", "kandinsky_controlnet", "sd_pag"]


def written():
    return json.loads(WRITTEN.read_text())


def test_the_table_has_every_pipeline():
    assert list(written()) == list(tiny_cases.CASES)


@pytest.mark.parametrize("name", QUICK)
def test_a_pipeline_does_what_the_table_says(name):
    assert try_pipeline(name)["outcome"] == written()[name]["outcome"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_cases.CASES if name not in QUICK])
def test_the_other_pipelines_do_what_the_table_says(name):
    assert try_pipeline(name)["outcome"] == written()[name]["outcome"]


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / support.FILE).write_text(
        '{"sd": {"outcome": "perhaps", "group": "a", "name": "b"}}'
    )
    with pytest.raises(ResultError, match=r"support\.json: expected outcome"):
        support.table(tmp_path)
    (tmp_path / support.FILE).write_text("{")
    with pytest.raises(ResultError, match=r"support\.json"):
        support.table(tmp_path)


# ---- life in a pipeline ----


def test_callbacks_and_a_pipeline_made_from_another():
    pipe, call = tiny_cases.sd()
    calibration = questlib.calibrate(pipe, calls=[call])
    config = questlib.QuantConfig.preset("minmax", 8, 8)
    pipe.unet = questlib.quantize(pipe.unet, config, calibration)
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(step)
        return tensors

    pipe(**call, callback_on_step_end=note)
    assert seen == [0, 1, 2]
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.unet is pipe.unet
    found = other(image=parts.image(), prompt="a fox", num_inference_steps=4, output_type="pt")
    assert torch.isfinite(found.images).all()


# ---- docs/pipelines.md ----


def tiny_sdxl():
    """SDXL with both text encoders."""
    config = CLIPTextConfig(**{**parts.text_encoder().config.to_dict(), "projection_dim": 16})
    second = parts.seeded(CLIPTextModelWithProjection, config)
    return tiny_cases.build(
        "StableDiffusionXLPipeline",
        unet=parts.unet_sdxl(cross_attention_dim=2 * parts.CONTEXT),
        vae=parts.vae(),
        text_encoder=parts.text_encoder(),
        text_encoder_2=second,
        tokenizer=parts.tokenizer(),
        tokenizer_2=parts.tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def in_little(code, models):
    """The same code for a small model on the CPU, with few steps and iterations."""
    code = re.sub(r'"[\w.-]+/(stable-diffusion-[\w.-]+)"', lambda m: repr(models[m[1]]), code)
    code = code.replace('.to("cuda")', "").replace("save_memory=True", "save_memory=True, **FAST")
    return re.sub(r"num_inference_steps=\d+", "num_inference_steps=3", code)


def test_the_samples_run_and_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {
        "stable-diffusion-v1-5": tiny_cases.sd_half()[0],
        "stable-diffusion-xl-base-1.0": tiny_sdxl(),
    }
    for name, pipe in models.items():
        pipe.save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in models}
    samples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(samples) == 3
    results = []
    for sample in samples:
        names = {"FAST": FAST}
        exec(compile(in_little(sample, folders), str(PAGE), "exec"), names)
        results.append(names)
    assert all(result["unet"].dtype == torch.float16 for result in results[:2])
    back = results[2]["pipe"].unet
    assert "fake" not in questlib.engine_report(back).engines()
    assert results[2]["image"].size == (32, 32)
