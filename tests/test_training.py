"""questlib.models.data, train, export: the archive's checks, resuming, and the whole way from data to a card in miniature."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from questlib import metrics
from questlib.errors import QuestError
from questlib.models import data, export, train
from questlib.models.loading import load_pipeline
from questlib.sampling import sample


@pytest.fixture
def emoji() -> data.EmojiData:
    g = torch.Generator().manual_seed(0)
    images = (torch.nn.functional.interpolate(torch.rand(40, 3, 4, 4, generator=g), (64, 64)) * 255).to(torch.uint8)
    return data.EmojiData(images, torch.arange(40) % 9, [f"n{i}" for i in range(40)])


def test_from_data_to_card(emoji, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "VQ_START", 1)  # two steps, so that the codebook's start is among them
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    vae = train.train_autoencoder(emoji, work, 2)
    classifier = train.train_classifier(emoji, work, 2)
    unet = train.train_unet(emoji, vae, work, 2)
    (work / "unet.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 0.25}\n')
    export.export(emoji, vae, classifier, unet, train.DDIMScheduler(**train.SCHEDULER), work, out, num_samples=16)
    folder = out / "mini-ldm4"
    assert unet.dtype == torch.float32  # the caller's models are not the halved ones
    pipe = load_pipeline(folder)
    assert pipe.vqvae.config.scaling_factor == vae.config.scaling_factor != 0.18215
    assert torch.equal(pipe.unet.conv_in.weight, unet.conv_in.weight.half().float())
    log = [json.loads(line) for line in (folder / "logs" / "unet.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in log] == [0.5, 0.25]  # of a repeated step the later line
    assert json.loads((folder / "training.json").read_text())["stages"]["unet"]["steps"] == 2
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["halves"]["count"] == [20, 20] and quality["images"] == 40
    card = (folder / "README.md").read_text()
    assert f"{quality['samples']['fid']:.3f}" in card and "0.2500" in card and data.LICENCE in card
    assert (folder / "loss.png").stat().st_size < 100_000 and (folder / "samples.png").stat().st_size < 400_000
    images = sample(pipe, 16, num_inference_steps=export.NUM_STEPS, seed=export.SEED, progress=False).images
    extractor = metrics.MiniFeatures("quest-mini", ["pooled", "spatial"], str(out / "mini-features"))
    stored = metrics.load_reference(folder / "reference.safetensors", "mini")
    assert stored.count == 40
    assert metrics.compare(metrics.statistics(images, extractor), stored)["fid"] == pytest.approx(
        quality["samples"]["fid"], rel=1e-6
    )


def test_logs_are_thinned(tmp_path):
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1000)))
    export._copy_log(source, target)
    steps = [json.loads(line)["step"] for line in target.read_text().splitlines()]
    assert len(steps) <= export.MAX_LOG_LINES + 1 and steps[0] == 0 and steps[-1] == 999


def test_resuming_gives_the_same_weights(tmp_path):
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
        return train.run_stage("classifier", model, loss, work, 600, stop)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=550)
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
    entries = [
        {"category": "Flags", "image": "a.png", "short_name": "a", "skin_variations": {"x": {"image": "b.png"}}},
        {"category": "Component", "image": "a.png", "short_name": "c"},
        {"category": "Objects", "image": "absent.png", "short_name": "d"},
    ]
    folder = "package/img/google/64/"
    got = data.load_emoji(archive(tmp_path / "a.tgz", entries, {folder + "a.png": png(), folder + "b.png": png()}))
    assert got.images.shape == (2, 3, 64, 64) and got.names == ["a", "a"] and got.labels.tolist() == [8, 8]
    assert got.images[0, :, 2, 3].tolist() == [255, 0, 0] and got.images[0, :, 0, 0].tolist() == [255, 255, 255]
    with pytest.raises(QuestError, match="expected 64x64"):
        data.load_emoji(archive(tmp_path / "b.tgz", entries[:1], {folder + "a.png": png((32, 32))}))


def test_archive_of_another_digest(tmp_path):
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(QuestError, match="sha256 .* expected fb5fd131b362"):
        data.fetch_emoji(tmp_path)


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QuestError, match="npm not found"):
        data.fetch_emoji(tmp_path / "cache")


def test_npm_fails(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QuestError, match="no network"):
        data.fetch_emoji(tmp_path / "cache")


def test_export_without_a_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export", "--out", str(tmp_path), "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        export.main()
    assert stop.value.code == 2 and "no exported models" in capsys.readouterr().err


def test_images_are_written_for_inception_and_errors_are_one_line(emoji, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "fetch_emoji", lambda work: work)
    monkeypatch.setattr(data, "load_emoji", lambda archive: emoji)
    assert data.main(["--out", str(tmp_path / "images"), "--work", str(tmp_path)]) == 0
    files = sorted((tmp_path / "images").glob("*.png"))
    assert len(files) == 40
    with Image.open(files[3]) as image:
        assert image.size == (64, 64) and image.getpixel((0, 0)) == tuple(emoji.images[3, :, 0, 0].tolist())
    monkeypatch.undo()
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    for module in (data, train):
        assert module.main(["--out", str(tmp_path / "x"), "--work", str(tmp_path / "empty")]) == 2
        err = capsys.readouterr().err
        assert "npm not found" in err and err.count("\n") == 1
