"""The tables' rows and numbers, and that a scale never switches on what a preset leaves off."""

from __future__ import annotations

import pytest

from questlib.config import OFF, QuantConfig
from questlib.errors import ConfigError
from reproduce.choices import Choices
from reproduce.datasets import DATASETS
from reproduce.plan import make_plan
from reproduce.scales import SCALES
from reproduce.tables.registry import all_tables


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", all_tables())
def test_every_row_is_a_valid_configuration(table, scale):
    plan = make_plan(table, Choices(scale=scale), dry=True)
    for row in plan.rows:
        assert row.against is None or plan.table.row(row.against)
        setting = plan.setting(row)
        assert setting.features in ("mini", "inception", "none") and setting.num_inference_steps > 0
        if row.full_precision:
            continue
        config = plan.config(row, 7)
        assert config.seed == 7
        assert (config.weight_bits, config.act_bits) == (row.weight_bits, row.act_bits)
        assert config.ranges.step_groups <= setting.num_inference_steps
        assert config.save_memory == (scale == "paper")
        for key, value in row.overrides.items():
            one_a_step = key == "step_groups" and value > setting.num_inference_steps
            expected = setting.num_inference_steps if one_a_step else value
            found = config.get(key)
            assert (found.enabled if key == "adaround" else found) == expected
        if row.preset in ("minmax", "q-diffusion", "ptq4dm", "ptq-d", "tfmq-dm"):
            assert not config.finetunes
    assert set(plan.table.picture) <= {row.id for row in plan.rows}


def test_the_release_has_settings_of_its_own_for_each_data_set():
    """Those of the release's scripts; a scale still shortens them."""
    found = {}
    for table, data in (
        ("table3", "bedrooms"),
        ("table3-churches", "churches"),
        ("table4", "imagenet"),
        ("table5", "sd"),
    ):
        plan = make_plan(table, Choices(scale="paper"), dry=True)
        config = plan.config(plan.table.row(f"{data}-w8a8-quest-release"), 0)
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
    mini = make_plan("table4", Choices(scale="mini"), dry=True)
    row = mini.table.row("imagenet-w8a8-quest-release")
    whole = make_plan("table4", Choices(scale="paper"), dry=True)
    assert tla_iterations(whole, row) == 24000 > tla_iterations(mini, row) > 0
    assert mini.overrides(row) == {"cma_layers": "no_context", "tla_iters": 24000}
    paper = mini.config(mini.table.row("imagenet-w8a8-quest-paper"), 0)
    assert paper.finetuning.cma_layers == "attention"  # the others are the same everywhere


def tla_iterations(plan, row) -> int:
    return plan.config(row, 0).finetuning.tla_iters


def test_table_2_settings(tmp_path):
    plan = make_plan("table2", Choices(scale="mini", results=tmp_path, work=tmp_path))
    ptq, fp, ours = (
        plan.config(plan.table.row(f"w4a8-te-{s}"), 0) for s in ("ptq", "fp", "finetune")
    )
    assert (ptq.te, fp.te, ours.te) == ("ptq", "fp", "finetune")
    assert not ptq.finetunes and not fp.finetunes
    assert ours.finetuning.tla_iters > 0 == ours.finetuning.cma_iters
    # nothing else differs
    assert len({c.replace(te="ptq", tla_iters=0).hash() for c in (ptq, fp, ours)}) == 1


@pytest.mark.parametrize(
    ("table", "choices", "message"),
    [
        ("table99", {}, "did you mean 'table9'"),
        ("table2", dict(scale="huge"), "expected one of smoke, mini, full, paper"),
        ("table2", dict(rows=["w4a8-te-pqt"]), "w4a8-te-ptq"),
        ("table2", dict(rows=[]), "expected a list of names"),
        ("table2", dict(seeds=[0, 0]), "different numbers"),
        ("table2", dict(seeds=[1000]), "0..999"),
        ("table2", dict(features="clip"), "mini, inception"),
        ("table2", dict(engine="gpu"), "fastest, fake, cpu, reference, triton"),
        ("table2", dict(features="inception"), "--reference"),
        (
            "table2",
            dict(stored=True, seeds=[0], keep_seeds=True),
            "expected no --seeds, --keep-seeds",
        ),
    ],
)
def test_wrong_choices(tmp_path, table, choices, message):
    folders = {"scale": "smoke", "results": tmp_path, "work": tmp_path}
    with pytest.raises(ConfigError, match=message):
        make_plan(table, Choices(**folders | choices))


def test_paper_scale_says_what_it_needs(monkeypatch):
    for name in ("QUEST_BEDROOMS", "QUEST_SD", "QUEST_COCO", "QUEST_CHURCHES"):
        monkeypatch.delenv(name, raising=False)
    plan = make_plan("table3", Choices(scale="paper"), dry=True)
    bedrooms, other = plan.table.row("bedrooms-fp"), plan.table.row("bedrooms-w8a8-ptq4dm")
    assert plan.missing(bedrooms).startswith(
        "needs the LSUN-Bedrooms LDM-4 weights (--model FOLDER_OR_HUB_ID or $QUEST_BEDROOMS)"
    )
    assert plan.missing(other) == plan.missing(bedrooms)
    monkeypatch.setenv("QUEST_BEDROOMS", "somewhere")
    plan = make_plan("table3", Choices(scale="paper", reference="ref.npz"), dry=True)
    assert plan.missing(bedrooms) is None and plan.setting(bedrooms).model == "somewhere"
    assert plan.setting(bedrooms).reference == "ref.npz"
    sd = make_plan("table5", Choices(scale="paper"), dry=True)
    assert sd.missing(sd.rows[0]) == (
        "needs the Stable Diffusion v1.4 weights (--model FOLDER_OR_HUB_ID or $QUEST_SD) and "
        "COCO captions, captions_val2014.json (--captions FILE or $QUEST_COCO)"
    )
    monkeypatch.setenv("QUEST_COCO", "captions.json")
    sd = make_plan("table5", Choices(scale="paper", model="a/b"), dry=True)
    assert sd.missing(sd.rows[0]) is None and sd.setting(sd.rows[0]).captions == "captions.json"


def test_settings_of_the_paper():
    """Sampler, steps, eta, guidance and calibration of the release; samples of the paper."""
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
        "dit": ("ddim", 50, 0.0, 1.5, 50_000, 256),  # this project's choice
        "cifar10": ("ddim", 100, 0.0, 1.0, 50_000, 256),
    }


def test_embedded_model_that_does_not_exist(tmp_path, monkeypatch):
    """Its rows say so and the others of the table run."""
    (tmp_path / "mini-ldm4").mkdir()
    (tmp_path / "mini-ldm4" / "model_index.json").write_text("{}")
    monkeypatch.setattr("reproduce.datasets.MINI", tmp_path)
    plan = make_plan("table9", Choices(scale="mini"), dry=True)
    missing = {row.id: plan.missing(row) for row in plan.rows}
    assert missing["bedrooms-w8a8-quest"] is None and missing["bedrooms-w8a8-tfmq-dm"] is None
    expected = "needs the embedded model mini-cin, which does not exist yet"
    assert missing["imagenet-w8a8-quest"] == expected


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
        make_plan("table9", Choices(scale="paper", reference="x"), dry=True)
    plan = make_plan(
        "table9",
        Choices(scale="paper", reference="x", model="y", rows=["imagenet-w8a8-quest"]),
        dry=True,
    )
    assert plan.missing(plan.rows[0]) is None


def test_cifar_has_an_inception_fid_or_none(monkeypatch):
    """smoke runs everywhere and takes no features, unless they are asked for.

    The environment's reference is not for it.
    """
    monkeypatch.setenv("QUEST_CIFAR10_REFERENCE", "x.safetensors")
    for scale in SCALES:
        plan = make_plan("table11", Choices(scale=scale), dry=True)
        setting = plan.setting(plan.rows[0])
        smoke = scale == "smoke"
        assert (setting.features, setting.reference) == (
            ("none", None) if smoke else ("inception", "x.safetensors")
        )
    with pytest.raises(
        ConfigError, match="takes no features at smoke scale, add --features inception"
    ):
        make_plan("table11", Choices(scale="smoke", reference="x"), dry=True)
    plan = make_plan(
        "table11", Choices(scale="smoke", reference="x", features="inception"), dry=True
    )
    assert plan.setting(plan.rows[0]).reference == "x"


def test_a_dry_plan_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_plan("table3", Choices(scale="paper"), dry=True)
    make_plan(
        "table3", Choices(scale="mini", results=tmp_path / "r", work=tmp_path / "w"), dry=True
    )
    assert not list(tmp_path.iterdir())


def test_a_budget_is_a_factor_on_every_stages_iterations():
    """The methods' own numbers are the most; a rate raised for few iterations goes down again."""
    plan = make_plan("budget", Choices(scale="mini"), dry=True)

    def numbers(row):
        config = plan.config(plan.table.row(f"bedrooms-w4a4-{row}"), 0)
        rounding = config.adaround
        return (
            (rounding.iters, rounding.lr),
            (config.act_recon.iters, config.act_recon.lr),
            (config.finetuning.tla_iters, config.finetuning.cma_iters),
        )

    rounding, acts, tuning = numbers("quest")
    tenth, tenfold = numbers("quest-tenth"), numbers("quest-tenfold")
    assert tenth[0] == pytest.approx((rounding[0] / 10, rounding[1] * 10))
    assert tenfold[0] == pytest.approx((rounding[0] * 10, rounding[1] / 10))
    assert tenth[2] == (tuning[0] / 10, tuning[1] / 10)
    own = QuantConfig.preset("quest").finetuning
    assert tenfold[2] == (tuning[0] * 10, min(tuning[1] * 10, own.cma_iters))
    fewest = QuantConfig.preset("q-diffusion").act_recon.lr
    assert numbers("q-diffusion-tenfold")[1] == (acts[0] * 10, max(acts[1] / 10, fewest))

    full = make_plan("budget", Choices(scale="full"), dry=True)
    configs = [full.config(full.table.row(f"bedrooms-w4a4-quest{b}"), 0) for b in ("", "-tenfold")]
    assert configs[0] == configs[1]


def test_the_tables_budget_shares_its_products():
    """A row without a factor is that of Table 3, or of Table 8 for full finetuning."""
    budget = make_plan("budget", Choices(scale="mini"), dry=True)
    others = {"full-finetune": ("table8", "w4a4-full-finetune")}
    for row in budget.table.rows:
        if row.full_precision or row.budget != 1:
            continue
        table, name = others.get(row.preset, ("table3", row.id))
        plan = make_plan(table, Choices(scale="mini"), dry=True)
        assert budget.config(row, 0) == plan.config(plan.table.row(name), 0)


def test_the_table_of_later_methods_shares_its_products():
    """Its rows of full precision, Q-Diffusion and QuEST are those of Tables 3 and 5."""
    later = make_plan("after-paper", Choices(scale="mini"), dry=True)
    tables = {"bedrooms": "table3", "sd": "table5"}
    shared = [row for row in later.table.rows if row.preset in (None, "q-diffusion", "quest")]
    assert len(shared) == 6
    for row in shared:
        plan = make_plan(tables[row.dataset], Choices(scale="mini"), dry=True)
        other = plan.table.row(row.id)
        assert later.setting(row) == plan.setting(other)
        if not row.full_precision:
            assert later.config(row, 0) == plan.config(other, 0)


def test_each_later_method_stands_alone_and_with_finetuning():
    later = make_plan("after-paper", Choices(scale="mini"), dry=True)
    for row in later.table.rows:
        if row.preset is None or not row.preset.endswith("-quest"):
            continue
        alone = later.table.row(row.id.removesuffix("-quest"))
        trained, plain = later.config(row, 0), later.config(alone, 0)
        assert trained.finetuning.cma_iters > 0 and trained.te == "finetune"
        assert plain.finetuning.cma_layers == "none" and plain.te != "finetune"
        assert trained.transforms == plain.transforms
        assert trained.mixed == plain.mixed
