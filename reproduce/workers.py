"""The seeds of a table's rows, made by several processes at a time.

A small model leaves half of two threads idle; two processes of one thread each do not. Each seed
has a calibration and full-precision samples that all its rows share, so a process stays with a seed
as long as it has rows, and then helps with another. What two processes need at once is made by one
of them (`store.Artifact.make`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

from questlib.distributed import chosen_device
from questlib.errors import QuestError
from reproduce.choices import Choices
from reproduce.plan import Plan, make_plan
from reproduce.seed_run import SeedRun

Task = tuple[str, int]  # a row's id, a seed


class Tasks:
    """What is left to do, by seed.

    Args:
        rows: ids, in the order in which they are made.
        seeds: of each row.
    """

    def __init__(self, rows: list[str], seeds: tuple[int, ...]) -> None:
        self.left = {seed: deque(rows) for seed in seeds}
        self.owned: set[int] = set()

    def __len__(self) -> int:
        return sum(map(len, self.left.values()))

    def take(self, seed: int | None) -> Task:
        """The next task of a process that has been with `seed`: of that seed, else of one that
        nobody has begun, else the last of the one with most rows left."""
        if seed is not None and self.left[seed]:
            return self.left[seed].popleft(), seed
        for other, rows in self.left.items():
            if rows and other not in self.owned:
                self.owned.add(other)
                return rows.popleft(), other
        most = max(self.left, key=lambda other: len(self.left[other]))
        return self.left[most].pop(), most


@dataclass
class Worker:
    """A process that makes seeds."""

    process: BaseProcess
    connection: Connection
    log: Path
    seed: int | None = None
    task: Task | None = None

    def give(self, tasks: Tasks) -> None:
        """Let it do the next task. That it has ended meanwhile is seen where it answers."""
        self.task = tasks.take(self.seed)
        self.seed = self.task[1]
        with suppress(BrokenPipeError):
            self.connection.send(self.task)


def make_seeds(plan: Plan) -> None:
    """Make the artifacts of all rows that can be run, `plan.choices.jobs` seeds at a time.

    Each process has its share of this one's threads. A seed that fails is left to the caller, who
    comes upon the same error. What processes print is in `work/workers`.
    """
    rows = [row.id for row in plan.rows if plan.missing(row) is None]
    tasks = Tasks(rows, plan.seeds)
    jobs = min(plan.choices.jobs, len(tasks))
    threads = max(1, torch.get_num_threads() // plan.choices.jobs)
    workers = [_start(plan, threads, i) for i in range(jobs)]
    bar = tqdm(total=len(tasks), desc=plan.table.name)
    try:
        for worker in workers:
            worker.give(tasks)
        while busy := {w.connection: w for w in workers if w.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.task is not None
                row, seed = worker.task
                worker.task = None
                try:
                    failed = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    workers.remove(worker)
                    print(
                        f"{row}, seed {seed}: its process ended (see {worker.log}); "
                        "what it has left is made without it",
                        file=sys.stderr,
                    )
                    continue
                bar.update()
                if failed:
                    print(f"{row}, seed {seed}: {failed}", file=sys.stderr)
                if tasks:
                    worker.give(tasks)
    finally:
        bar.close()
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def _start(plan: Plan, threads: int, number: int) -> Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    log = plan.work / "workers" / f"{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(
        target=_work, args=(theirs, plan.table.name, plan.choices, threads, log), daemon=True
    )
    process.start()
    theirs.close()  # so that the end of the process is the end of the connection
    return Worker(process, ours, log)


def _work(connection: Connection, table: str, choices: Choices, threads: int, log: Path) -> None:
    """What a process does: make the seeds that it is sent, and answer what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(threads)
    chosen_device(choices.device)
    plan = make_plan(table, choices)
    while True:
        try:
            row, seed = connection.recv()
        except EOFError:
            return
        failed = None
        try:
            SeedRun(plan.table.row(row), plan, seed).run()
        except (QuestError, torch.OutOfMemoryError) as error:
            failed = str(error)
        connection.send(failed)


def _end_with_parent() -> None:
    """End when the parent does, however it ends."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
