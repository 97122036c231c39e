"""Converted checkpoints compute what the originals do; what is wrong with a file is said."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from ldm_reference import clip_state
from open_clip import tokenize
from safetensors.torch import load_file

from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import CheckpointError, ConfigError, QuestError
from reproduce.models.__main__ import main
from reproduce.models.compvis import (
    clip_tokenizer,
    convert_checkpoint,
    convert_state,
    save_pipeline,
)
from reproduce.models.compvis_components import condition_component
from reproduce.models.compvis_files import config_names, load_config, read_state_dict
from reproduce.models.loading import load_pipeline
from reproduce.models.pipelines import ClassConditionalPipeline, LatentDiffusionPipeline

KINDS = ("beds", "churches", "cin", "sd")
CLASSES = {
    "beds": (LatentDiffusionPipeline, UNet2DModel, VQModel),
    "churches": (LatentDiffusionPipeline, FixedHeadsUNet2DModel, AutoencoderKL),
    "cin": (ClassConditionalPipeline, UNet2DConditionModel, VQModel),
    "sd": (StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL),
}
ORIGINALS = ("lsun_beds256", "lsun_churches256", "cin256-v2", "sd-v1-4")
MIB = {
    "lsun_beds256": 1045.4,
    "lsun_churches256": 1125.2,
    "cin256-v2": 1529.4,
    "sd-v1-4": 3278.8,
}  # data/README.md


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def encode(vae, image: torch.Tensor) -> torch.Tensor:
    out = vae.encode(image)
    return (
        out.latents if isinstance(vae, VQModel) else out.latent_dist.mode()
    ) * vae.config.scaling_factor


def unet_output(pipe, x, t, context):
    return pipe.unet(x, t, **({} if context is None else {"encoder_hidden_states": context})).sample


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_converted_model_computes_what_the_original_does(checkpoints, kind, tmp_path):
    made = checkpoints[kind]
    save_pipeline(convert_checkpoint(made.ckpt, made.config), tmp_path / "out")
    pipe = load_pipeline(tmp_path / "out")
    assert (type(pipe), type(pipe.unet), type(pipe.vae)) == CLASSES[kind]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, pipe.unet.config.in_channels, 8, 8, generator=generator)
    t = torch.tensor([981, 21])
    context = torch.randn(
        2, 5, made.params["unet_config"]["params"].get("context_dim", 0) or 1, generator=generator
    )
    context = context if kind in ("cin", "sd") else None
    assert relative(unet_output(pipe, x, t, context), made.unet(x, t, context)) < 1e-4
    image = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    assert relative(encode(pipe.vae, image), made.vae.encode(image) * made.scale) < 1e-4
    assert pipe.vae.config.scaling_factor == pytest.approx(made.scale)
    assert relative(pipe.vae.decode(x / made.scale).sample, made.vae.decode(x / made.scale)) < 1e-4


@torch.no_grad()
def test_raw_weights_on_request_and_where_there_are_no_others(checkpoints):
    x, t = torch.ones(1, 3, 8, 8), torch.tensor([5])
    beds = checkpoints["beds"]
    raw = convert_checkpoint(beds.ckpt, beds.config, ema=False).unet(x, t).sample
    assert relative(raw, beds.raw(x, t)) < 1e-4 < relative(raw, beds.unet(x, t))
    cin = checkpoints["cin"]
    context = torch.ones(1, 1, 24)
    assert (
        relative(
            convert_checkpoint(cin.ckpt, cin.config).unet(x, t, context).sample,
            cin.unet(x, t, context),
        )
        < 1e-4
    )


@torch.no_grad()
def test_class_embedder_and_text_encoder(checkpoints):
    cin = convert_checkpoint(checkpoints["cin"].ckpt, checkpoints["cin"].config)
    assert (cin.class_embedder.config.num_classes, cin.class_embedder.null_class) == (10, 10)
    table = checkpoints["cin"].state["cond_stage_model.embedding.weight"]
    assert torch.equal(cin.class_embedder(torch.tensor([3, 10])), table[[3, 10]][:, None])
    sd = convert_checkpoint(checkpoints["sd"].ckpt, checkpoints["sd"].config)
    assert (
        sd.text_encoder.config.num_hidden_layers == 2
        and sd.text_encoder.config.hidden_act == "quick_gelu"
    )
    own = {k.removeprefix("text_model."): v for k, v in sd.text_encoder.state_dict().items()}
    theirs = {
        k.partition("text_model.")[2]: v
        for k, v in checkpoints["sd"].state.items()
        if "text_model." in k
    }
    theirs.pop("embeddings.position_ids")
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)
    image = sd(
        "a red circle",
        num_inference_steps=2,
        guidance_scale=7.5,
        height=32,
        width=32,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


def test_tokenizer_is_that_of_clip():
    texts = ["A photo of a cat, isn't it?", "  naïve café № 42!! ", "日本 🙂 a1b2", "the " * 90]
    ours = clip_tokenizer()(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    theirs = tokenize(texts)  # pads with zeros; Stable Diffusion with the end token
    end = theirs.argmax(1)
    for own, reference, n in zip(ours, theirs, end, strict=True):
        assert (
            own.shape == (77,)
            and torch.equal(own[: n + 1], reference[: n + 1])
            and (own[n:] == 49407).all()
        )


@pytest.mark.parametrize("name", ORIGINALS)
@torch.no_grad()
def test_goldens_of_the_original_implementation(quest_data, name):
    folder = quest_data / "compvis"
    pipe = convert_checkpoint(folder / f"{name}-tiny.ckpt", folder / f"{name}-tiny.yaml")
    golden = load_file(folder / f"{name}-tiny-golden.safetensors")
    assert (
        relative(
            unet_output(pipe, golden["x"], golden["timesteps"], golden.get("context")),
            golden["eps"],
        )
        < 1e-5
    )
    assert (
        relative(
            pipe.vae.decode(golden["z"] / pipe.vae.config.scaling_factor).sample, golden["decoded"]
        )
        < 1e-5
    )
    assert relative(encode(pipe.vae, golden["image"]), golden["encoded"]) < 1e-5
    if "class_labels" in golden:
        assert torch.equal(pipe.class_embedder(golden["class_labels"]), golden["context"])
        null = torch.full_like(golden["class_labels"], pipe.class_embedder.null_class)
        assert torch.equal(pipe.class_embedder(null), golden["null_context"])


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", ORIGINALS)
def test_full_size_manifests_map_key_by_key(quest_data, name, ema):
    """Every key has its place, none is left over, all shapes agree; else convert_state raises."""
    manifest = json.loads((quest_data / "compvis" / "manifests.json").read_text())[name]
    state = {k: torch.empty(s, device="meta") for k, s in manifest["state_dict"].items()}
    if ema and manifest["has_ema"]:
        unet = [k for k in state if k.startswith("model.")]
        state |= {"model_ema." + k.removeprefix("model.").replace(".", ""): state[k] for k in unet}
    params = load_config(name)
    no_effect = {"image_size", "legacy"}
    assert params["unet_config"]["params"] == {
        k: v for k, v in manifest["unet_config"].items() if k not in no_effect
    }
    assert (params["linear_start"], params["linear_end"]) == (
        manifest["linear_start"],
        manifest["linear_end"],
    )
    if name == "sd-v1-4":
        params["cond_stage_config"] = (
            "__is_unconditional__"  # the manifest stops before the text encoder
        )
    if params.get("scale_by_std"):
        state["scale_factor"] = torch.tensor(0.2)  # and lists no buffers
    pipe = convert_state(state, params, ema=ema)
    assert 4 * sum(p.numel() for p in pipe.unet.parameters()) / 2**20 == pytest.approx(
        MIB[name], abs=0.1
    )
    if manifest["classes"]:
        assert list(pipe.class_embedder.embedding.weight.shape) == manifest["classes"]


def test_full_size_text_encoder():
    """CLIP ViT-L/14's text transformer: 123,060,480 parameters."""
    with torch.device("meta"):
        state = clip_state(768, 12, 3072)
    component = condition_component(
        {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}, state
    )
    assert (
        sum(p.numel() for p in component.model.parameters()) == 123_060_480
        and component.model.config.num_attention_heads == 12
    )
    keys = {f"{component.prefix}{s.key}" for s in component.origins.values()}
    assert keys == set(state) - {"cond_stage_model.transformer.text_model.embeddings.position_ids"}


def test_command_line(checkpoints, tmp_path, capsys):
    made, out = checkpoints["sd"], tmp_path / "out"
    digest = hashlib.sha256(made.ckpt.read_bytes()).hexdigest()
    without = copy.deepcopy(made.params) | {"cond_stage_config": "__is_unconditional__"}
    config = tmp_path / "no_text.yaml"
    config.write_text(yaml.safe_dump({"model": {"params": without}}))
    assert (
        main(
            [
                "convert",
                str(made.ckpt),
                "--config",
                str(made.config),
                "--out",
                str(out),
                "--sha256",
                digest.upper(),
            ]
        )
        == 0
    )
    assert "StableDiffusionPipeline" in capsys.readouterr().out
    assert (
        main(["convert", str(made.ckpt), "--config", str(config), "--out", str(tmp_path / "b")])
        == 2
    )
    assert "unexpected: cond_stage_model.transformer" in capsys.readouterr().err
    assert (
        main(["convert", str(made.ckpt), "--config", str(made.config), "--out", str(out)]) == 2
    )  # not overwritten
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="reproduce.models convert"):
        load_pipeline(made.ckpt)


def test_no_text_encoder_is_said_and_the_folder_loads(checkpoints, tmp_path, capsys):
    made, out, ckpt = checkpoints["sd"], tmp_path / "out", tmp_path / "no_text.ckpt"
    torch.save(
        {
            "state_dict": {
                k: v for k, v in made.state.items() if not k.startswith("cond_stage_model.")
            }
        },
        ckpt,
    )
    config = tmp_path / "no_text.yaml"
    config.write_text(
        yaml.safe_dump(
            {"model": {"params": made.params | {"cond_stage_config": "__is_unconditional__"}}}
        )
    )
    assert main(["convert", str(ckpt), "--config", str(config), "--out", str(out)]) == 0
    assert "no text encoder" in capsys.readouterr().out
    assert load_pipeline(out).text_encoder is None
    with pytest.raises(CheckpointError, match="CLIP text encoder, the checkpoint has none"):
        convert_checkpoint(ckpt, made.config)


# --- what can be wrong with a checkpoint ---


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_named_and_never_executed(tmp_path, zipped):
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "x": Code(marker)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        read_state_dict(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def test_bookkeeping_of_the_training_framework_is_no_code(tmp_path, monkeypatch):
    """Real checkpoints name Lightning's callbacks and hold numpy scalars.

    None of their classes is imported.
    """
    name, path = "pytorch_lightning.callbacks", tmp_path / "lightning.ckpt"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module = ModuleType(name)
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        patch.setitem(sys.modules, name, module)
        it = callback()
        it.monitor = "val"
        kept = {callback: {"best": np.float64(1.5), "scores": np.arange(3), "it": it}}
        torch.save({"state_dict": {"a": torch.ones(3)}, "callbacks": kept}, path)
    assert torch.equal(read_state_dict(path)["a"], torch.ones(3))
    assert name not in sys.modules


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.999])
def test_truncated_checkpoint(checkpoints, tmp_path, keep):
    content = checkpoints["beds"].ckpt.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        read_state_dict(path)


def test_not_a_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="state_dict"):
        read_state_dict(tmp_path / "list.ckpt")
    with pytest.raises(ConfigError, match="no such file"):
        read_state_dict(tmp_path / "none.ckpt")


def test_wrong_digest(checkpoints):
    with pytest.raises(CheckpointError, match=f"expected sha256 {'ab' * 32}, found"):
        convert_checkpoint(checkpoints["beds"].ckpt, checkpoints["beds"].config, sha256="AB" * 32)


def test_all_missing_misshapen_and_unexpected_keys_are_listed(checkpoints):
    made = checkpoints["beds"]
    state = dict(made.state)
    gone = ["model_ema.diffusion_modelout2bias", "first_stage_model.quant_conv.bias"]
    for key in gone:
        del state[key]
    state["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(32, 4, 3, 3)
    state["model_ema.diffusion_modelmiddle_block1qkvbias"] = torch.zeros(96)
    state["first_stage_model.encoder.mid.attn_1.q.weight"] = torch.zeros(
        32, 32, 3, 3
    )  # no 1x1 convolution
    state["first_stage_model.encoder.extra"] = state["model_ema.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        convert_state(state, made.params)
    text = str(error.value)
    assert f"missing: {', '.join(gone)};" in text
    assert "input_blocks00weight [32, 4, 3, 3] (expected [32, 3, 3, 3])" in text
    assert "attn_1.q.weight [32, 32, 3, 3] (expected [32, 32])" in text
    assert (
        text.count("middle_block1qkvbias [96] (expected [288])") == 1
    )  # though q, k and v need it
    assert text.endswith("unexpected: first_stage_model.encoder.extra, model_ema.extra")
    with pytest.raises(CheckpointError, match=r"^unexpected: model\.diffusion_model\.extra$"):
        convert_state(
            made.state | {"model.diffusion_model.extra": torch.zeros(1)}, made.params, ema=False
        )


@pytest.mark.parametrize(
    "ckpt, config",
    [("beds", "churches"), ("churches", "beds"), ("beds", "cin"), ("cin", "sd"), ("sd", "cin")],
)
def test_config_of_another_model(checkpoints, ckpt, config):
    with pytest.raises(CheckpointError, match="with config"):
        convert_checkpoint(checkpoints[ckpt].ckpt, checkpoints[config].config)


def test_other_betas_than_those_of_the_training(checkpoints):
    made = checkpoints["beds"]
    with pytest.raises(CheckpointError, match="betas from 0.001500 to 0.015500"):
        convert_state(made.state, made.params | {"linear_end": 0.0155})
    with pytest.raises(CheckpointError, match="500 betas"):
        convert_state(made.state, made.params | {"timesteps": 500})


def test_wrong_kind_of_latents(checkpoints):
    made = checkpoints["beds"]
    params = copy.deepcopy(made.params)
    del params["first_stage_config"]["params"][
        "n_embed"
    ]  # then the checkpoint says how many codes there are
    assert convert_state(made.state, params).vae.config.num_vq_embeddings == 16
    state = {k: v for k, v in made.state.items() if "quantize" not in k}
    with pytest.raises(ConfigError, match="n_embed"):
        convert_state(state, params)


def test_measured_scale_factor_must_be_there(checkpoints):
    made = checkpoints["churches"]
    with pytest.raises(CheckpointError, match="scale_factor"):
        convert_state({k: v for k, v in made.state.items() if k != "scale_factor"}, made.params)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"unet_config": {"params": {}}}, "channel_mult"),
        ({"parameterization": "v"}, "parameterization eps"),
        (
            {"cond_stage_config": {"target": "x.ClassEmbedder", "params": {"embed_dim": 8}}},
            "no use_spatial_transformer",
        ),
        ({"beta_schedule": "cosine"}, "beta_schedule linear"),
        (
            {"cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder"}},
            "BERTEmbedder",
        ),
    ],
)
def test_configs_that_are_not_supported(checkpoints, change, match):
    with pytest.raises(ConfigError, match=match):
        convert_state(checkpoints["beds"].state, checkpoints["beds"].params | change)


def test_unknown_network_options_are_refused(checkpoints):
    params = copy.deepcopy(checkpoints["cin"].params)
    params["unet_config"]["params"] |= {"use_new_attention_order": True, "num_classes": 5}
    with pytest.raises(ConfigError, match="not supported: num_classes, use_new_attention_order"):
        convert_state(checkpoints["cin"].state, params)
    params = copy.deepcopy(checkpoints["beds"].params)
    params["first_stage_config"]["params"]["ddconfig"]["attn_resolutions"] = [16]
    with pytest.raises(ConfigError, match="attn_resolutions"):
        convert_state(checkpoints["beds"].state, params)


@pytest.mark.parametrize(
    "text", ["", "- 1", "model: {}", "model: {params: {unet_config: 1}}", "a: [", "\x00"]
)
def test_files_that_are_no_config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        load_config(path)


def test_embedded_configs_are_found_by_name():
    assert config_names() == sorted(ORIGINALS)
    with pytest.raises(ConfigError, match="cin256-v2"):
        load_config("cin256-v3")


def test_a_failed_save_leaves_nothing_behind(checkpoints, tmp_path, monkeypatch):
    pipe = convert_checkpoint(checkpoints["beds"].ckpt, checkpoints["beds"].config)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", full_disk)
    with pytest.raises(Exception, match="No space left"):
        save_pipeline(pipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- values that no model has ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(checkpoints, value):
    beds = checkpoints["beds"]
    state = dict(read_state_dict(beds.ckpt))
    key = "first_stage_model.decoder.conv_out.bias"
    state[key] = torch.full_like(state[key], value)
    with pytest.raises(CheckpointError, match=f"not finite: {key}"):
        convert_state(state, load_config(beds.config))
    state[key] = torch.zeros_like(state[key], dtype=torch.bool)
    with pytest.raises(CheckpointError, match=f"not floating-point: {key}"):
        convert_state(state, load_config(beds.config))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_factor_that_is_none(checkpoints, scale):
    beds = checkpoints["beds"]
    state = dict(read_state_dict(beds.ckpt)) | {"scale_factor": torch.tensor(scale)}
    with pytest.raises(CheckpointError, match="scale_factor: expected a number above 0"):
        convert_state(state, load_config(beds.config))


ODD = [True, -1, 0, 10**9, 10**30, 1e30, float("nan"), "x", None, [], {}]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_damaged_config_is_a_typed_error_or_changes_nothing(checkpoints, value):
    """Each number of the YAML in turn has a value that it cannot have."""
    beds = checkpoints["beds"]
    state = read_state_dict(beds.ckpt)
    params = load_config(beds.config)

    def changed(tree, path):
        if not path:
            return value
        return {**tree, path[0]: changed(tree[path[0]], path[1:])}

    for path in (
        ("linear_start",),
        ("linear_end",),
        ("timesteps",),
        ("image_size",),
        ("unet_config",),
        ("unet_config", "params", "num_res_blocks"),
        ("unet_config", "params", "model_channels"),
        ("unet_config", "params", "channel_mult"),
        ("first_stage_config", "params", "ddconfig", "num_res_blocks"),
        ("first_stage_config", "params", "ddconfig", "ch"),
    ):
        try:
            convert_state(state, changed(params, path))
        except QuestError as error:
            assert "\n" not in str(error)
