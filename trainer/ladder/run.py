"""Running a ladder: its runs side by side in slots, each an ordinary run, until all have finished or are given up.

    OUT/ladder.json    what was planned (record.py)
    OUT/lock           held by the scheduler that is at it
    OUT/../pool        the runs of all ladders beside this one (pool.py): the only state

Smallest rungs first, as far as that costs no time (order.py); the target's runs after all rungs.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USAGE, RunDirectoryError
from trainer.fleet import run_store as pools
from trainer.fleet import scheduling
from trainer.fleet.run_store import Place, State
from trainer.ladder import preregistration, speed, tuning
from trainer.ladder.plan.ladder import TARGET, Ladder, PlannedRun
from trainer.ladder.speed import Speed
from trainer.ladder.worker import STOPPING, Server, Task, is_final, last_words
from trainer.parallel import elastic

POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0
"""How often the files of runs are looked at for the table."""


@dataclass(frozen=True)
class View:
    """How a ladder stands."""

    runs: list[PlannedRun]
    """All that are known; with [tuning], more come as sweeps end."""
    states: dict[str, State]
    """By key."""
    slots: int
    earlier: Speed = speed.UNKNOWN
    """What a plan measured."""
    stopping: bool = False
    """Runs were asked to save and leave."""

    def state(self, run: PlannedRun) -> State:
        return self.states.get(run.key, State("waiting"))

    def count(self, status: pools.Status) -> int:
        return len({run.key for run in self.runs if self.state(run).status == status})

    @functools.cached_property
    def speed(self) -> Speed:
        """By what the runs have taken so far, and by what was measured of those that have not begun."""
        return speed.measured(self.runs, self.states).over(self.earlier)

    def estimate(self, run: PlannedRun) -> float:
        """What is left of a run, in seconds; where no speed is known at all, in FLOPs."""
        seconds = self.speed.seconds(run, self.state(run).step)
        return seconds if seconds is not None else run.flops * (1 - self.state(run).step / run.config.budget.steps)

    @property
    def flops_done(self) -> float:
        distinct = {run.key: run for run in self.runs}
        return sum(run.flops * self.state(run).step / run.config.budget.steps for run in distinct.values())

    @property
    def flops(self) -> float:
        """Of all runs that can still be made or have been."""
        distinct = {run.key: run for run in self.runs if self.state(run).status != "missing"}
        return sum(run.flops for run in distinct.values())

    @property
    def seconds_left(self) -> float | None:
        """None while nothing was measured."""
        known = self.speed
        left = {run.key: run for run in self.runs if self.state(run).status not in ("finished", "missing")}
        seconds = [known.seconds(run, self.state(run).step) for run in left.values()]
        told = [one for one in seconds if one is not None]
        if len(told) < len(seconds):
            return None
        return max(sum(told) / self.slots, max(told, default=0.0))


Update = Callable[[View], None]


@dataclass
class Done:
    """What a call of `run` came to."""

    view: View
    interrupted: bool
    seconds: float
    started: int
    """Processes."""

    @property
    def missing(self) -> dict[str, str]:
        """{name of a run: why}"""
        return {run.name: state.reason for run in self.view.runs if (state := self.view.state(run)).status == "missing"}

    @property
    def exit_status(self) -> int:
        if self.interrupted:
            return EXIT_PREEMPTED
        finished = all(self.view.state(run).status == "finished" for run in self.view.runs)
        return EXIT_FINISHED if finished else EXIT_FAILED


def default_out(ladder_file: Path) -> Path:
    return Path("runs") / "ladders" / ladder_file.stem


def pool_of(out: Path) -> Path:
    return out.parent / "pool"


def look(ladder: Ladder, out: Path) -> View:
    """From the files alone."""
    pool = pool_of(out)
    runs = tuning.wanted(ladder, pool)
    states = {run.key: pools.state(pool, run) for run in runs}
    return View(runs, states, speed.slots_of(ladder), preregistration.speed_of(out))


def measure(ladder: Ladder, out: Path, view: View, server: Server) -> tuple[Speed, str]:
    """(how fast this machine is, how that is known): from runs that were made, else from a few steps of the baseline.

    Raises UsageError if the baseline cannot even come so far: a ladder of it would be for nothing.
    """
    if view.speed.steps:
        made = speed.measured(view.runs, view.states).steps
        return view.speed, "runs that were made before" if made else "a few steps, earlier"
    known = speed.probe(ladder, view.slots, server)
    if known.steps:
        preregistration.keep_speed(out, known)
    return known, f"{speed.PROBE_STEPS} steps of {ladder.rungs[0].name} and {ladder.rungs[-1].name}, now"


def run(
    ladder: Ladder, out: Path, *, up_to: str | None = None, server: Server | None = None,
    update: Update = lambda view: None,
) -> Done:  # fmt: skip
    """Do what is left to do of a ladder, or of its rungs up to one. May be killed at any time; the same call then goes
    on.

    Runs that were given up are tried once more. SIGINT and SIGTERM ask all runs to save and leave; a second one ends
    them. Raises RunDirectoryError if OUT belongs to another ladder or another scheduler is at it,
    ConfigError if there is no rung `up_to`, UsageError if the baseline fails in its first steps.
    """
    part, pool, server = ladder if up_to is None else ladder.up_to(up_to), pool_of(out), server or Server()
    preregistration.compare(ladder, out, pool)
    out.mkdir(parents=True, exist_ok=True)
    with _claimed(out):
        view = look(part, out)
        update(view)
        try:
            with _interruptible():
                measure(part, out, view, server)
        except _StopError:
            return Done(view, True, 0.0, 0)
        pool.mkdir(exist_ok=True)
        preregistration.write(ladder, out, pool)
        with _Scheduler(part, pool, server, update, preregistration.speed_of(out)) as scheduler:
            return scheduler.work()


class _StopError(Exception):
    """SIGINT or SIGTERM came before there was a run to save."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Until the context ends, SIGINT and SIGTERM raise _StopError."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise _StopError

    before = [signal.signal(number, interrupt) for number in STOPPING]
    try:
        yield
    finally:
        _restore(before)


def _restore(handlers: Sequence[Any]) -> None:
    for number, handler in zip(STOPPING, handlers, strict=True):
        signal.signal(number, handler)


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    lock = pools.hold(out / "lock")
    if lock is None:
        raise RunDirectoryError(
            f"{out} is in use by another `ladder run`.\n"
            "  One scheduler is enough. Wait for it, stop it with Ctrl-C, or watch it with `ladder status`."
        )
    with lock:
        yield


@dataclass
class _Job:
    """One run that a process is at."""

    planned: PlannedRun
    place: Place
    lock: IO[str]
    slot: int
    process: BaseProcess
    progress: tuple[int, int]
    in_vain: int = 0
    """Starts in a row that added nothing."""


@dataclass
class _Scheduler:
    ladder: Ladder
    pool: Path
    server: Server
    update: Update
    earlier: Speed
    _jobs: list[_Job] = field(default_factory=list)
    _states: dict[str, State] = field(default_factory=dict)
    _given_up: set[str] = field(default_factory=set)
    _signals: int = 0
    _asked: dict[int, int] = field(default_factory=dict)
    """{process: how urgently}"""
    _started: int = 0
    _looked: float = float("-inf")

    def __post_init__(self) -> None:
        self._slots = speed.slots_of(self.ladder)
        self._runs = tuning.wanted(self.ladder, self.pool)

    def __enter__(self) -> "_Scheduler":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing that we started lives on, whatever happened."""
        for job in self._jobs:
            job.process.kill()
            job.process.join()
            job.lock.close()
        self._jobs.clear()

    def work(self) -> Done:
        began = time.monotonic()
        self._states = {run.key: pools.state(self.pool, run) for run in self._runs}
        with self._listening():
            while self._jobs or (not self._signals and self._left()):
                if self._signals:
                    self._ask_to_leave()
                else:
                    self._fill()
                self._show()
                self._wait()
                self._reap()
            self._look(everything=True)
        self._show()
        return Done(self._view(), self._signals > 0, time.monotonic() - began, self._started)

    # What is to be done

    def _left(self) -> list[PlannedRun]:
        """Runs that have neither finished nor been given up, nor are in our hands, each once."""
        taken = self._given_up | {job.planned.key for job in self._jobs}
        left = {run.key: run for run in reversed(self._runs) if run.key not in taken}
        return [run for run in reversed(left.values()) if self._states[run.key].status != "finished"]

    def _fill(self) -> None:
        """Give every free slot the next run that is not in another scheduler's hands."""
        free = sorted(set(range(self._slots)) - {job.slot for job in self._jobs})
        left = self._left()
        while free and left:
            run = left.pop(self._next(left))
            place = pools.place(self.pool, run)
            lock = place.claim()
            if lock is None:
                continue  # another ladder is at it; we look again
            if pools.has_finished(place):
                lock.close()
                self._note(run)
                continue
            place.write(run)
            slot = free.pop(0)
            self._jobs.append(_Job(run, place, lock, slot, self._start(run, place, slot), place.progress()))

    def _next(self, left: list[PlannedRun]) -> int:
        """Index of the run to start now."""
        rungs = [run for run in left if run.rung != TARGET] or left
        view = self._view()
        seconds = {run.key: view.estimate(run) for run in [*rungs, *(job.planned for job in self._jobs)]}
        busy = [seconds[job.planned.key] for job in self._jobs]
        chosen = scheduling.next_of([seconds[run.key] for run in rungs], [*busy, *[0.0] * (self._slots - len(busy))])
        return left.index(rungs[chosen])

    def _start(self, run: PlannedRun, place: Place, slot: int) -> BaseProcess:
        self._started += 1
        name = f"{self.ladder.name} {run.name}"
        return self.server.start(Task(place, name, self.ladder.ranks, speed.devices_of(self.ladder, slot)))

    # What became of it

    def _wait(self) -> None:
        if self._jobs:
            connection.wait([job.process.sentinel for job in self._jobs], POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)

    def _reap(self) -> None:
        for job in [job for job in self._jobs if job.process.exitcode is not None]:
            status = job.process.exitcode
            assert status is not None
            job.process.join()
            if pools.has_finished(job.place) or self._signals:
                self._release(job)
            elif reason := self._hopeless(job, status):
                job.place.give_up(reason)
                self._given_up.add(job.planned.key)
                self._release(job)
            else:
                job.process = self._start(job.planned, job.place, job.slot)

    def _hopeless(self, job: _Job, status: int) -> str:
        """Why another start would end as this one did; "" if it may not. Notes the death for the run's log."""
        said = last_words(job.place.log)
        if is_final(status, said) or elastic.gave_up(job.place.failures):
            return said
        progress = job.place.progress()
        job.in_vain = 0 if progress > job.progress else job.in_vain + 1
        job.progress = progress
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"left with exit status {status}"
        if job.in_vain > self.ladder.restarts:
            return f"It {how}, {job.in_vain} times in a row without having come further. The last words:\n{said}"
        if status not in (EXIT_PREEMPTED, EXIT_USAGE) and self.ladder.ranks == 1:
            failure = {
                "rank": 0, "pid": job.process.pid, "exitcode": status,
                "signal": signal.Signals(-status).name if status < 0 else None,
            }  # fmt: skip
            elastic.note_failures([failure], f"rank 0 {how}", job.place.failures)
        return ""

    def _release(self, job: _Job) -> None:
        job.lock.close()
        self._jobs.remove(job)
        self._note(job.planned)
        if self.ladder.tuning is not None and job.planned.rate is not None:
            self._runs = tuning.wanted(self.ladder, self.pool)
            for run in self._runs:
                if run.key not in self._states:
                    self._note(run)

    # Telling

    def _note(self, run: PlannedRun) -> None:
        self._states[run.key] = pools.state(self.pool, run)

    def _look(self, everything: bool = False) -> None:
        ours = {job.planned.key for job in self._jobs}
        for run in self._runs:
            if everything or run.key in ours or self._states[run.key].status in ("running", "stopped"):
                self._note(run)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS or not self._jobs:
            self._looked = now
            self._look()
            self.update(self._view())

    def _view(self) -> View:
        return View(self._runs, dict(self._states), self._slots, self.earlier, self._signals > 0)

    # Stopping

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks all runs to save and leave, the next one ends them."""
        before = [signal.signal(number, self._stop) for number in STOPPING]
        try:
            yield
        finally:
            _restore(before)

    def _stop(self, _number: int, _frame: Any) -> None:
        self._signals += 1

    def _ask_to_leave(self) -> None:
        """Also of a run that was being started when the signal came."""
        for job in self._jobs:
            asked = self._asked.get(job.process.pid or 0, 0)
            if asked < self._signals:
                (job.process.terminate if self._signals == 1 else job.process.kill)()
                self._asked[job.process.pid or 0] = self._signals
