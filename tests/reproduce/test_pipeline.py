"""Cells on a tiny random model: the result's layout, and that a run that is stopped goes on without doing anything twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import questlib
from questlib.errors import ConfigError, QuestError
from reproduce import pipeline, store
from reproduce.evaluation import drawing, metrics
from reproduce.pipeline import METRICS, SeedRun, run_cell
from reproduce.provenance import provenance, row_processors
from reproduce.reporting import report
from reproduce.store import STORE_FORMAT, Store, check_store

CELL = "bedrooms-w4a4-quest"


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each stage's function of questlib really ran."""
    counted: Counter = Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def wrapper(*args, **kwargs):
            counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("calibrate", "quantize", "finetune", "save_pretrained"):
        count(questlib, name)
    count(drawing, "denoise")
    count(metrics, "evaluate")
    return counted


def test_result_has_the_agreed_layout(tiny_plan):
    plan = tiny_plan(seeds=[0, 1])
    result = run_cell(plan.table.cell(CELL), plan)
    assert json.loads((plan.folder / f"{CELL}.json").read_text()) == result
    assert (result["table"], result["cell"], result["scale"]) == ("table3", CELL, "smoke")
    assert (result["status"], result["reason"], result["engine"]) == ("done", None, "fake")
    assert (result["preset"], result["weight_bits"], result["act_bits"]) == ("quest", 4, 4)
    assert result["seeds"] == [0, 1] and result["n_samples"] == 32 and len(result["per_seed"]) == 2
    assert set(result["metrics"]) == set(METRICS)
    for entry in result["metrics"].values():
        assert set(entry) == {"value", "std", "paper", "independent", "verdict"}
    fid = result["metrics"]["fid"]
    values = [s["metrics"]["fid"] for s in result["per_seed"]]
    assert fid["value"] == pytest.approx(sum(values) / 2) and fid["std"] == pytest.approx(
        abs(values[0] - values[1]) / 2**0.5
    )
    assert fid["paper"] == 5.64 and fid["independent"]["survey"] == 8.92
    checkpoint = next(plan.work.glob("checkpoint/*/unet/model.safetensors"))
    assert result["size_bytes"] == checkpoint.stat().st_size
    assert result["peak_bytes"] >= 0
    assert set(result["seconds"]) == {
        "calibrate",
        "ranges",
        "reconstruct",
        "finetune",
        "sample",
        "evaluate",
    }
    assert set(result["provenance"]) == {
        "commit",
        "dirty",
        "versions",
        "machine",
        "config_hash",
        "calibration_hash",
        "command",
    }
    assert len(result["model"]["sha256"]) == 64
    assert str(plan.work) not in json.dumps(result)  # no machine's paths


def test_seeds_differ_and_full_precision_samples_are_shared(tiny_plan, calls):
    plan = tiny_plan(seeds=[0, 1])
    full, minmax = (
        run_cell(plan.table.cell(c), plan) for c in ("bedrooms-fp", "bedrooms-w8a8-minmax")
    )
    assert full["per_seed"][0]["metrics"]["fid"] != full["per_seed"][1]["metrics"]["fid"]
    assert minmax["per_seed"][0]["calibration_hash"] != minmax["per_seed"][1]["calibration_hash"]
    assert full["metrics"]["psnr_to_fp"]["value"] is None  # nothing to compare with but itself
    assert minmax["metrics"]["psnr_to_fp"]["value"] > 10
    # 2 batches a seed for each of full precision and min-max, and calibration's own
    assert calls["denoise"] == 2 * 2 * 2 and calls["calibrate"] == 2


def test_second_run_makes_nothing(tiny_plan, calls):
    plan = tiny_plan()
    first = run_cell(plan.table.cell(CELL), plan)
    before = Counter(calls)
    (plan.folder / f"{CELL}.json").unlink()
    assert run_cell(plan.table.cell(CELL), plan) == first  # also the seconds: as first measured
    assert calls == before


@pytest.mark.parametrize(
    ("stop_in", "done"),
    [
        ("evaluate", {"calibrate": 1, "quantize": 1, "finetune": 1, "denoise": 4}),
        ("denoise", {"calibrate": 1, "quantize": 1}),
    ],
)
def test_stopped_run_goes_on(tiny_plan, calls, monkeypatch, stop_in, done):
    plan = tiny_plan()
    cell = plan.table.cell(CELL)
    owner = {"evaluate": metrics, "denoise": drawing}[stop_in]
    counting = getattr(owner, stop_in)
    passed = Counter()

    def stop(*args, **kwargs):
        passed["calls"] += 1
        if (
            stop_in == "denoise" and passed["calls"] < 4
        ):  # the second batch of the quantized model's samples is the fourth
            return counting(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, stop_in, stop)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, plan)
    assert not (plan.folder / f"{CELL}.json").exists()
    monkeypatch.setattr(owner, stop_in, counting)
    result = run_cell(cell, plan)
    assert result["status"] == "done"
    assert {name: calls[name] for name in done} == done  # nothing that was done ran again
    assert calls["denoise"] == 4 and calls["evaluate"] == 1
    assert result["per_seed"][0]["interrupted"] == 1


def test_stopped_and_unstopped_runs_agree(tiny_plan, monkeypatch, tmp_path):
    plan = tiny_plan()
    cell = plan.table.cell("bedrooms-w4a8-quest-paper")
    real = questlib.save_pretrained

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(questlib, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, plan)
    monkeypatch.setattr(questlib, "save_pretrained", real)
    stopped = run_cell(cell, plan)
    straight = run_cell(cell, tiny_plan().__class__(**{**vars(plan), "work": tmp_path / "other"}))
    assert stopped["metrics"] == straight["metrics"]


@pytest.mark.parametrize(
    "error", [QuestError("finetune: loss is nan"), torch.OutOfMemoryError("finetune: loss is nan")]
)
def test_failed_cell_says_why_and_the_table_goes_on(tiny_plan, monkeypatch, error):
    plan = tiny_plan(cells=["bedrooms-w8a8-minmax", "bedrooms-fp"])

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(questlib, "quantize", fail)
    results = [run_cell(cell, plan) for cell in plan.cells]
    assert [r["status"] for r in results] == ["done", "failed"]
    assert (
        results[1]["reason"] == "finetune: loss is nan"
        and results[1]["metrics"]["fid"]["value"] is None
    )
    text = report.terminal(plan, report.finish(plan))
    assert "failed (bedrooms-w8a8-minmax): finetune: loss is nan" in text
    assert "bedrooms-w8a8-q-diffusion" in text and ": not run yet" in text


def test_measured_model_is_the_one_on_disk(tiny_plan, monkeypatch):
    """Sampling sees the checkpoint that was loaded again, not the model in memory."""
    plan = tiny_plan()
    loaded = []
    real = questlib.from_pretrained
    monkeypatch.setattr(
        questlib,
        "from_pretrained",
        lambda path, engine: loaded.append(real(path, engine)) or loaded[-1],
    )
    used = []
    real_sample = drawing.sample

    def sample(*args, **kwargs):
        used.append(kwargs["unet"])
        return real_sample(*args, **kwargs)

    monkeypatch.setattr(drawing, "sample", sample)
    run_cell(plan.table.cell("bedrooms-w8a8-minmax"), plan)
    assert used[-1] is loaded[0]


def test_product_keeps_the_seconds_of_interrupted_tries(tmp_path):
    product = Store(tmp_path).product("stage", {"a": 1})

    def interrupted(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        product.make(interrupted)
    before = json.loads((product.folder / "tries.json").read_text())["seconds"]
    info = product.make(lambda folder: {"x": 1})
    assert info["x"] == 1 and info["interrupted"] == 1 and info["seconds"] > before
    assert product.make(interrupted) == info


def test_new_work_folder_is_marked_with_its_first_product(tmp_path):
    check_store(tmp_path / "absent")
    check_store(tmp_path)
    assert not any(tmp_path.iterdir())
    Store(tmp_path).product("stage", {"a": 1})
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": STORE_FORMAT}
    check_store(tmp_path)
    Store(tmp_path).product("stage", {"a": 2})
    (tmp_path / "store.json").unlink()
    with pytest.raises(ConfigError, match="products of a questlib before 0.2"):
        Store(tmp_path).product("stage", {"a": 3})


def test_samples_do_not_depend_on_global_random_state(tiny_plan):
    plan = tiny_plan(cells=["bedrooms-fp"])
    first = run_cell(plan.cells[0], plan)
    torch.manual_seed(123)
    again = run_cell(plan.cells[0], plan.__class__(**{**vars(plan), "work": plan.work / "again"}))
    assert first["metrics"] == again["metrics"]


def test_samples_that_another_process_makes_meanwhile(tiny_plan):
    """Tables share full precision's samples: the second process waits, and reads them."""
    plan = tiny_plan(cells=["bedrooms-fp"])
    first, second = (SeedRun(plan.cells[0], plan, 0) for _ in range(2))
    with ThreadPoolExecutor() as pool:
        with FileLock(first.fp_samples.folder / "lock"):
            waiting = pool.submit(second.draw, second.fp_samples, second.pipe.unet)
            time.sleep(0.5)
            assert not waiting.done()
            made = []
            first.fp_samples._make(
                lambda folder: made.append(first.draw_into(folder, first.pipe.unet)) or {}
            )
        assert torch.equal(waiting.result().images, made[0].images)


def test_result_that_is_there_is_not_overwritten_by_a_failure(tiny_plan, monkeypatch, capsys):
    plan = tiny_plan(cells=[CELL])
    done = run_cell(plan.cells[0], plan)

    def fails(*args, **kwargs):
        raise QuestError("no memory")

    monkeypatch.setattr(SeedRun, "run", fails)
    assert run_cell(plan.cells[0], plan)["status"] == "failed"
    assert json.loads((plan.folder / f"{CELL}.json").read_text()) == done
    assert "failed: no memory; the earlier result is kept" in capsys.readouterr().err


def test_numbers_that_are_read_again_keep_where_they_came_from(tiny_plan, monkeypatch):
    plan = tiny_plan(cells=[CELL])
    first = run_cell(plan.cells[0], plan)
    elsewhere = provenance() | {
        "commit": "later",
        "machine": provenance()["machine"] | {"cpu": "another"},
    }
    monkeypatch.setattr(store, "provenance", lambda: elsewhere)
    monkeypatch.setattr(pipeline, "provenance", lambda: elsewhere)
    again = run_cell(plan.cells[0], plan)
    assert again == first and "others" not in first["provenance"]
    for name in ("evaluate", "sample"):
        shutil.rmtree(plan.work / name)
    mixed = run_cell(plan.cells[0], plan)
    assert mixed["provenance"]["commit"] == "later" and [
        p["commit"] for p in mixed["provenance"]["others"]
    ] == [first["provenance"]["commit"]]
    both = sorted(["another", first["provenance"]["machine"]["cpu"]])
    assert row_processors(mixed) == mixed["per_seed"][0]["processors"] == both


@pytest.mark.parametrize("part", ["vae", "scheduler", "metric network"])
def test_another_part_of_the_pipeline_is_another_product(
    tiny_plan, tiny, tmp_path, monkeypatch, part
):
    """Only the UNet stays the same: nothing that was made with the other part is read."""
    before = SeedRun(*(plan := tiny_plan(cells=[CELL])).cells, plan, 0)
    folder = tmp_path / "other"
    shutil.copytree(tiny / "model", folder)
    if part == "vae":
        weights = load_file(folder / "vqvae" / "diffusion_pytorch_model.safetensors")
        save_file(
            {k: v * 0.5 for k, v in weights.items()},
            folder / "vqvae" / "diffusion_pytorch_model.safetensors",
        )
    elif part == "scheduler":
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.01}))
    else:
        monkeypatch.setattr(pipeline, "MINI_FEATURES", folder / "vqvae")  # any other weights
    after = SeedRun(plan.cells[0], plan := tiny_plan(cells=[CELL], model=str(folder)), 0)
    assert after.model_sha256 == before.model_sha256 and after.score.hash != before.score.hash
    assert (after.checkpoint.hash == before.checkpoint.hash) == (part == "metric network")
    assert (after.samples.hash == before.samples.hash) == (part == "metric network")


def test_integers_on_the_cpu_are_run_there(monkeypatch):
    """Where there is a GPU, too: these engines cannot run on it."""
    pipeline.load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for engine in ("cpu", "reference"):
        assert pipeline.load("mini-ldm4", engine)[0].device.type == "cpu"
    pipeline.load.cache_clear()


def test_two_processes_make_a_product_once(tmp_path):
    """The second waits for the first and reads what it made."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from reproduce.store import Store\n"
        "def build(folder):\n"
        "    with (folder / 'builds').open('a') as f: f.write('x')\n"
        "    time.sleep(0.5)\n"
        "    return {'value': 7}\n"
        "print(Store(Path(sys.argv[1])).product('stage', {'a': 1}).make(build)['value'])\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["7"] * 3
    assert next(tmp_path.glob("stage/*/builds")).read_text() == "x"
