"""Folders of samples: any number of processes, killed at any moment, restarted.

Each sample is drawn once, always with the same bits.
"""

import multiprocessing
import random
import signal
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from filelock import FileLock

from questlib.diffusion.drawing import Drawing, Samples
from questlib.diffusion.sampling import index_ranges
from questlib.errors import QuestError
from reproduce.evaluation.samples import read_run, read_samples, shard_file, write_samples

RUN = {"num_samples": 23, "batch_size": 3, "what": "test"}
RANGES = index_ranges(23, 3)
# Processes that have imported everything before they start, without this one's threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["questlib.diffusion.sampling", "tiny_pipelines"])


def made_up(indices: range) -> Samples:
    """Samples that follow from their indices."""
    latents = torch.stack([torch.full((2, 4, 4), float(i)) for i in indices])
    images = latents[:, :1].expand(-1, 3, -1, -1).to(torch.uint8)
    return Samples(images, latents)


def work(folder: Path, index: int, count: int, told: Connection | None = None) -> None:
    """A process of a run; it logs every batch that it draws.

    told: it says there what it begins to draw, and draws when it is answered.
    """
    torch.set_num_threads(1)

    def draw(indices: range) -> Samples:
        with open(folder.parent / "log", "a") as log:
            log.write(f"{indices.start}\n")
        if told is not None:
            told.send(indices.start)
            told.recv()
        return made_up(indices)

    write_samples(folder, RUN, draw, process_index=index, num_processes=count)


def real_work(folder: Path, index: int, count: int) -> None:
    torch.set_num_threads(1)
    how = Drawing(tiny.unconditional(), num_inference_steps=2, eta=1.0)
    write_samples(folder, how.run(10, 2), how.draw, process_index=index, num_processes=count)


def test_a_damaged_number_of_samples_is_refused_at_once(tmp_path):
    work(tmp_path / "samples", 0, 1)
    run = tmp_path / "samples" / "run.json"
    run.write_text(run.read_text().replace("23", "230000000000"))
    with pytest.raises(QuestError, match="76666666659 of 76666666667 shards are missing"):
        next(read_samples(tmp_path / "samples"))


class Worker:
    """A process of a run, as seen from the test: it stops in every batch until it is let go."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self.told, told = SERVER.Pipe()
        self.process = SERVER.Process(target=work, args=(folder, index, count, told))
        self.process.start()
        told.close()

    def begins(self) -> int | None:
        """Waits until it begins a batch, and gives that one's first index; None: it has ended."""
        try:
            return self.told.recv()
        except EOFError:
            return None

    def go_on(self) -> None:
        self.told.send(None)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(60)


def run_to_the_end(workers: list[Worker]) -> None:
    """Let all of them draw until they have ended."""
    left = {worker.told: worker for worker in workers}
    while left:
        for told in wait(list(left)):
            if left[told].begins() is None:
                finish([left.pop(told).process])
            else:
                left[told].go_on()


def start(target, folder: Path, count: int) -> list:
    processes = [SERVER.Process(target=target, args=(folder, i, count)) for i in range(count)]
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
    names = {shard_file(folder, r).name for r in RANGES} | {"run.json"}
    assert {p.name for p in folder.iterdir()} == names


def drawn(folder: Path) -> list[int]:
    """The first indices of all batches that were begun, ascending."""
    return sorted(map(int, (folder / "log").read_text().split()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_work_and_draw_nothing_twice(tmp_path, count):
    run_to_the_end([Worker(tmp_path / "out", i, count) for i in range(count)])
    check(tmp_path / "out")
    assert drawn(tmp_path) == [r.start for r in RANGES]


def test_the_set_of_images_is_the_same_for_any_number_of_processes(tmp_path):
    for count in (1, 2, 3):
        finish(start(real_work, tmp_path / str(count), count))
    one = contents(tmp_path / "1")
    assert len(one) == 6 and contents(tmp_path / "2") == one == contents(tmp_path / "3")


def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path):
    """kill -9 of all of up to three processes, again and again, until a run comes through.

    Some are killed while they draw, some while they write, claim the next shard or clean up.
    """
    rng, folder, kills = random.Random(0), tmp_path / "out", 0
    for _ in range(12):
        count = rng.choice([1, 2, 3])
        left = {w.told: w for w in (Worker(folder, i, count) for i in range(count))}
        while left:
            worker = left[rng.choice(wait(list(left)))]
            if worker.begins() is None:
                finish([left.pop(worker.told).process])
                continue
            what = rng.choice(["go on", "kill", "go on and kill"])
            if what != "kill":
                worker.go_on()
            if what != "go on":
                left.pop(worker.told).kill()
                kills += 1
    run_to_the_end([Worker(folder, i, 2) for i in range(2)])
    check(folder)
    assert kills > 5 and set(drawn(tmp_path)) == {r.start for r in RANGES}
    # Only the batch in hand is drawn again.
    assert len(drawn(tmp_path)) <= len(RANGES) + kills


def test_a_dead_processs_work_is_taken_over_within_the_run(tmp_path):
    """Process 0 comes to wait for the shard that process 1 holds, and draws it when that dies."""
    workers = [Worker(tmp_path / "out", i, 2) for i in range(2)]
    held = workers[1].begins()
    own = [workers[0].begins()]
    while len(own) < len(RANGES) - 1:
        workers[0].go_on()
        own.append(workers[0].begins())
    workers[0].go_on()
    assert held not in own and not workers[0].told.poll()
    workers[1].kill()
    assert workers[0].begins() == held
    workers[0].go_on()
    assert workers[0].begins() is None
    finish([workers[0].process])
    check(tmp_path / "out")


def test_what_killed_processes_left_does_not_count_and_is_cleaned(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "000003-3.safetensors.7-8.tmp").write_bytes(b"half of a shard")
    (folder / "000003-3.lock").write_bytes(b"")
    (folder / "000099-3.lock").write_bytes(b"")
    (folder / "run.json.7-8.tmp").write_text("{")
    work(folder, 0, 1)
    check(folder)


def test_two_launches_at_once_share_the_shards(tmp_path):
    run_to_the_end([Worker(tmp_path / "out", 0, 1) for _ in range(2)])
    check(tmp_path / "out")
    assert drawn(tmp_path) == [r.start for r in RANGES]


def test_a_shard_that_another_process_holds_is_left_to_it(tmp_path):
    """Processes but the first end when nothing is left to begin."""
    folder = tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / "000006-3.lock"):
        work(folder, 1, 2)
    assert drawn(tmp_path) == [r.start for r in RANGES if r.start != 6]
    work(folder, 0, 2)
    check(folder)


def full_disk(folder: Path, out) -> None:
    """Files may not grow over 300 bytes: the write fails as on a full disk."""
    import resource

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
    process = SERVER.Process(target=full_disk, args=(folder, out))
    process.start()
    message = out.get(timeout=60)
    process.join()
    assert "cannot write" in message and "000006-3" in message
    assert "finished shards are kept" in message
    kept = {k: v for k, v in contents(folder).items() if not k.endswith(".lock")}
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
