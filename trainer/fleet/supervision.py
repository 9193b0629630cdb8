"""Supervision of runs: started in slots, watched, restarted while they make progress, stopped together.

A campaign supervises one job at a time (`running`), a ladder many runs (`Supervisor`).
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from filelock import FileLock

from trainer import signals
from trainer.config import Config
from trainer.errors import EXIT_PREEMPTED, EXIT_QUARANTINED, EXIT_USAGE, CheckpointError, NumericsError
from trainer.faults.nemesis import Nemesis, Progress
from trainer.faults.plan import PlannedFault
from trainer.fleet.backend import Backend, Process, Task
from trainer.fleet.run_store import StoredRun
from trainer.launch.cluster import Agents
from trainer.parallel import elastic

FINAL = (f"{NumericsError.__name__}: ", f"{CheckpointError.__name__}: ")
"""Errors that the next start would raise again; torchrun reports them in its output alone."""
IN_USE = "is in use by"
POLL_SECONDS = 0.02
LEAVING_SECONDS = 10.0
NOTHING: Mapping[str, str] = MappingProxyType({})


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle with `handler`, while the context lasts, those signals that ask to stop and are not ignored."""
    before = {number: signal.signal(number, handler) for number in signals.heeded()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def started(backend: Backend, tasks: Iterable[Task]) -> Iterator[list[Process]]:
    """Start processes. At the end of the context, those that still run save and leave, or are killed."""
    processes: list[Process] = []
    try:
        for task in tasks:
            # A signal is delivered when the process is recorded, else nothing would end it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ASKING)
            try:
                processes.append(backend(task))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield processes
    finally:
        living = [process for process in processes if process.poll() is None]
        try:
            for process in living:
                process.send_signal(signal.SIGTERM)
            for process in living:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVING_SECONDS)
        finally:  # also when a second signal interrupts the wait
            for process in living:
                process.kill()
                process.wait()


@contextlib.contextmanager
def running(
    cluster: Agents, planned: Sequence[PlannedFault], run: Path, started: float, progress: Progress | None = None
) -> Iterator[Nemesis]:
    """Start a job and the faults that strike it from outside; none of its processes outlives the context.

    `started` is the Unix time of the run's first start, `progress` as for Nemesis.
    """
    with cluster:
        nemesis = Nemesis(planned, run, cluster, started, progress)
        cluster.start()
        nemesis.start()
        try:
            yield nemesis
        finally:
            nemesis.stop()


def new_start_directory(directory: Path) -> Path:
    """Path for the output of the next start of a job: DIRECTORY/start-N."""
    return directory / f"start-{len(list(directory.glob('start-*')))}"


def is_final(status: int, output: str) -> bool:
    """True if another start would end in the same way, by exit status and last output."""
    return output.startswith(FINAL) or status == EXIT_QUARANTINED or (status == EXIT_USAGE and IN_USE not in output)


@dataclass
class SupervisedRun:
    """A run with a process that works on it."""

    task: Task
    lock: FileLock
    slot: int
    process: Process
    progress: tuple[int, int]
    starts_in_vain: int = 0
    """Starts in a row without progress."""
    urgency: int = 0
    """Number of requests to leave that the process has received."""


@dataclass
class Supervisor(contextlib.AbstractContextManager["Supervisor"]):
    """Keeps runs in `slots` running until each has finished or is given up.

    Use as a context manager: no process that it started outlives the context.
    """

    backend: Backend
    slots: int
    restarts: int
    """Starts in a row without progress that a run may have beyond its first."""
    ranks: int
    devices: Callable[[int], Mapping[str, str]]
    """Environment that gives a slot its devices."""
    runs: dict[str, SupervisedRun] = field(default_factory=dict)
    """By key."""
    given_up: set[str] = field(default_factory=set)
    """Keys of runs that are not started again."""
    started: int = 0
    """Number of processes started."""
    urgency: int = 0
    """Number of requests to stop."""

    def __exit__(self, *_: object) -> None:
        for run in self.runs.values():
            run.process.kill()
            run.process.wait()
            run.lock.release()
        self.runs.clear()

    @property
    def free_slots(self) -> list[int]:
        return sorted(set(range(self.slots)) - {run.slot for run in self.runs.values()})

    def try_start(
        self, key: str, stored: StoredRun, name: str, config: Config, environment: Mapping[str, str] = NOTHING,
        slot: int | None = None,
    ) -> bool:  # fmt: skip
        """Start a run in a free slot: `slot`, else the first.

        Returns False if another scheduler has the run, or has finished it meanwhile.
        """
        lock = stored.claim()
        if lock is None:
            return False
        if stored.has_finished():  # after its files were last read, and before our claim
            lock.release()
            return False
        stored.prepare(config, name)
        slot = self.free_slots[0] if slot is None else slot
        task = Task(stored, name, self.ranks, {**self.devices(slot), **environment})
        # Progress is read again at the end of each start: only a difference makes another start worth while.
        self.runs[key] = SupervisedRun(task, lock, slot, self._start(task), stored.progress())
        return True

    def wait(self, seconds: float) -> None:
        """Return when the process of a run has ended, at the latest after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(run.process.poll() is None for run in self.runs.values()):
            time.sleep(POLL_SECONDS)

    def collect(self) -> list[str]:
        """Restart the runs that ended too early; return the keys of the runs that need no more starts."""
        done: list[str] = []
        for key, run in list(self.runs.items()):
            status = run.process.poll()
            if status is None:
                continue
            stored = run.task.stored
            # The log decides, not the exit status: a process may die after its run has finished. After a request to
            # stop no process is started, whatever the reason of the exit.
            if not stored.has_finished() and not self.urgency:
                reason = self._reason_to_give_up(run, status)
                if not reason:
                    run.process = self._start(run.task)
                    continue
                stored.give_up(reason)
                self.given_up.add(key)
            run.lock.release()
            del self.runs[key]
            done.append(key)
        return done

    def request_stop(self, *_: object) -> None:
        """Handle a signal. It may interrupt the start of a run, so nothing is stopped before `stop`."""
        self.urgency += 1

    def stop(self) -> None:
        """Ask all runs to save and leave; asked a second time, end them at once."""
        for run in self.runs.values():  # including a run that was being started when the signal came
            if run.urgency < self.urgency:
                run.process.send_signal(signal.SIGTERM if self.urgency == 1 else signal.SIGKILL)
                run.urgency = self.urgency

    def _start(self, task: Task) -> Process:
        self.started += 1
        return self.backend(task)

    def _reason_to_give_up(self, run: SupervisedRun, status: int) -> str:
        """Return the reason why another start would fail too; "" if it may help. Notes the death for the run's log."""
        stored = run.task.stored
        output = stored.last_output()
        if is_final(status, output) or elastic.gave_up(stored.failures):
            return output
        # A start that saved a checkpoint, or in which a planned fault fired, counts as progress.
        progress = stored.progress()
        run.starts_in_vain = 0 if progress > run.progress else run.starts_in_vain + 1
        run.progress = progress
        end = elastic.failure(0, run.process.pid, status)
        if run.starts_in_vain > self.restarts:
            times = f"{run.starts_in_vain} times in a row without progress"
            return f"It {elastic.how(end)}, {times}. Its last output:\n{output}"
        # torchrun notes the deaths of its ranks itself. A preempted run has logged why it left.
        if status not in (EXIT_PREEMPTED, EXIT_USAGE) and self.ranks == 1:
            elastic.note_failures([end], stored.failures)
        return ""
