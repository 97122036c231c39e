"""python -m questlib: quantize, sample, and what is wrong."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import questlib
from questlib import from_pretrained
from questlib.__main__ import main
from questlib.diffusion.drawing import Drawing

TINY = [
    "--samples",
    "4",
    "--steps",
    "2",
    "--set",
    "adaround_iters=1",
    "tla_iters=1",
    "cma_iters=1",
    "recon_samples=4",
    "calib_batch=4",
    "batch_size=2",
]


def test_quantize_the_shipped_model(tmp_path, capsys):
    assert main(["quantize", "mini-ldm4", "--bits", "W4A4", "--out", str(tmp_path), *TINY]) == 0
    assert "quest W4A4" in capsys.readouterr().out
    unet = from_pretrained(tmp_path)
    assert unet.quest_config.preset_name == "quest" and unet.quest_config.finetuning.tla_iters == 1
    log = json.loads((tmp_path / "log.json").read_text())
    assert [entry[0] for entry in log["finetune"]["loss"]] == ["tla", "cma"]
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(files) == {"model.safetensors", "config.json", "log.json"}  # no cache, no state
    umask = os.umask(0o022)
    os.umask(umask)
    assert set(files.values()) == {0o666 & ~umask}
    assert "_name_or_path" not in (tmp_path / "config.json").read_text()
    assert log["pipeline"] == "mini-ldm4"


def test_quantize_by_a_preset_that_finetunes_nothing(tmp_path, capsys):
    assert (
        main(
            [
                "quantize",
                "mini-ldm4",
                "--preset",
                "minmax",
                "--bits",
                "W8A8",
                "--out",
                str(tmp_path),
                *TINY[:4],
            ]
        )
        == 0
    )
    assert "minmax W8A8" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.json").read_text())["finetune"]["loss"] == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--set", "seed=3"], "--set seed: give it as --seed 3"),
        (["--preset", "qest"], "found 'qest'; did you mean 'quest'?"),
        (["--bits", "4"], "--bits: expected something like W4A4"),
        (["--bits", "W1A4"], "weight_bits: expected 2..8"),
        (["--set", "nonsense=1"], "unknown key nonsense; known keys: "),
        (["--set", "tla_itres=1"], "unknown key tla_itres; did you mean 'tla_iters'?"),
        (["--sampler", "dim"], "found 'dim'; did you mean 'ddim'?"),
        (["--set", "tla_iters"], "--set: expected KEY=VALUE"),
        (["--set", "adaround=False"], "adaround: expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, args, says):
    assert main(["quantize", "mini-ldm4", "--out", str(tmp_path), *args]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_model_and_unwritable_folder(tmp_path, capsys):
    assert main(["quantize", "mini-ldm9", "--out", str(tmp_path)]) == 2
    assert "unknown model" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["quantize", "mini-ldm4", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- sample ----


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "w8a8"
    out = ["--out", str(folder), *TINY[:4]]
    assert main(["quantize", "mini-ldm4", "--preset", "minmax", "--bits", "W8A8", *out]) == 0
    return folder


def read(folder):
    return torch.stack([pil_to_tensor(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_images_are_those_of_the_checkpoint(checkpoint, tmp_path, capsys):
    out = tmp_path / "images"
    args = ["--count", "3", "--batch-size", "2", "--steps", "2", "--seed", "5"]
    assert main(["sample", str(checkpoint), "--out", str(out), *args]) == 0
    assert "3 images" in capsys.readouterr().out
    pipe = questlib.load_pipeline("mini-ldm4")
    drawing = Drawing(pipe, unet=from_pretrained(checkpoint), num_inference_steps=2, seed=5)
    found = read(out)
    expected = torch.cat([drawing.draw(range(2)).images, drawing.draw(range(2, 3)).images])
    assert torch.equal(found, expected)
    full = tmp_path / "full"
    assert main(["sample", "mini-ldm4", "--out", str(full), *args]) == 0
    assert not torch.equal(read(full), found)


def test_precision_and_device_are_those_asked_for(checkpoint, tmp_path, capsys):
    args = ["--count", "2", "--steps", "2", "--device", "cpu"]
    for name, more, says in (
        ("full", [], "(simulated, cpu, float32)"),
        ("half", ["--dtype", "float16"], "(simulated, cpu, float16)"),
        ("integers", ["--dtype", "bfloat16", "--engine", "auto"], "(engine cpu, cpu, bfloat16)"),
        ("fused", ["--engine", "cpu", "--fuse"], "(engine cpu, fused, cpu, float32)"),
    ):
        assert main(["sample", str(checkpoint), "--out", str(tmp_path / name), *args, *more]) == 0
        assert says in capsys.readouterr().out
    full, half, integers = (read(tmp_path / name).float() for name in ("full", "half", "integers"))
    assert not torch.equal(full, half) and not torch.equal(half, integers)
    assert (full - half).abs().mean() < 8


def test_one_image_a_label_or_prompt(tmp_path):
    words = ["--prompt", "sun", "--prompt", "moon", "--guidance-scale", "3", "--steps", "2"]
    assert main(["sample", "mini-sd", "--out", str(tmp_path / "text"), *words]) == 0
    assert len(read(tmp_path / "text")) == 2
    labels = ["--labels", "1,2,3", "--steps", "2"]
    assert main(["sample", "mini-cin", "--out", str(tmp_path / "class"), *labels]) == 0
    assert len(read(tmp_path / "class")) == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["mini-ldm5"], "unknown model 'mini-ldm5'"),
        (["mini-ldm4", "--engine", "cpu"], "--engine is for a quantized checkpoint"),
        (["mini-ldm4", "--pipeline", "mini-sd"], "--pipeline is for a quantized checkpoint"),
        (["mini-ldm4", "--count", "0"], "--count and --batch-size must be >= 1, found 0"),
        (["mini-ldm4", "--prompt", "sun"], "has no text encoder"),
        (["CHECKPOINT", "--fuse"], "--fuse is of the integer engines; give --engine"),
        (["CHECKPOINT", "--engine", "cpus"], "found 'cpus'; did you mean 'cpu'?"),
        (
            ["mini-ldm4", "--dtype", "int8"],
            "--dtype: expected one of float32, float16, bfloat16, found 'int8'",
        ),
        pytest.param(
            ["mini-ldm4", "--device", "cuda"], "--device cuda: expected an NVIDIA GPU", marks=NO_GPU
        ),
        (["CHECKPOINT", "--engine", "cpu", "--device", "cuda"], "engine cpu runs on cpu"),
        (["CHECKPOINT", "--engine", "triton", "--device", "cpu"], "engine triton runs on cuda"),
        (["WITHOUT_LOG"], "does not say which pipeline it is of; give --pipeline"),
    ],
)
def test_bad_input_of_sample(checkpoint, tmp_path, capsys, args, says):
    names = {"CHECKPOINT": str(checkpoint), "WITHOUT_LOG": str(tmp_path / "copy")}
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "log.json").unlink()
    args = [names.get(arg, arg) for arg in args]
    assert main(["sample", *args, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


def test_images_are_never_overwritten(tmp_path, capsys):
    (tmp_path / "000000.png").write_text("mine")
    assert main(["sample", "mini-ldm4", "--out", str(tmp_path)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_text() == "mine"


# ---- what both command lines share ----


def test_version_and_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"questlib {questlib.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        main(["quantise"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("did you mean 'quantize'?\n")


@pytest.mark.parametrize("command", [[], ["quantize"], ["sample"]])
def test_help_ends_with_examples(capsys, command):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert "\nexamples:\n  python -m questlib " in capsys.readouterr().out
