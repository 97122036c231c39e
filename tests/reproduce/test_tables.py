"""The tables' rows and numbers, and that a scale never switches on what a preset leaves off."""

from __future__ import annotations

import pytest

from questlib.config import OFF
from questlib.errors import ConfigError
from reproduce.datasets import DATASETS
from reproduce.plan import make_plan
from reproduce.results import empty_result
from reproduce.scales import SCALES
from reproduce.tables.registry import all_tables


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", all_tables())
def test_every_row_is_a_valid_configuration(table, scale):
    plan = make_plan(table, scale=scale, dry=True)
    for cell in plan.cells:
        assert cell.against is None or plan.table.cell(cell.against)
        setting = plan.setting(cell)
        assert setting.features in ("mini", "inception", "none") and setting.num_inference_steps > 0
        if cell.preset is None:
            continue
        config = plan.config(cell, 7)
        assert (config.seed, config.weight_bits, config.act_bits) == (
            7,
            cell.weight_bits,
            cell.act_bits,
        )
        assert config.ranges.step_groups <= setting.num_inference_steps
        assert config.save_memory == (scale == "paper")
        for key, value in cell.overrides.items():
            one_a_step = key == "step_groups" and value > setting.num_inference_steps
            assert getattr(config, key) == (setting.num_inference_steps if one_a_step else value)
        if cell.preset in ("minmax", "q-diffusion", "ptq4dm", "ptq-d", "tfmq-dm"):
            assert not config.finetunes
    assert set(plan.table.picture) <= {c.id for c in plan.cells}


def test_the_release_has_settings_of_its_own_for_each_data_set():
    """../shared/paper/method.md's table; what a data set adds is in the row, and a scale still shortens it."""
    found = {}
    for table, data in (
        ("table3", "bedrooms"),
        ("table3-churches", "churches"),
        ("table4", "imagenet"),
        ("table5", "sd"),
    ):
        plan = make_plan(table, scale="paper", dry=True)
        config = plan.config(plan.table.cell(f"{data}-w8a8-quest-release"), 0)
        found[data] = (
            config.ranges.act_range,
            config.softmax_bits,
            config.finetuning.cma_layers,
            config.finetuning.cma_local_loss,
            config.ranges.step_groups,
        )
    assert found == {
        "bedrooms": ("minmax", 8, "qkv", False, 20),
        "churches": ("percentile", 8, "qkv", False, 20),
        "imagenet": ("minmax", 8, "no_context", False, 20),
        "sd": ("percentile", OFF, "feed_forward", True, 25),
    }
    mini = make_plan("table4", scale="mini", dry=True)
    cell = mini.table.cell("imagenet-w8a8-quest-release")
    assert (
        plan_iterations(make_plan("table4", scale="paper", dry=True), cell)
        == 24000
        > plan_iterations(mini, cell)
        > 0
    )
    assert empty_result(cell, mini, "not run", None)["overrides"] == {
        "cma_layers": "no_context",
        "tla_iters": 24000,
    }
    paper = mini.config(mini.table.cell("imagenet-w8a8-quest-paper"), 0)
    assert paper.finetuning.cma_layers == "attention"  # the others are the same everywhere


def plan_iterations(plan, cell) -> int:
    return plan.config(cell, 0).tla_iters


def test_table_2_settings(tmp_path):
    plan = make_plan("table2", scale="mini", results=tmp_path, work=tmp_path)
    ptq, fp, ours = (
        plan.config(plan.table.cell(f"w4a8-te-{s}"), 0) for s in ("ptq", "fp", "finetune")
    )
    assert (ptq.te, fp.te, ours.te) == ("ptq", "fp", "finetune")
    assert (
        not ptq.finetunes
        and not fp.finetunes
        and ours.finetuning.tla_iters > 0
        and ours.finetuning.cma_iters == 0
    )
    # nothing else differs
    assert len({c.replace(te="ptq", tla_iters=0).hash() for c in (ptq, fp, ours)}) == 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(table="table99"), "expected one of table2, table3, table3-churches"),
        (dict(scale="huge"), "expected one of smoke, mini, paper"),
        (dict(cells=["w4a8-te-pqt"]), "w4a8-te-ptq"),
        (dict(cells=[]), "at least one"),
        (dict(seeds=[0, 0]), "different numbers"),
        (dict(seeds=[1000]), "0..999"),
        (dict(features="clip"), "mini, inception"),
        (dict(engine="gpu"), "fake, cpu, reference, triton"),
        (dict(features="inception"), "--reference"),
        (dict(stored=True, seeds=[0], keep_seeds=True), "expected no --seeds, --keep-seeds"),
    ],
)
def test_wrong_choices(tmp_path, choices, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(
            **{"table": "table2", "scale": "smoke", "results": tmp_path, "work": tmp_path} | choices
        )


def test_paper_scale_says_what_it_needs(monkeypatch):
    for name in ("QUEST_BEDROOMS", "QUEST_SD", "QUEST_COCO", "QUEST_CHURCHES"):
        monkeypatch.delenv(name, raising=False)
    plan = make_plan("table3", scale="paper", dry=True)
    bedrooms, other = plan.table.cell("bedrooms-fp"), plan.table.cell("bedrooms-w8a8-ptq4dm")
    assert plan.missing(bedrooms).startswith(
        "needs the LSUN-Bedrooms LDM-4 weights (--model FOLDER_OR_HUB_ID or $QUEST_BEDROOMS)"
    )
    assert plan.missing(other) == plan.missing(bedrooms)
    monkeypatch.setenv("QUEST_BEDROOMS", "somewhere")
    plan = make_plan("table3", scale="paper", dry=True, reference="ref.npz")
    assert plan.missing(bedrooms) is None and plan.setting(bedrooms).model == "somewhere"
    assert plan.setting(bedrooms).reference == "ref.npz"
    sd = make_plan("table5", scale="paper", dry=True)
    assert sd.missing(sd.cells[0]) == (
        "needs the Stable Diffusion v1.4 weights (--model FOLDER_OR_HUB_ID or $QUEST_SD) and "
        "COCO captions, captions_val2014.json (--captions FILE or $QUEST_COCO)"
    )
    monkeypatch.setenv("QUEST_COCO", "captions.json")
    sd = make_plan("table5", scale="paper", dry=True, model="a/b")
    assert sd.missing(sd.cells[0]) is None and sd.setting(sd.cells[0]).captions == "captions.json"


def test_settings_of_the_paper():
    """Sampler, steps, eta, guidance and calibration of the official release; samples of the paper."""
    found = {
        name: (
            s.sampler,
            s.num_inference_steps,
            s.eta,
            s.guidance_scale,
            s.samples_per_seed,
            s.calib_samples,
        )
        for name, d in DATASETS.items()
        for s in (d.settings["paper"],)
    }
    assert found == {
        "bedrooms": ("ddim", 200, 1.0, 1.0, 50_000, 256),
        "churches": ("ddim", 500, 0.0, 1.0, 50_000, 256),
        "imagenet": ("ddim", 20, 0.0, 3.0, 50_000, 256),
        "sd": ("plms", 50, 0.0, 7.5, 10_000, 128),
        "cifar10": ("ddim", 100, 0.0, 1.0, 50_000, 256),
    }


def test_embedded_model_that_does_not_exist(tmp_path, monkeypatch):
    """Its rows say so and the others of the table run."""
    (tmp_path / "mini-ldm4").mkdir()
    (tmp_path / "mini-ldm4" / "model_index.json").write_text("{}")
    monkeypatch.setattr("reproduce.datasets.MINI", tmp_path)
    plan = make_plan("table9", scale="mini", dry=True)
    missing = {cell.id: plan.missing(cell) for cell in plan.cells}
    assert missing["bedrooms-w8a8-quest"] is None and missing["bedrooms-w8a8-tfmq-dm"] is None
    assert (
        missing["imagenet-w8a8-quest"]
        == "needs the embedded model mini-cin, which does not exist yet"
    )


def test_embedded_model_without_its_captions(tmp_path, monkeypatch):
    (tmp_path / "mini-sd").mkdir()
    (tmp_path / "mini-sd" / "model_index.json").write_text("{}")
    for name, place in (
        ("MINI", tmp_path),
        ("SD_CAPTIONS", str(tmp_path / "mini-sd" / "captions.json")),
    ):
        monkeypatch.setattr(f"reproduce.datasets.{name}", place)
    sd = DATASETS["sd"]
    setting = sd.setting("mini", captions=str(tmp_path / "mini-sd" / "captions.json"))
    assert (
        sd.missing(setting)
        == "needs the captions of mini-sd, captions.json, which do not exist yet"
    )
    (tmp_path / "mini-sd" / "captions.json").write_text("{}")
    assert sd.missing(setting) is None


def test_model_and_reference_are_of_one_data_set():
    with pytest.raises(ConfigError, match="bedrooms, imagenet"):
        make_plan("table9", scale="paper", dry=True, reference="x")
    plan = make_plan(
        "table9", scale="paper", dry=True, reference="x", model="y", cells=["imagenet-w8a8-quest"]
    )
    assert plan.missing(plan.cells[0]) is None


def test_cifar_has_an_inception_fid_or_none(monkeypatch):
    """smoke runs everywhere and takes no features, unless they are asked for; the environment's reference is not for it."""
    monkeypatch.setenv("QUEST_CIFAR10_REFERENCE", "x.safetensors")
    for scale in SCALES:
        plan = make_plan("table11", scale=scale, dry=True)
        setting = plan.setting(plan.cells[0])
        smoke = scale == "smoke"
        assert (setting.features, setting.reference) == (
            ("none", None) if smoke else ("inception", "x.safetensors")
        )
    with pytest.raises(
        ConfigError, match="takes no features at smoke scale, add --features inception"
    ):
        make_plan("table11", scale="smoke", dry=True, reference="x")
    plan = make_plan("table11", scale="smoke", dry=True, reference="x", features="inception")
    assert plan.setting(plan.cells[0]).reference == "x"


def test_a_dry_plan_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_plan("table3", scale="paper", dry=True)
    make_plan("table3", scale="mini", dry=True, results=tmp_path / "r", work=tmp_path / "w")
    assert not list(tmp_path.iterdir())
