"""python -m questlib quantize."""

import json

import pytest

from questlib import from_pretrained
from questlib.__main__ import main

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
    assert not (
        tmp_path / "finetune.pt"
    ).exists()  # of other bits into this folder it would refuse to go on


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
        (["--preset", "qest"], "preset: expected one of minmax"),
        (["--bits", "4"], "--bits: expected something like W4A4"),
        (["--bits", "W1A4"], "weight_bits: expected 2..8"),
        (["--set", "nonsense=1"], "unknown key nonsense"),
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
