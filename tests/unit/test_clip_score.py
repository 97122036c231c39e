"""CLIP score on a small random open_clip model; prompts from a made-up annotations file."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from questlib.errors import ConfigError, MetricError
from reproduce.evaluation.clip_score import (
    CLIP_MODEL,
    CLIP_PRETRAINED,
    clip_score,
    coco_prompts,
    load_clip,
)

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PROMPTS = [f"a picture of {i} {what}" for i in range(8) for what in ("cats", "dogs")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    save_file(open_clip.model.CLIP(**SMALL).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": SMALL, "preprocess_cfg": {"size": 32}})
    )
    yield f"local-dir:{folder}"
    load_clip.cache_clear()


def pictures(n: int = 16) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def test_score_equals_an_independent_float64_computation(model):
    """The same network in float64, its outputs through numpy.

    Some pairs have a negative cosine and count zero.
    """
    x = pictures()
    net, preprocess, tokenize = load_clip(model, None)
    double = open_clip.model.CLIP(**SMALL).double().eval()
    double.load_state_dict(net.state_dict())
    pixels = torch.stack(
        [preprocess(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in x]
    ).double()
    with torch.no_grad():
        a, b = double.encode_image(pixels).numpy(), double.encode_text(tokenize(PROMPTS)).numpy()
    cosines = [float(u @ v / np.sqrt((u @ u) * (v @ v))) for u, v in zip(a, b, strict=True)]
    assert min(cosines) < 0 < max(cosines)
    expected = sum(100 * max(c, 0) for c in cosines) / 16
    assert clip_score(x, PROMPTS, model=model) == pytest.approx(expected, rel=1e-4)
    assert clip_score(x, PROMPTS, model=model, batch_size=5) == pytest.approx(expected, rel=1e-4)
    assert clip_score(x, PROMPTS[::-1], model=model) != pytest.approx(
        expected, rel=1e-3
    )  # each image with its own prompt


def test_default_model_has_the_activation_that_its_weights_were_trained_with():
    assert open_clip.get_pretrained_cfg(CLIP_MODEL, CLIP_PRETRAINED)["quick_gelu"]
    assert open_clip.get_model_config(CLIP_MODEL)["quick_gelu"]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (pictures(), PROMPTS[:-1], "16 images and 15 prompts"),
        (pictures(8), PROMPTS[:8], "too few"),
        (pictures().float(), PROMPTS, "uint8"),
    ],
)
def test_bad_input(model, images, prompts, message):
    with pytest.raises(MetricError, match=message):
        clip_score(images, prompts, model=model)


@pytest.mark.parametrize("weights", ["absent", "damaged", "other activation"])
def test_model_that_cannot_be_had(tmp_path, monkeypatch, weights):
    name, pretrained = f"local-dir:{tmp_path}", None
    if weights == "damaged":
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
        (tmp_path / "open_clip_model.safetensors").write_bytes(b"damaged")
    elif weights == "other activation":
        monkeypatch.setattr(
            "open_clip.factory.download_pretrained", lambda *a, **k: str(tmp_path / "absent.pt")
        )
        name, pretrained = "ViT-B-16", "openai"
    with pytest.raises(MetricError, match="QuickGELU" if pretrained else "cannot be loaded"):
        clip_score(pictures(), PROMPTS, model=name, pretrained=pretrained)


@pytest.fixture
def annotations(tmp_path):
    """30 images with two captions each, in disorder; image 7 has an empty one first."""
    entries = [
        {"id": 1000 - 2 * i - k, "image_id": i, "caption": f" image {i},\n caption {k} "}
        for i in range(30)
        for k in (0, 1)
    ]
    entries += [{"id": 1, "image_id": 7, "caption": "  "}]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": entries}))
    return path


def test_one_caption_an_image_by_the_smallest_id(annotations):
    prompts = coco_prompts(annotations, 30)
    assert sorted(prompts) == sorted(f"image {i}, caption 1" for i in range(30))


def test_prompts_depend_on_the_seed_alone(annotations):
    first = coco_prompts(annotations, 10, seed=0)
    assert first == coco_prompts(annotations, 30, seed=0)[:10]
    assert first != coco_prompts(annotations, 10, seed=1)
    assert [int(p.split()[1].strip(",")) for p in first[:5]] == [
        2,
        28,
        13,
        10,
        26,
    ]  # frozen: the paper table depends on it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a list"),
        ("[]", "expected a list"),
        ('{"annotations": [{"id": 1, "caption": "x"}]}', "image_id"),
        ('{"annotations": [{"id": 1, "image_id": 1, "caption": null}]}', "expected a list"),
        (
            '{"annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}',
            "1 images with captions, asked for 10000",
        ),
    ],
)
def test_bad_annotations(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        coco_prompts(path)


def test_no_annotations(tmp_path, annotations):
    with pytest.raises(ConfigError, match="cannot be read"):
        coco_prompts(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="asked for 0"):
        coco_prompts(annotations, 0)
