"""The process of one run: what the plain command does, in a fork of a server that has imported everything.

A fresh Python takes seconds to import torch, which a run of a minute cannot afford; a fork takes milliseconds. The
server imports and computes nothing, so a fork is as good as a fresh process.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import EXIT_FAILED, EXIT_USAGE, CheckpointError, NumericsError, TopropeError, UsageError
from trainer.fleet.run_store import Place
from trainer.parallel import elastic

if TYPE_CHECKING:
    from trainer.launch.cluster import Cluster

PRELOAD = ("trainer.ladder.worker", "trainer.launch.preload")
LOCK_SECONDS = 10.0
"""How long a run directory may still be held by a process whose scheduler was killed."""
START = "== "
"""What the log's first line of each start begins with."""
FINAL = (f"{NumericsError.__name__}: ", f"{CheckpointError.__name__}: ")
"""Errors that would only come again; torchrun tells of them in its output alone."""
IN_USE = "is in use by"
STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a ladder to stop."""
TORCHRUN_RESTARTS = 20  # the scheduler counts those without progress; these are for faults in a row


@dataclass(frozen=True)
class Task:
    """What one process has to do."""

    place: Place
    name: str
    """For W&B."""
    ranks: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


class Server:
    """Starts processes for tasks. Make one early: its imports then run beside other work.

    Raises UsageError where its socket cannot be made.
    """

    def __init__(self) -> None:
        # Read when torch is loaded; numerics.threads decides at the start of a run, as in the plain command.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        try:
            forkserver.ensure_running()
        except OSError as error:
            raise UsageError(
                f"the server that starts runs cannot listen in {tempfile.gettempdir()}: {error}.\n"
                "  The path of a socket may have about 100 characters. Set TMPDIR to a shorter one."
            ) from None

    def start(self, task: Task) -> BaseProcess:
        process = self._context.Process(target=main, args=(task,), name=task.name)
        process.start()
        return process


def main(task: Task) -> None:
    """Do a task and leave with the run's exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the scheduler, who then asks us to stop
    endings: list[Callable[[], None]] = []
    _end_with_scheduler(endings)
    _print_to(task.place.log)
    os.environ.update(task.environment)
    print(f"{START}{time.strftime('%Y-%m-%d %H:%M:%S')}  {task.name}  process {os.getpid()}", flush=True)
    sys.exit(_train(task) if task.ranks == 1 else _launch(task, endings))


def _end_with_scheduler(endings: Sequence[Callable[[], None]]) -> None:
    """A run must not go on unsupervised, and keep its directory from the scheduler that comes next.

    `endings` is what is to be done before.
    """
    scheduler = multiprocessing.parent_process()
    assert scheduler is not None

    def watch() -> None:
        connection.wait([scheduler.sentinel])
        for ending in endings:
            ending()
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="toprope-scheduler", daemon=True).start()


def _print_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def _train(task: Task) -> int:
    started = time.time()
    os.environ[elastic.FAILURES_FILE] = str(task.place.failures)
    os.environ["WANDB_NAME"] = task.name
    from trainer import config, job

    try:
        _wait_for_lock(task.place.run / "lock")
        return job.train(config.load(task.place.config), task.place.run, started)
    except TopropeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_status


def _wait_for_lock(path: Path) -> None:
    from trainer.fleet import run_store

    deadline = time.monotonic() + LOCK_SECONDS
    while run_store.is_held(path) and time.monotonic() < deadline:
        time.sleep(0.05)


def _launch(task: Task, endings: list[Callable[[], None]]) -> int:
    """One torchrun agent and its workers, and whatever faults are made from outside."""
    from trainer import config
    from trainer.faults import plan
    from trainer.faults.nemesis import Nemesis
    from trainer.launch.cluster import Cluster

    place = task.place
    planned = plan.make(config.load(place.config), task.ranks)
    scratch = place.directory / f"start-{len(list(place.directory.glob('start-*')))}"
    _wait_for_lock(place.run / "lock")
    with Cluster(
        place.config, place.run, (), ranks=task.ranks, restarts=TORCHRUN_RESTARTS, directory=scratch,
        environment={"WANDB_NAME": task.name},
    ) as cluster:  # fmt: skip
        endings.append(cluster.kill)
        cluster.start()
        nemesis = Nemesis(planned, place.run, cluster, _first_start(place.run))
        nemesis.start()
        with _stopped_together(cluster):
            while (status := cluster.wait(3600)) is None:
                pass
        nemesis.stop()
        print(cluster.output, flush=True)
        return status


def _first_start(run: Path) -> float:
    """When the run was first started: the Unix time from which at_seconds counts."""
    from trainer.log import events

    first = events.events_directory(run) / "attempt-0000-rank-00000.jsonl"
    return next((entry.time for entry in events.read_file(first)), time.time())


@contextlib.contextmanager
def _stopped_together(cluster: "Cluster") -> Iterator[None]:
    """While the context lasts, a request to stop is passed on to the agent, which passes it on to all ranks."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: cluster.nodes[0].signal(number) and None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_words(log: Path, lines: int = 12) -> str:
    """What the newest start said of its end: its error if it had one of ours, else its last lines."""
    try:
        said = log.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{START}")[2].strip().splitlines()
    except OSError:
        return "It left no word."
    errors = [number for number, line in enumerate(said) if re.match(r"\w+Error: ", line)]
    return "\n".join(said[errors[-1] :] if errors else said[-lines:])


def is_final(status: int, said: str) -> bool:
    """Whether another start would end in the same way, by exit status and last words."""
    return said.startswith(FINAL) or (status == EXIT_USAGE and IN_USE not in said)
