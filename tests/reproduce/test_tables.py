"""The tables' rows and numbers, and that a scale never switches on what a preset leaves off."""

from __future__ import annotations

import pytest

from questlib.errors import ConfigError
from reproduce.plan import make_plan
from reproduce.scales import SCALES
from reproduce.tables import all_tables, get_table


def test_paper_numbers_of_table_2():
    numbers = {c.id: (c.paper["fid"], c.paper["sfid"]) for c in get_table("table2").cells if c.preset}
    assert numbers == {
        "w8a8-te-ptq": (7.58, 22.07), "w8a8-te-fp": (6.77, 22.03), "w8a8-te-finetune": (5.61, 21.22),
        "w4a8-te-ptq": (8.59, 22.74), "w4a8-te-fp": (7.55, 21.69), "w4a8-te-finetune": (6.95, 23.17),
    }  # fmt: skip


def test_paper_numbers_of_table_3():
    cells = get_table("table3").cells
    numbers = {c.id.removeprefix("bedrooms-"): c.paper.get("fid") for c in cells}
    assert len(cells) == 16 and numbers["fp"] == 2.95
    for bits, q_diffusion, quest in (("w8a8", 4.53, 3.03), ("w4a8", 5.37, 3.26), ("w4a4", "N/A", 5.64)):
        assert numbers[f"{bits}-minmax"] is None and numbers[f"{bits}-q-diffusion"] == q_diffusion
        assert {numbers[f"{bits}-{p}"] for p in ("quest", "quest-paper", "quest-release")} == {quest}
    again = get_table("table3").cell("bedrooms-w4a4-quest").independent
    assert again == {"survey": {"fid": 8.92, "sfid": 13.21}, "QuEST issue 20": {"fid": 11.36}}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", all_tables())
def test_every_row_is_a_valid_configuration(table, scale, tmp_path):
    plan = make_plan(table, scale=scale, results=tmp_path, work=tmp_path)
    for cell in plan.cells:
        assert cell.against is None or plan.table.cell(cell.against)
        if cell.preset is None:
            continue
        config = plan.config(cell, 7)
        assert (config.seed, config.weight_bits, config.act_bits) == (7, cell.weight_bits, cell.act_bits)
        assert config.step_groups <= plan.scale.num_inference_steps
        for key, value in cell.overrides.items():
            assert getattr(config, key) == value
        if cell.preset in ("minmax", "q-diffusion"):
            assert not config.finetunes
    assert set(plan.table.picture) <= {c.id for c in plan.cells}


def test_table_2_settings(tmp_path):
    plan = make_plan("table2", scale="mini", results=tmp_path, work=tmp_path)
    ptq, fp, ours = (plan.config(plan.table.cell(f"w4a8-te-{s}"), 0) for s in ("ptq", "fp", "finetune"))
    assert (ptq.te, fp.te, ours.te) == ("ptq", "fp", "finetune")
    assert not ptq.finetunes and not fp.finetunes and ours.tla_iters > 0 and ours.cma_iters == 0
    # nothing else differs
    assert len({c.replace(te="ptq", tla_iters=0).hash() for c in (ptq, fp, ours)}) == 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(table="table9"), "expected one of table2, table3, ablation"),
        (dict(scale="huge"), "expected one of smoke, mini, paper"),
        (dict(cells=["w4a8-te-pqt"]), "w4a8-te-ptq"),
        (dict(cells=[]), "at least one"),
        (dict(seeds=[0, 0]), "different numbers"),
        (dict(seeds=[1000]), "0..999"),
        (dict(features="clip"), "mini, inception"),
        (dict(engine="gpu"), "fake, cpu, reference, triton"),
        (dict(features="inception"), "--reference"),
    ],
)
def test_wrong_choices(tmp_path, choices, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(**{"table": "table2", "scale": "smoke", "results": tmp_path, "work": tmp_path} | choices)


def test_paper_scale_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("QUEST_BEDROOMS", raising=False)
    plan = make_plan("table3", scale="paper", results=tmp_path, work=tmp_path)
    assert plan.missing.startswith("needs the LSUN-Bedrooms LDM-4 weights (--model FOLDER_OR_HUB_ID or $QUEST_BEDROOMS)")
    monkeypatch.setenv("QUEST_BEDROOMS", "somewhere")
    plan = make_plan("table3", scale="paper", results=tmp_path, work=tmp_path, reference="ref.npz")
    assert plan.missing is None and plan.model == "somewhere"
