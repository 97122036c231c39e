"""Dry runs: complete without weights, counted on the true architectures, near what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduce import estimate, unet_counts
from reproduce.__main__ import main
from reproduce.choices import Choices
from reproduce.datasets import DATASETS
from reproduce.plan import make_plan
from reproduce.results import Result
from reproduce.scales import SCALES
from reproduce.tables.registry import all_tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for dataset in DATASETS.values():
        for name in (dataset.model_env, dataset.reference_env, dataset.captions_env):
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("dataset", "millions", "mib"),
    [
        ("bedrooms", 274.1, 1045.4),
        ("churches", 295.0, 1125.2),
        ("imagenet", 400.9, 1529.4),
        ("sd", 859.5, 3278.8),
        ("cifar10", 35.7, 136.4),
    ],
)
def test_architectures_are_the_papers(dataset, millions, mib):
    """Weights: those of the released checkpoints."""
    found = unet_counts.model_counts(dataset, "paper", None)
    assert found.weight_bytes / 4e6 == pytest.approx(millions, abs=0.06)
    assert found.weight_bytes / 2**20 == pytest.approx(mib, abs=0.5)
    assert found.largest_kept_bytes < found.kept_bytes and found.boundary_bytes < found.kept_bytes


def test_operations_are_counted():
    """A convolution and a linear layer by hand; attention and more are the counter's."""
    import torch
    from diffusers import UNet2DModel

    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        )
    expected = 0
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d):
            expected += 2 * layer.weight.numel() * 8 * 8
        elif isinstance(layer, torch.nn.Linear):
            expected += 2 * layer.weight.numel()
    assert unet_counts.measure(unet).operations == expected > 0


@pytest.mark.parametrize("table", all_tables())
def test_dry_run_of_the_paper(table, tmp_path, monkeypatch, capsys):
    """Every row with its command, numbers and what it lacks; nothing is written or loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "reproduce.models.loading.load_pipeline", lambda *a: pytest.fail("a pipeline was loaded")
    )
    assert main([table, "--scale", "paper", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for row in all_tables()[table].rows:
        dataset = DATASETS[row.dataset]
        part = text[text.index(f"\n{row.id}: ") :].split("\n  not run: ")[0]
        command = f"python -m reproduce {table} --scale paper --rows {row.id}"
        assert f'{command} --model "${dataset.model_env}"' in part
        assert ('--captions "$QUEST_COCO"' in part) == dataset.has_captions
        assert (f'--reference "${dataset.reference_env}"' in part) == dataset.has_reference
        assert all(f"{k} {v}" in part for k, v in row.paper.items() if v is not None)
        assert "UNet evaluations" in part and "GPU hours" in part and " GB" in part
    assert text.count("not run: needs ") == len(all_tables()[table].rows)


@pytest.mark.parametrize("scale", ["smoke", "mini"])
def test_dry_run_of_embedded_models(scale, capsys):
    assert main(["table3", "--scale", scale, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert (
        "mini-ldm4 for LSUN-Bedrooms" in text and "--model" not in text and "GPU hours" not in text
    )
    assert "not run: " not in text and "estimate: none" not in text


@pytest.fixture
def no_architecture_kept():
    """Of models that a test hides, and of those that it hid."""
    unet_counts.model_counts.cache_clear()
    yield
    unet_counts.model_counts.cache_clear()


def test_dry_run_names_an_embedded_model_that_does_not_exist(
    no_architecture_kept, tmp_path, monkeypatch, capsys
):
    for module in ("datasets", "unet_counts"):
        monkeypatch.setattr(f"reproduce.{module}.MINI", tmp_path)
    assert main(["table4", "--scale", "mini", "--dry-run", "--rows", "imagenet-fp"]) == 0
    text = capsys.readouterr().out
    assert (
        "estimate: none" in text
        and "not run: needs the embedded model mini-cin, which does not exist yet" in text
    )


def test_what_is_given_stands_in_the_command(capsys):
    choices = [
        "--model",
        "my model",
        "--reference",
        "r.npz",
        "--seeds",
        "3,4",
        "--engine",
        "cpu",
        "--features",
        "inception",
    ]
    assert main(["table3", "--scale", "paper", "--dry-run", "--rows", "bedrooms-fp", *choices]) == 0
    text = capsys.readouterr().out
    assert (
        "python -m reproduce table3 --scale paper --rows bedrooms-fp --seeds 3,4 "
        "--features inception --engine cpu --model 'my model' --reference r.npz\n"
    ) in text
    assert "100,000 samples, 20,000,000 UNet evaluations" in text and "not run" not in text


def test_evaluations_of_a_sample():
    found = {name: d.settings["paper"].evaluations for name, d in DATASETS.items()}
    assert found == {
        "bedrooms": 200,
        "churches": 500,
        "imagenet": 2 * 20,
        "sd": 2 * 51,
        "dit": 2 * 50,
        "cifar10": 100,
    }


def test_counts_of_a_transformer():
    """DiT-XL/2 has 675 M weights and 118.6 G multiply-adds (Peebles & Xie 2023, Table 1 and 4).

    diffusers gives each of its 28 blocks embedders of its own.
    """
    found = unet_counts.model_counts("dit", "paper", None)
    embedders = 256 * 1152 + 1152 * 1152 + 2 * 1152 + 1001 * 1152
    weights = found.weight_bytes / 4 - 27 * embedders
    assert weights == pytest.approx(675e6, rel=0.01)
    assert found.operations / 2 == pytest.approx(118.6e9, rel=0.02)
    assert found.largest_kept_bytes < found.kept_bytes / 20


def test_hours_follow_from_counts_and_the_stated_rate():
    plan = make_plan("table3", Choices(scale="paper"), dry=True)
    full, quest = (
        estimate.estimate(plan.table.row(f"bedrooms-{c}"), plan) for c in ("fp", "w4a8-quest-paper")
    )
    operations = unet_counts.model_counts("bedrooms", "paper", None).operations
    assert full.hours == {
        "sample": pytest.approx(50_000 * 200 * operations / estimate.RATE["paper"] / 3600)
    }
    assert quest.hours["sample"] == pytest.approx(estimate.SIMULATED * full.hours["sample"])
    adaround = 20_000 * 16 * 3 * estimate.SIMULATED * operations / estimate.RATE["paper"] / 3600
    assert quest.hours["reconstruct"] == pytest.approx(adaround)
    assert quest.memory_bytes > 3 * 4 * 274.1e6


@pytest.mark.parametrize(
    ("table", "row_id"),
    [
        ("table6", "w4a8-tla-cma"),
        ("table4", "imagenet-w4a4-q-diffusion"),
        ("table8", "w4a4-quest"),
        ("table9", "bedrooms-w8a8-quest-paper"),
    ],
)
def test_estimates_are_near_what_was_measured_at_mini_scale(table, row_id):
    """Times and memory lie within a factor of 4 of the committed results.

    The first 100 MB of memory are those of any run. The rows are of the machine that the rate is
    of; Table 3 was made on a slower one, beside other work.
    """
    plan = make_plan(table, Choices(scale="mini", results=ROOT / "results"), dry=True)
    measured = Result.read(plan.row_file(row_id))
    assert measured.provenance[0]["machine"]["cpu"] == "AMD EPYC"
    found = estimate.estimate(plan.table.row(row_id), plan)
    for stage in ("sample", "reconstruct", "finetune"):
        seconds = measured.seconds[stage] * len(plan.seeds)
        estimated = found.hours[stage] * 3600
        assert seconds / 4 <= estimated <= seconds * 4
    assert measured.peak_bytes / 4 - 1e8 <= found.memory_bytes <= measured.peak_bytes * 4


def test_full_finetuning_takes_gradients_and_moments_of_all_weights():
    plan = make_plan("table8", Choices(scale="paper"), dry=True)
    full, quest = (
        estimate.estimate(plan.table.row(f"w4a8-{m}"), plan) for m in ("full-finetune", "quest")
    )
    weights = unet_counts.model_counts("bedrooms", "paper", None).weight_bytes
    assert full.memory_bytes - quest.memory_bytes == pytest.approx(
        3 * (1 - estimate.TRAINED) * weights
    )


def test_scales_all_have_a_rate():
    assert set(estimate.RATE) == set(SCALES)
