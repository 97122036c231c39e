import json

import numpy as np
import pytest
import torch

from questlib import from_pretrained
from questlib.__main__ import main
from questlib.errors import MetricError
from reproduce.evaluation import metrics
from reproduce.evaluation.features import load_extractor, statistics
from reproduce.evaluation.reference import check_features

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
        (["--set", "adaround=False"], "adaround: expected bool, found 'False'"),
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


def test_reference_taken_once(tmp_path, capsys):
    """The file gives the same metrics as the images, but for features rounded to fp16; nothing is overwritten."""
    x, out = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8), tmp_path / "r.safetensors"
    np.savez(tmp_path / "images.npz", x[:24].permute(0, 2, 3, 1).numpy())
    assert main(["reference", str(tmp_path / "images.npz"), str(out), "--features", "mini"]) == 0
    assert "mini features of 24 images of 64x64" in capsys.readouterr().out
    ours, direct = (
        metrics.evaluate(x[24:], reference=out),
        metrics.evaluate(x[24:], reference=x[:24]),
    )
    for name in ("fid", "sfid", "kid", "precision", "recall"):
        assert ours[name] == pytest.approx(direct[name], rel=1e-3, abs=1e-5), name
    assert ours["n_reference"] == 24
    with pytest.raises(MetricError, match="images are 32x32, the reference is 64x64"):
        metrics.evaluate(x[24:, :, :32, :32].contiguous(), reference=out)
    with pytest.raises(MetricError, match="holds mini features, not inception: give images"):
        check_features(out, "inception")
    before = out.read_bytes()
    assert main(["reference", str(tmp_path / "images.npz"), str(out), "--features", "mini"]) == 2
    assert (
        "a new file OUT.safetensors, this one exists" in capsys.readouterr().err
        and out.read_bytes() == before
    )
    np.savez(tmp_path / "moments.npz", mu=np.zeros(128), sigma=np.eye(128))
    assert (
        main(
            [
                "reference",
                str(tmp_path / "moments.npz"),
                str(tmp_path / "s.safetensors"),
                "--features",
                "mini",
            ]
        )
        == 2
    )
    assert "can be used as they are" in capsys.readouterr().err
    (tmp_path / "bad.safetensors").write_bytes(b"damaged")
    with pytest.raises(MetricError, match="damaged or not a reference file"):
        metrics.evaluate(x, reference=tmp_path / "bad.safetensors")


def test_reference_keeps_the_statistics_of_the_whole_data_set(tmp_path):
    """ADM's batches hold some images, and mean and covariance of many more; with or without those of the spatial features."""
    x, npz = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8), tmp_path / "adm.npz"
    whole = statistics(x, load_extractor("mini"))
    images = x[:24].permute(0, 2, 3, 1).numpy()
    pooled = dict(zip(("mu", "sigma"), whole.pooled_moments, strict=True))
    spatial = dict(zip(("mu_s", "sigma_s"), whole.spatial_moments, strict=True))
    for i, known in enumerate((pooled, pooled | spatial)):
        np.savez(npz, images, **known)
        out = tmp_path / f"{i}.safetensors"
        assert main(["reference", str(npz), str(out), "--features", "mini"]) == 0
        stored, direct = (
            metrics.evaluate(x[24:], reference=out),
            metrics.evaluate(x[24:], reference=npz),
        )
        assert stored["fid"] == direct["fid"] and stored["sfid"] == direct["sfid"]
        assert (stored["sfid"] is None) == (known is pooled)
