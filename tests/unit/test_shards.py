"""Folders of samples: any number of processes, killed at any moment, restarted: each sample once, always with the same bits."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch

from questlib.diffusion.sampling import index_ranges
from questlib.errors import QuestError
from reproduce.evaluation.drawing import Drawing
from reproduce.evaluation.samples import Samples, read_run, read_samples, shard_file, write_samples

RUN = {"num_samples": 23, "batch_size": 3, "what": "test"}
RANGES = index_ranges(23, 3)
# Processes that have imported everything before they start, without this one's threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["questlib.diffusion.sampling", "tiny_pipelines"])


def made_up(indices: range, seconds: float = 0.0) -> Samples:
    """Samples that follow from their indices."""
    time.sleep(seconds)
    latents = torch.stack([torch.full((2, 4, 4), float(i)) for i in indices])
    return Samples(latents.to(torch.uint8), latents)


def work(folder: Path, index: int, count: int, seconds: float = 0.0) -> None:
    """A process of a run; it logs every batch that it draws."""
    torch.set_num_threads(1)

    def draw(indices: range) -> Samples:
        with open(folder.parent / "log", "a") as log:
            log.write(f"{indices.start}\n")
        return made_up(indices, seconds)

    write_samples(folder, RUN, draw, process_index=index, num_processes=count)


def real_work(folder: Path, index: int, count: int) -> None:
    torch.set_num_threads(1)
    how = Drawing(tiny.unconditional(), num_inference_steps=2, eta=1.0)
    write_samples(folder, how.run(10, 2), how.draw, process_index=index, num_processes=count)


def start(target, folder: Path, count: int, *args) -> list:
    processes = [
        SERVER.Process(target=target, args=(folder, i, count, *args)) for i in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def check(folder: Path) -> None:
    found = list(read_samples(folder))
    assert torch.equal(torch.cat([s.latents[:, 0, 0, 0] for s in found]), torch.arange(23.0))
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [shard_file(folder, r).name for r in RANGES] + ["run.json"]
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_work_and_draw_nothing_twice(tmp_path, count):
    finish(start(work, tmp_path / "out", count, 0.02))
    check(tmp_path / "out")
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == [r.start for r in RANGES]


def test_the_set_of_images_is_the_same_for_any_number_of_processes(tmp_path):
    for count in (1, 2, 3):
        finish(start(real_work, tmp_path / str(count), count))
    one = contents(tmp_path / "1")
    assert len(one) == 6 and contents(tmp_path / "2") == one == contents(tmp_path / "3")


def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path):
    """kill -9 of one of up to three processes, then of all, again and again, until a run comes through."""
    rng, folder, kills = random.Random(0), tmp_path / "out", 0
    for attempt in range(12):
        processes = start(work, folder, rng.choice([1, 2, 3]), 0.2)
        for doomed in ([rng.choice(processes)], processes) if attempt % 2 else (processes,):
            time.sleep(rng.uniform(0.02, 0.25))
            for process in doomed:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    process.join(60)
                    kills += 1
    finish(start(work, folder, 2))
    check(folder)
    drawn = [int(i) for i in (tmp_path / "log").read_text().split()]
    assert kills > 5 and set(drawn) == {r.start for r in RANGES}
    assert len(drawn) <= len(RANGES) + kills  # at most the batch in hand is drawn again


def test_a_dead_processs_work_is_taken_over_within_the_run(tmp_path):
    processes = start(work, tmp_path / "out", 2, 0.1)
    time.sleep(0.3)
    os.kill(processes[1].pid, signal.SIGKILL)
    finish(processes[:1])
    check(tmp_path / "out")


def test_stale_part_files_do_not_count_and_are_cleaned(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "000003-3.part").write_bytes(b"half of a shard")
    (folder / "000099-3.part").write_bytes(b"")
    (folder / "run.json.host-1").write_text("{")
    work(folder, 0, 1)
    check(folder)


def test_two_launches_at_once_share_the_shards(tmp_path):
    first = start(work, tmp_path / "out", 1, 0.03)
    second = start(work, tmp_path / "out", 1, 0.03)
    finish(first + second)
    check(tmp_path / "out")
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == [r.start for r in RANGES]


def full_disk(folder: Path, index: int, count: int, out) -> None:
    """Files may not grow over 300 bytes: the write fails as on a full disk."""

    def draw(indices: range) -> Samples:
        if indices.start == 6:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        return made_up(indices)

    try:
        write_samples(folder, RUN, draw)
    except QuestError as error:
        out.put(str(error))


def test_full_disk_says_so_and_keeps_what_is_done(tmp_path):
    folder, out = tmp_path / "out", SERVER.Queue()
    process = SERVER.Process(target=full_disk, args=(folder, 0, 1, out))
    process.start()
    message = out.get(timeout=60)
    process.join()
    assert (
        "cannot write" in message
        and "000006-3" in message
        and "finished shards are kept" in message
    )
    kept = contents(folder)
    assert sorted(kept) == ["000000-3.safetensors", "000003-3.safetensors", "run.json"]
    work(folder, 0, 1)
    check(folder)
    assert {k: v for k, v in contents(folder).items() if k in kept} == kept


def test_unfinished_damaged_and_foreign_folders(tmp_path):
    with pytest.raises(QuestError, match="not a folder of samples"):
        next(read_samples(tmp_path))
    folder = tmp_path / "out"
    work(folder, 0, 1)
    shard = shard_file(folder, RANGES[1])
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(QuestError, match="1 of 8 shards are missing"):
        next(read_samples(folder))
    shard.write_bytes(whole[:-5])
    with pytest.raises(QuestError, match="damaged"):
        list(read_samples(folder))
    with pytest.raises(QuestError, match="damaged"):
        work(folder, 0, 1)
    shard.write_bytes(whole)
    with pytest.raises(
        QuestError, match=r"belongs to another run \(what: expected other, found test\)"
    ):
        write_samples(folder, RUN | {"what": "other"}, made_up)
    with pytest.raises(QuestError, match="batch_size: expected 5, found 3"):
        write_samples(folder, RUN | {"batch_size": 5}, made_up)
    assert read_run(folder) == RUN
    (folder / "run.json").unlink()
    with pytest.raises(QuestError, match="holds files of something else"):
        write_samples(folder, RUN, made_up)
    other = tmp_path / "other"
    write_samples(other, RUN | {"what": "other"}, made_up)
    shard_file(other, RANGES[0]).replace(shard_file(tmp_path, RANGES[0]))
    (tmp_path / "run.json").write_text((other / "run.json").read_text().replace("other", "test"))
    for indices in RANGES[1:]:
        shard_file(folder, indices).replace(shard_file(tmp_path, indices))
    with pytest.raises(QuestError, match="belongs to another run than the run.json"):
        list(read_samples(tmp_path))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QuestError, match="cannot write to"):
        write_samples(tmp_path / "file", RUN, made_up)
