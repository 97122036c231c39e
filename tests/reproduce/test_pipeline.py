"""Rows on a tiny random model: what a result has, and that a run that is stopped goes on.

Nothing is made twice.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import questlib
from questlib.diffusion import drawing as denoising
from questlib.distributed import cpu_threads
from questlib.errors import ConfigError, QuestError
from questlib.kernels.library import kernels
from reproduce import seed_run, store
from reproduce.evaluation import drawing, metrics
from reproduce.pipeline import is_current, run_row
from reproduce.provenance import provenance
from reproduce.reporting import report
from reproduce.results import Result, Status
from reproduce.seed_run import SeedRun
from reproduce.store import STORE_FORMAT, ArtifactStore, check_store

ROW = "bedrooms-w4a4-quest"


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
    count(denoising, "denoise")
    count(metrics, "evaluate")
    return counted


# ---- what a result has ----


def test_a_result_says_what_was_run(tiny_plan):
    plan = tiny_plan(seeds=[0, 1])
    result = run_row(plan.table.row(ROW), plan)
    path = plan.row_file(ROW)
    assert Result.read(path) == result
    assert (result.table, result.row, result.scale) == ("table3", ROW, "smoke")
    drawn = "cpu" if kernels().library is None else "cpu fused"
    assert (result.status, result.reason, result.engine) == (Status.DONE, None, drawn)
    assert [s.seed for s in result.seeds] == [0, 1] and result.n_samples == 32
    assert result.conditions.model.id == "model" and len(result.conditions.model.sha256) == 64
    checkpoint = next(plan.work.glob("checkpoint/*/unet/model.safetensors"))
    assert result.size_bytes == checkpoint.stat().st_size
    assert result.peak_bytes >= 0
    stages = {"calibrate", "ranges", "reconstruct", "finetune", "sample", "evaluate"}
    assert set(result.seconds) == stages
    assert result.provenance == (provenance(),) and result.command == plan.command
    assert str(plan.work) not in path.read_text()  # no machine's paths


def test_seeds_differ_and_full_precision_samples_are_shared(tiny_plan, calls):
    plan = tiny_plan(seeds=[0, 1])
    full, minmax = (
        run_row(plan.table.row(row), plan) for row in ("bedrooms-fp", "bedrooms-w8a8-minmax")
    )
    assert full.seeds[0].metrics["fid"] != full.seeds[1].metrics["fid"]
    assert minmax.seeds[0].calibration_hash != minmax.seeds[1].calibration_hash
    assert full.metric("psnr_to_fp").value is None  # nothing to compare with but itself
    assert minmax.metric("psnr_to_fp").value > 10
    # Two batches a seed for each of full precision and min-max, and calibration's own.
    assert calls["denoise"] == 2 * 2 * 2 and calls["calibrate"] == 2


def test_failed_row_says_why_and_the_table_goes_on(tiny_plan, monkeypatch):
    plan = tiny_plan(rows=["bedrooms-w8a8-minmax", "bedrooms-fp"])
    for error in (QuestError("finetune: loss is nan"), torch.OutOfMemoryError("no memory")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(questlib, "quantize", fail)
        full, failed = (run_row(row, plan) for row in plan.rows)
        assert full.done and full.row == "bedrooms-fp"
        assert (failed.status, failed.reason) == (Status.FAILED, str(error))
        assert failed.metric("fid").value is None
        reasons = report.reasons(report.finish(plan))
        assert f"failed (bedrooms-w8a8-minmax): {error}" in reasons
        assert any("bedrooms-w8a8-q-diffusion" in line and "not run" in line for line in reasons)


def test_result_that_is_there_is_not_overwritten_by_a_failure(tiny_plan, monkeypatch, capsys):
    plan = tiny_plan(rows=[ROW])
    done = run_row(plan.rows[0], plan)

    def fails(*args, **kwargs):
        raise QuestError("no memory")

    monkeypatch.setattr(questlib, "from_pretrained", fails)
    shutil.rmtree(plan.work / "evaluate")
    assert run_row(plan.rows[0], plan).status == Status.FAILED
    assert Result.read(plan.row_file(ROW)) == done
    assert "failed: no memory; the earlier result is kept" in capsys.readouterr().err


def test_a_row_of_an_older_layout_is_made_again_but_not_lost_by_a_failure(tiny_plan, monkeypatch):
    plan = tiny_plan(rows=["bedrooms-fp"])
    path = plan.row_file("bedrooms-fp")
    older = json.dumps({"cell": "bedrooms-fp", "status": "done"})
    path.write_text(older)
    assert not is_current(plan.rows[0], plan)

    def fails(*args, **kwargs):
        raise QuestError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "evaluate", fails)
        assert run_row(plan.rows[0], plan).status == Status.FAILED
    assert path.read_text() == older
    made = run_row(plan.rows[0], plan)
    assert made.done and Result.read(path) == made


def test_stored_rows_are_read_and_nothing_is_run(tiny_plan, calls):
    plan = tiny_plan()
    row = plan.table.row("bedrooms-fp")
    made = run_row(row, plan)
    before = Counter(calls)
    stored = tiny_plan(stored=True)
    assert run_row(row, stored) == made
    assert run_row(plan.table.row(ROW), stored).status == Status.NOT_RUN
    assert calls == before


def test_numbers_that_are_read_again_keep_where_they_came_from(tiny_plan, monkeypatch):
    plan = tiny_plan(rows=[ROW])
    first = run_row(plan.rows[0], plan)
    (here,) = first.provenance
    machine = here["machine"] | {"cpu": "another"}
    elsewhere = here | {"commit": "later", "machine": machine}
    monkeypatch.setattr(store, "provenance", lambda: elsewhere)
    assert run_row(plan.rows[0], plan) == first
    for name in ("evaluate", "sample"):
        shutil.rmtree(plan.work / name)
    mixed = run_row(plan.rows[0], plan)
    assert mixed.provenance == (elsewhere, here)
    both = tuple(sorted(["another", here["machine"]["cpu"]]))
    assert mixed.seeds[0].processors == both


# ---- what is current ----


def test_a_result_is_current_while_a_run_would_make_the_same(tiny_plan):
    plan = tiny_plan(rows=["bedrooms-w8a8-minmax"])
    (row,) = plan.rows
    assert not is_current(row, plan)
    result = run_row(row, plan)
    assert is_current(row, plan)
    assert not is_current(row, tiny_plan(seeds=[0, 1]))
    (seed,) = result.seeds
    for stage, current in (("sample", False), ("checkpoint", False), ("evaluate", True)):
        other = dataclasses.replace(seed, artifacts=seed.artifacts | {stage: "0"})
        dataclasses.replace(result, seeds=(other,)).write(plan.row_file(row.id))
        assert is_current(row, plan) == current, stage
    conditions = dataclasses.replace(result.conditions, reference="other")
    dataclasses.replace(result, conditions=conditions).write(plan.row_file(row.id))
    assert not is_current(row, plan)


# ---- runs that go on ----


def test_second_run_makes_nothing(tiny_plan, calls):
    plan = tiny_plan()
    first = run_row(plan.table.row(ROW), plan)
    before = Counter(calls)
    plan.row_file(ROW).unlink()
    assert run_row(plan.table.row(ROW), plan) == first  # also the seconds: as first measured
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
    row = plan.table.row(ROW)
    owner = {"evaluate": metrics, "denoise": denoising}[stop_in]
    counting = getattr(owner, stop_in)
    passed: Counter = Counter()

    def stop(*args, **kwargs):
        passed["calls"] += 1
        # The second batch of the quantized model's samples is the fourth.
        if stop_in == "denoise" and passed["calls"] < 4:
            return counting(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, stop_in, stop)
    with pytest.raises(KeyboardInterrupt):
        run_row(row, plan)
    assert not plan.row_file(ROW).exists()
    monkeypatch.setattr(owner, stop_in, counting)
    result = run_row(row, plan)
    assert result.done
    assert {name: calls[name] for name in done} == done  # nothing that was done ran again
    assert calls["denoise"] == 4 and calls["evaluate"] == 1
    assert result.seeds[0].interrupted == 1


def test_stopped_and_unstopped_runs_agree(tiny_plan, stop_at_the_end, tmp_path):
    plan = tiny_plan()
    row = plan.table.row("bedrooms-w4a8-quest-paper")

    stop_at_the_end(row, plan)
    stopped = run_row(row, plan)
    straight = run_row(row, plan.choose(work=tmp_path / "other"))
    assert stopped.seeds[0].metrics == straight.seeds[0].metrics


def test_samples_do_not_depend_on_global_random_state(tiny_plan):
    plan = tiny_plan(rows=["bedrooms-fp"])
    first = run_row(plan.rows[0], plan)
    torch.manual_seed(123)
    again = run_row(plan.rows[0], plan.choose(work=plan.work / "again"))
    assert first.seeds[0].metrics == again.seeds[0].metrics


def test_measured_model_is_the_one_on_disk(tiny_plan, monkeypatch):
    """Sampling sees the checkpoint that was loaded again, not the model in memory."""
    plan = tiny_plan(engine="fake")
    loaded, used = [], []
    real, real_sample = questlib.from_pretrained, drawing.sample

    def load(path, **how):
        loaded.append(real(path, **how))
        return loaded[-1]

    def sample(*args, **kwargs):
        used.append(kwargs["unet"])
        return real_sample(*args, **kwargs)

    monkeypatch.setattr(questlib, "from_pretrained", load)
    monkeypatch.setattr(drawing, "sample", sample)
    run_row(plan.table.row("bedrooms-w8a8-minmax"), plan)
    assert used[-1] is loaded[0]


def test_samples_that_another_process_makes_meanwhile(tiny_plan, monkeypatch):
    """Tables share full precision's samples: the second one waits, and reads them."""
    plan = tiny_plan(rows=["bedrooms-fp"])
    runs = [SeedRun(plan.rows[0], plan, 0) for _ in range(2)]
    started = threading.Barrier(2)
    drawn: Counter = Counter()
    real = denoising.denoise

    def denoise(*args, **kwargs):
        drawn["batches"] += 1
        return real(*args, **kwargs)

    def draw(run: SeedRun) -> torch.Tensor:
        started.wait()
        return run.draw(run.fp_samples, run.pipe.unet).images

    monkeypatch.setattr(denoising, "denoise", denoise)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(draw, runs)
    assert torch.equal(first, second)
    assert drawn["batches"] == 2


# ---- artifacts ----


def test_artifact_keeps_the_seconds_of_interrupted_tries(tmp_path):
    artifact = ArtifactStore(tmp_path).artifact("stage", {"a": 1})

    def interrupted(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifact.make(interrupted)
    before = json.loads((artifact.folder / "tries.json").read_text())["seconds"]
    info = artifact.make(lambda folder: {"x": 1})
    assert info["x"] == 1 and info["interrupted"] == 1 and info["seconds"] > before
    assert artifact.make(interrupted) == info


def test_work_that_was_stopped_goes_on_with_as_many_threads(tmp_path, capsys):
    artifact = ArtifactStore(tmp_path).artifact("stage", {"a": 1})

    def interrupted(folder):
        raise KeyboardInterrupt

    with cpu_threads(2), pytest.raises(KeyboardInterrupt):
        artifact.make(interrupted)
    with cpu_threads(1):
        info = artifact.make(lambda folder: {"found": torch.get_num_threads()})
        assert torch.get_num_threads() == 1
    assert info["found"] == info["provenance"]["threads"] == 2
    assert "goes on with 2 threads, as it began, not with 1" in capsys.readouterr().err


def test_new_work_folder_is_marked_with_its_first_artifact(tmp_path):
    check_store(tmp_path / "absent")
    check_store(tmp_path)
    assert not any(tmp_path.iterdir())
    ArtifactStore(tmp_path).artifact("stage", {"a": 1})
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": STORE_FORMAT}
    check_store(tmp_path)
    ArtifactStore(tmp_path).artifact("stage", {"a": 2})
    (tmp_path / "store.json").unlink()
    with pytest.raises(ConfigError, match="artifacts of a questlib before 0.2"):
        ArtifactStore(tmp_path).artifact("stage", {"a": 3})


def make_once(root: Path, started, answers) -> None:
    """Make an artifact in a process of its own; three have to be started before one ends."""

    def build(folder: Path) -> dict[str, int]:
        with (folder / "builds").open("a") as file:
            file.write("x")
        for _ in range(3):
            assert started.acquire(timeout=120)
        return {"value": 7}

    artifact = ArtifactStore(root).artifact("stage", {"a": 1})
    started.release()
    answers.put(artifact.make(build)["value"])


def test_processes_make_an_artifact_once(tmp_path):
    """The others wait for the first and read what it made."""
    spawn = multiprocessing.get_context("spawn")
    started, answers = spawn.Semaphore(0), spawn.Queue()
    runs = [spawn.Process(target=make_once, args=(tmp_path, started, answers)) for _ in range(3)]
    for run in runs:
        run.start()
    assert [answers.get(timeout=120) for _ in runs] == [7] * 3
    for run in runs:
        run.join()
    assert next(tmp_path.glob("stage/*/builds")).read_text() == "x"


@pytest.mark.parametrize("part", ["vae", "scheduler", "metric network"])
def test_another_part_of_the_pipeline_is_another_artifact(
    tiny_plan, tiny, tmp_path, monkeypatch, part
):
    """Only the UNet stays the same: nothing that was made with the other part is read."""
    plan = tiny_plan(rows=[ROW])
    before = SeedRun(plan.rows[0], plan, 0)
    folder = tmp_path / "other"
    shutil.copytree(tiny / "model", folder)
    if part == "vae":
        path = folder / "vqvae" / "diffusion_pytorch_model.safetensors"
        save_file({k: v * 0.5 for k, v in load_file(path).items()}, path)
    elif part == "scheduler":
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.01}))
    else:
        monkeypatch.setattr(seed_run, "MINI_FEATURES", folder / "vqvae")  # any other weights
    other = tiny_plan(rows=[ROW], model=str(folder))
    after = SeedRun(other.rows[0], other, 0)
    assert after.model_sha256 == before.model_sha256
    assert after.score.hash != before.score.hash
    same = part == "metric network"
    for stage in ("calibrate", "checkpoint", "sample"):
        assert (after.artifacts[stage] == before.artifacts[stage]) == same


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_integers_on_the_cpu_are_run_there(monkeypatch, engine):
    """Where there is a GPU, too: these engines cannot run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seed_run.load.cache_clear()
    assert seed_run.load("mini-ldm4", engine)[0].device.type == "cpu"
    seed_run.load.cache_clear()
