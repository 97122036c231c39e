"""What draws a row's images: integers where the row can, and the result says what it was."""

from __future__ import annotations

import shutil

import pytest
import torch

import questlib
from questlib.errors import EngineError
from questlib.kernels.library import Kernels, kernels
from reproduce import row_engine
from reproduce.evaluation.samples import read_samples
from reproduce.pipeline import is_current, run_row
from reproduce.reporting import report
from reproduce.results import Result
from reproduce.scales import FASTEST, SCALES, SIMULATED
from reproduce.seed_run import SeedRun, load
from reproduce.table_results import TableResults

ROW = "bedrooms-w4a4-quest"
INTEGERS = "cpu" if kernels().library is None else "cpu fused"


def engine_of(plan, row: str = ROW) -> str | None:
    result = run_row(plan.table.row(row), plan)
    assert result.done, result.reason
    assert Result.read(plan.row_file(row)) == result
    assert [seed.engine for seed in result.seeds] == [result.engine]
    return result.engine


def test_a_quantized_row_is_drawn_in_integers_as_the_simulation_draws_it(tiny_plan):
    images = {}
    for engine, name in ((None, INTEGERS), ("fake", "fake"), ("cpu", "cpu")):
        plan = tiny_plan(engine=engine)
        assert engine_of(plan) == name
        run = SeedRun(plan.table.row(ROW), plan, 0)
        shards = read_samples(run.samples.folder / "shards")
        images[name] = torch.cat([shard.images for shard in shards]).float()
    for name, drawn in images.items():
        # Codes that flip by one where a value is rounded in another order: below a grey level.
        assert (drawn - images["fake"]).abs().mean() < 1, name
    assert len(list(plan.work.glob("checkpoint/*/unet"))) == 1


def test_scales_say_how_they_draw():
    drawn = {name: scale.engine for name, scale in SCALES.items()}
    assert drawn == {"smoke": FASTEST, "mini": FASTEST, "full": FASTEST, "paper": SIMULATED}


def test_full_precision_has_no_engine(tiny_plan):
    assert engine_of(tiny_plan(), "bedrooms-fp") == "full precision"


def test_without_compiled_kernels_layers_are_not_fused(tiny_plan, monkeypatch):
    monkeypatch.setattr(row_engine, "kernels", lambda: Kernels(None, "no compiler"))
    assert engine_of(tiny_plan()) == "cpu"


@pytest.mark.parametrize("why", ["no integer form", "nothing in integers"])
def test_a_row_without_integers_is_simulated_and_says_so(tiny_plan, monkeypatch, capfd, why):
    def convert(unet, engine, **how):
        if why == "no integer form":
            raise EngineError("up_blocks.0: sums could exceed 32 bits")
        return unet

    monkeypatch.setattr(questlib, "convert", convert)
    plan = tiny_plan()
    assert engine_of(plan) == "fake"
    expected = {
        "no integer form": "sums could exceed 32 bits",
        "nothing in integers": "no layer has both weights and inputs in integers",
    }
    assert f"{ROW}: drawn by the simulation: " in (said := capfd.readouterr().err)
    assert expected[why] in said


def test_an_engine_that_was_named_is_taken_or_the_row_fails(tiny_plan, monkeypatch):
    def load(*args, engine, **how):
        raise EngineError(f"{engine}: no integer form")

    monkeypatch.setattr(questlib, "from_pretrained", load)
    plan = tiny_plan(engine="cpu")
    result = run_row(plan.table.row(ROW), plan)
    assert (result.status, result.reason) == ("failed", "cpu: no integer form")


def test_the_table_says_what_drew_its_rows(tiny_plan):
    plan = tiny_plan(rows=[ROW, "bedrooms-fp"])
    for row in plan.rows:
        run_row(row, plan)
    simulated = tiny_plan(engine="fake", rows=["bedrooms-w8a8-minmax"])
    run_row(simulated.rows[0], simulated)
    assert plan.folder == simulated.folder
    said = report.conditions(report.finish(plan))
    assert f"Images of quantized rows were drawn: 1 in integers (engine {INTEGERS}), " in said
    assert "1 by simulation (bedrooms-w8a8-minmax)." in said


def test_a_row_counts_its_layers_by_how_they_ran(tiny_plan):
    """The table of later methods tells them; a rotation stands in floating point beside them."""
    ids = [f"bedrooms-w4a4-{preset}" for preset in ("quest", "rotation", "mixdq")]
    plan = tiny_plan("after-paper", rows=ids)
    counts = [run_row(row, plan).layers for row in plan.rows]
    quest, rotated, mixed = counts
    assert list(quest) == [row_engine.INTEGERS] and quest == mixed
    beside = rotated[row_engine.INTEGERS_BESIDE_FLOAT]
    linears = sum(
        isinstance(m, torch.nn.Linear)
        for name, m in load(plan.setting(plan.rows[0]).model)[0].unet.named_modules()
        if "attentions" in name
    )
    assert beside == linears
    assert sum(rotated.values()) == sum(quest.values())
    shown = report.frame(TableResults.stored(plan)).set_index(["data", "method"]).loc["bedrooms"]
    layers = sum(quest.values())
    head = "of these beside float"
    assert shown.loc["Hadamard rotation", ["layers in integers", head]].tolist() == [
        f"{layers} of {layers}",
        str(beside),
    ]
    assert shown.loc["MixDQ", head] == "0"
    assert shown.loc["SVDQuant", head] == "-"  # not run
    simulated = tiny_plan("after-paper", engine="fake", rows=ids[:1])
    assert run_row(simulated.rows[0], simulated).layers == {row_engine.SIMULATED_LAYERS: layers}


def test_simulated_rows_stay_current_where_integers_would_be_taken(tiny_plan):
    simulated, fastest = tiny_plan(engine="fake"), tiny_plan()
    row = simulated.table.row(ROW)
    run_row(row, simulated)
    assert is_current(row, fastest) and is_current(row, simulated)
    run_row(row, fastest)
    assert is_current(row, fastest)
    assert not is_current(row, simulated)  # the simulation was asked for


def test_images_of_two_engines_are_not_mixed(tiny_plan, monkeypatch):
    """The run was stopped while it drew; meanwhile the compiled kernels have gone."""
    plan = tiny_plan()
    row = plan.table.row(ROW)
    run_row(row, plan)
    folder = SeedRun(row, plan, 0).samples.folder
    (folder / "done.json").unlink()
    next(folder.glob("shards/*.safetensors")).unlink()
    shutil.rmtree(plan.work / "evaluate")
    monkeypatch.setattr(row_engine, "kernels", lambda: Kernels(None, "no compiler"))
    result = run_row(row, plan)
    if INTEGERS == "cpu":
        pytest.skip("there are no compiled kernels here")
    assert result.status == "failed"
    assert "belongs to another run (engine: expected cpu, found cpu fused)" in str(result.reason)
