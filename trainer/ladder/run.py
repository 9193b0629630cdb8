"""Running a ladder: its runs side by side in slots, each an ordinary run, until all have finished or are given up.

    OUT/ladder.json    the plan (preregistration.py)
    OUT/lock           held by the scheduler of this ladder
    OUT/../pool        the runs of all ladders beside this one (fleet/run_store.py): the only state

Smallest rungs first, unless that would cost time (fleet/scheduling.py); the target's runs after all rungs.
"""

import functools
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, RunDirectoryError
from trainer.fleet import run_store, scheduling, supervision
from trainer.fleet.backend import Backend, Local
from trainer.fleet.run_store import RunState, RunStatus
from trainer.fleet.slurm import SlurmJobs
from trainer.fleet.supervision import Supervisor
from trainer.ladder import ensembles, preregistration, speed, tuning
from trainer.ladder import slots as places
from trainer.ladder.plan import code as codearms
from trainer.ladder.plan.ladder import TARGET, Ladder, PlannedRun
from trainer.ladder.preregistration import pool_of
from trainer.ladder.slots import Slots
from trainer.ladder.speed import Speed
from trainer.ladder.stored import stored

WAIT_SECONDS = 0.2
WAITING = RunState("waiting")
REFRESH_SECONDS = 1.0
"""Interval at which the files of runs are read for the table."""


@dataclass(frozen=True)
class LadderStatus:
    """States of all runs of a ladder, and estimates of the work that is left."""

    runs: list[PlannedRun]
    """All known runs; with [tuning], more are added when sweeps end."""
    states: dict[str, RunState]
    """State of each run, by key."""
    slots: Slots
    earlier: Speed = speed.UNKNOWN
    """Speed that a plan measured."""
    stopping: bool = False
    """True after runs were asked to save and leave."""
    started: int = 0
    """Number of processes that this scheduler started."""

    def state(self, run: PlannedRun) -> RunState:
        return self.states.get(run.key, WAITING)

    @functools.cached_property
    def distinct(self) -> list[PlannedRun]:
        """Each run once: two arms may share one."""
        return list({run.key: run for run in reversed(self.runs)}.values())[::-1]

    def count(self, status: RunStatus) -> int:
        return sum(self.state(run).status == status for run in self.distinct)

    @functools.cached_property
    def speed(self) -> Speed:
        """Speed measured on these runs; for sizes that have not begun, as measured earlier."""
        return speed.measured(self.runs, self.states).scale_earlier(self.earlier)

    def share_done(self, run: PlannedRun) -> float:
        return self.state(run).step / run.config.budget.steps

    def estimate(self, run: PlannedRun) -> float:
        """Seconds that a run still needs; if no speed is known, its remaining FLOPs instead."""
        seconds = self.speed.seconds(run, self.state(run).step)
        return seconds if seconds is not None else run.flops * (1 - self.share_done(run))

    @property
    def flops_done(self) -> float:
        return sum(run.flops * self.share_done(run) for run in self.distinct)

    @property
    def flops(self) -> float:
        """FLOPs of all runs that were not given up."""
        return sum(run.flops for run in self.distinct if self.state(run).status != "missing")

    @property
    def seconds_left(self) -> float | None:
        """Estimate; None while nothing was measured."""
        left = [run for run in self.distinct if self.state(run).status not in ("finished", "missing")]
        return self.seconds_in_slots(left, {run.key: self.state(run).step for run in left})

    def seconds_in_slots(self, runs: Iterable[PlannedRun], from_steps: Mapping[str, int] | None = None) -> float | None:
        """Time that runs take side by side; None if that of one is unknown. `from_steps` is the progress by key."""
        # A run that leaves no room for others takes the whole machine for its time, another one a slot of many.
        longest = total = 0.0
        for run in runs:
            seconds = self.speed.seconds(run, (from_steps or {}).get(run.key, 0))
            if seconds is None:
                return None
            longest, total = max(longest, seconds), total + seconds / len(self.slots.all_for(run))
        return max(total, longest)

    @property
    def missing(self) -> dict[str, str]:
        """{name of a run: reason why it is missing}"""
        return {run.name: self.state(run).reason for run in self.runs if self.state(run).status == "missing"}

    @property
    def exit_status(self) -> int:
        if self.stopping:
            return EXIT_PREEMPTED
        return EXIT_FINISHED if self.count("finished") == len(self.distinct) else EXIT_FAILED


def default_out(ladder_file: Path) -> Path:
    return Path("runs") / "ladders" / ladder_file.stem


def _read_states(pool: Path, runs: Iterable[PlannedRun]) -> dict[str, RunState]:
    return {run.key: stored(pool, run).read_state(run.config.budget.steps) for run in runs}


def read_status(ladder: Ladder, out: Path) -> LadderStatus:
    """Read the states of all runs of a ladder from their files."""
    runs = tuning.wanted(ladder, pool_of(out))
    return LadderStatus(runs, _read_states(pool_of(out), runs), places.of(ladder), speed.load(out))


def measure(ladder: Ladder, out: Path, status: LadderStatus, backend: Backend) -> tuple[LadderStatus, str]:
    """Return the status with the speed of this machine, and its source: earlier runs, else a few steps of the baseline.

    Raises UsageError if the baseline fails in these steps, since no run of such a ladder would finish.
    """
    # Runs of earlier calls, or a plan's measurement, save the probe.
    if status.speed.steps:
        from_runs = speed.measured(status.runs, status.states).steps
        return status, "runs that were made before" if from_runs else "a few steps, earlier"
    measured = speed.probe(ladder, status.slots, backend)
    if measured.steps:
        speed.save(measured, out)
    source = f"{speed.PROBE_STEPS} steps of {ladder.rungs[0].name} and {ladder.rungs[-1].name}, now"
    return replace(status, earlier=measured), source


def run(
    ladder: Ladder, out: Path, *, up_to: str | None = None, backend: Backend | None = None, slots: int | None = None,
    update: Callable[[LadderStatus], None] = lambda status: None,
) -> LadderStatus:  # fmt: skip
    """Do what is left of a ladder, or of its rungs up to `up_to`. After a kill, the same call continues.

    `slots` is the number of runs side by side; default: the file's, or what this machine has room for. Slurm's jobs are
    not timed before: nobody knows when they would start.

    Runs that were given up are tried once more. The signals of docs/signals.md ask all runs to save and leave; a
    second one ends them at once. Raises RunDirectoryError if OUT belongs to another ladder or another scheduler
    holds it, ConfigError if there is no rung `up_to`, UsageError if the baseline fails in its first steps.
    """
    part, pool, backend = ladder if up_to is None else ladder.up_to(up_to), pool_of(out), backend or Local()
    preregistration.compare(ladder, out)
    out.mkdir(parents=True, exist_ok=True)
    # Two schedulers of one ladder would start each other's runs.
    lock = run_store.hold(out / "lock")
    if lock is None:
        raise RunDirectoryError(
            f"{out} is in use by another `ladder run`.\n"
            "  One scheduler is enough. Wait for it, stop it with Ctrl-C, or watch it with `ladder status`."
        )
    here = not isinstance(backend, SlurmJobs)
    with lock:
        status = read_status(part, out)
        if slots:
            status = replace(status, slots=places.of(part, slots))
        if not here:  # the memory of this machine's GPUs is not that of the nodes
            status = replace(status, slots=replace(status.slots, by_memory=False))
        update(status)
        try:
            with supervision.handle_signals(signal.default_int_handler):
                if here:
                    status, _ = measure(part, out, status, backend)
        except KeyboardInterrupt:  # no run was started yet, so there is nothing to save
            return replace(status, stopping=True)
        # The plan is recorded only now: the baseline is known to run.
        pool.mkdir(exist_ok=True)
        preregistration.write(ladder, out)
        devices = status.slots.devices if here else lambda slot: supervision.NOTHING
        with Supervisor(backend, status.slots.count, part.file.restarts, part.file.ranks, devices) as supervisor:
            return _Scheduler(part, pool, status.slots, supervisor, update, status.earlier).work()


@dataclass
class _Scheduler:
    """Decides which run is next, and reports the ladder's status; the supervisor keeps the runs alive."""

    ladder: Ladder
    pool: Path
    slots: Slots
    supervisor: Supervisor
    update: Callable[[LadderStatus], None]
    earlier: Speed
    _runs: list[PlannedRun] = field(default_factory=list)
    _states: dict[str, RunState] = field(default_factory=dict)
    _refreshed: float = float("-inf")

    def work(self) -> LadderStatus:
        supervisor = self.supervisor
        self._runs = tuning.wanted(self.ladder, self.pool)
        # Runs may have finished since the status that `run` began with.
        self._refresh(self._runs)
        with supervision.handle_signals(supervisor.request_stop):
            self._take_over()
            # After a request to stop no run is started, but the loop continues until the running ones have left.
            while supervisor.runs or (not supervisor.urgency and self._left()):
                if supervisor.urgency:
                    supervisor.stop()
                else:
                    self._fill_slots()
                self._report()
                supervisor.wait(WAIT_SECONDS)
                self._collect()  # may add runs: a sweep that ended decides on its followers
            self._refresh(self._runs)
            if not supervisor.urgency:
                ensembles.score(self.pool, tuning.final(self.ladder, tuning.choices(self.ladder, self.pool)))
        self._report()
        return self._status()

    def _take_over(self) -> None:
        """Watch the runs whose jobs an earlier scheduler has left in the queue, before any other is started."""
        jobs: Backend | SlurmJobs = self.supervisor.backend
        if not isinstance(jobs, SlurmJobs):
            return
        for run in self._left():
            if self.supervisor.free_slots and jobs.works_on(stored(self.pool, run)):
                self._start(run)

    def _left(self) -> list[PlannedRun]:
        """Runs that have not finished, were not given up, and are not running here; in the planned order."""
        taken, status = self.supervisor.given_up | self.supervisor.runs.keys(), self._status()
        left = [run for run in status.distinct if run.key not in taken and status.state(run).status != "finished"]
        return [run for run in left if not any(one.key in self.supervisor.given_up for one in run.teachers)]

    def _can_start(self, run: PlannedRun) -> bool:
        """True if the run's teachers have finished."""
        return all(self._states.get(one.key, WAITING).status == "finished" for one in run.teachers)

    def _fill_slots(self) -> None:
        left = [run for run in self._left() if self._can_start(run)]
        # Runs that another ladder holds are skipped in this round, and tried again in the next one.
        while left and self.supervisor.free_slots:
            status = self._status()
            # The target's runs are by far the longest, so they wait until all rungs are done.
            waiting = [run for run in left if run.rung != TARGET] or left
            busy_slots = self._busy_slots()
            candidates = [run for run in waiting if self.slots.free_for(run, busy_slots) is not None]
            if not candidates:  # until a run ends and leaves its memory
                return
            # Seconds until each slot is free: those of the runs that we started, and 0 for the slots without one.
            busy = [status.estimate(run) for run in status.distinct if run.key in self.supervisor.runs]
            busy += [0.0] * (self.supervisor.slots - len(busy))
            run = candidates[scheduling.next_of([*map(status.estimate, candidates)], busy)]
            left.remove(run)
            self._start(run)

    def _busy_slots(self) -> dict[int, PlannedRun]:
        running = self.supervisor.runs
        return {running[run.key].slot: run for run in self._runs if run.key in running}

    def _start(self, run: PlannedRun) -> None:
        name = f"{self.ladder.name} {run.name}"
        directory, changed = stored(self.pool, run), codearms.environment(run.tree)
        slot = self.slots.free_for(run, self._busy_slots())
        config = ensembles.with_teachers(self.pool, run)
        if not self.supervisor.try_start(run.key, directory, name, config, changed, slot):
            self._refresh([run])  # another ladder has it, or has just finished it

    def _collect(self) -> None:
        done = set(self.supervisor.collect())
        ended = [run for run in self._runs if run.key in done]
        self._refresh(ended)
        if any(run.rate is not None for run in ended):
            # The end of a sweep decides the learning rate of the runs that follow it.
            self._runs = tuning.wanted(self.ladder, self.pool)
            self._refresh(run for run in self._runs if run.key not in self._states)

    def _refresh(self, runs: Iterable[PlannedRun]) -> None:
        self._states |= _read_states(self.pool, runs)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_SECONDS or not self.supervisor.runs:
            self._refreshed = now
            # Runs that we did not start may belong to another scheduler, so their states change without us.
            changing = {key for key, state in self._states.items() if state.status in ("running", "stopped")}
            self._refresh(run for run in self._runs if run.key in self.supervisor.runs.keys() | changing)
            self.update(self._status())

    def _status(self) -> LadderStatus:
        supervisor = self.supervisor
        return LadderStatus(
            self._runs, dict(self._states), self.slots, self.earlier, supervisor.urgency > 0, supervisor.started
        )
