"""Made-up runs: events with usual values, and a run directory whose clock the test sets."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import parse
from trainer.log import rundir
from trainer.log.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointSaved,
    Entry,
    EvalDone,
    Event,
    EventLog,
    FaultFired,
    Hung,
    MembersChanged,
    NotFinite,
    StepDone,
    WorkersLost,
    read,
)  # fmt: skip
from trainer.log.history import History

STARTUP = {"imports": 1.5, "data": 0.5}
NOBODY = "a-host-that-is-not-this-one"


def started(from_step: int = 0, **changes: Any) -> AttemptStarted:
    values: dict[str, Any] = {
        "world_size": 2, "steps": 60, "fingerprint": "f" * 64, "host": NOBODY, "pid": 1, "device": "cpu",
        "strategy": "fsdp", "parameters": 1_234_567, "tokens_per_step": 2_048, "startup_seconds": STARTUP,
    }  # fmt: skip
    return AttemptStarted(from_step=from_step, **(values | changes))


def step(number: int, **changes: Any) -> StepDone:
    values: dict[str, Any] = {
        "loss": 5.0 - number / 100, "grad_norm": 1.25, "learning_rate": 1e-3, "tokens": 2_048, "seconds": 0.5,
        "samples": f"digest-{number}", "redone": 0, "flushed": None,
    }  # fmt: skip
    return StepDone(step=number, **(values | changes))


def evaluated(number: int, loss: float = 2.5, **changes: Any) -> EvalDone:
    values: dict[str, Any] = {"set": "val", "bits_per_byte": 1.7, "tokens": 9, "seconds": 0.1, "digest": "d"}
    return EvalDone(step=number, loss=loss, **(values | changes))


def saved(number: int, stall: float = 0.1) -> CheckpointSaved:
    return CheckpointSaved(step=number, bytes=1, seconds=stall, stall_seconds=stall)


def ended(
    status: str = "finished", number: int = 60, weights: str | None = "a" * 64, state: str | None = None,
    reason: str = "SIGTERM",
) -> AttemptEnded:  # fmt: skip
    return AttemptEnded(status=status, step=number, reason=reason, weights_sha256=weights, state_sha256=state)


def not_finite(number: int, trial: int = 0) -> NotFinite:
    return NotFinite(step=number, loss=math.nan, grad_norm=math.inf, trial=trial)


def lost(*failures: dict[str, Any], reason: str = "") -> WorkersLost:
    return WorkersLost(failures=list(failures), reason=reason)


def killed(rank: int = 1, pid: int = 101) -> WorkersLost:
    return lost({"rank": rank, "pid": pid, "exitcode": -9, "signal": "SIGKILL"})


def members_changed(number: int, lost: dict[str, str], **changes: Any) -> MembersChanged:
    values: dict[str, Any] = {
        "seconds": 0.1,
        "epoch": 2,
        "members": [0],
        "joined": [],
        "kept": {},
        "given": {"0": [*range(8)]},
    }
    return MembersChanged(step=number, lost=lost, **(values | changes))


def hung(seconds: float, *culprits: dict[str, Any]) -> Hung:
    details: Any = {"step": 47, "point": "before_reduce", "collective": None, "stacks": "stacks/x"}
    return Hung(seconds=seconds, culprits=list(culprits), **details)


def entry(event: Event, seconds: float, attempt: int = 0) -> Entry:
    return Entry(attempt, 0, 1_000.0 + seconds, event)


class Run:
    """A pretended run: a clock that the test sets, and a log per attempt and rank."""

    def __init__(self, path: Path, now: float = 1_000_000.0) -> None:
        self.path, self.now, self.attempt, self.world_size = path, now, -1, 2

    def record(self) -> None:
        """Write config.json, which `inspect` needs."""
        self.path.mkdir(parents=True, exist_ok=True)
        rundir.record(self.path, parse({"budget": {"steps": 60}}), {"data_sha256": "d" * 64})

    def start(
        self,
        from_step: int = 0,
        after: float = 0.0,
        world_size: int = 2,
        record: bool = True,
        nodes: Sequence[str] = (),
    ) -> None:
        """A process starts `after` seconds from now and is ready when its start-up is over. `nodes` are by rank."""
        world_size = len(nodes) or world_size
        self.now += after + sum(STARTUP.values())
        self.attempt, self.world_size = self.attempt + 1, world_size
        for rank in range(world_size if record else 0):
            pid = 100 + 10 * self.attempt + rank
            named = () if rank else tuple(nodes)
            self.write(started(from_step, world_size=world_size, pid=pid, nodes=named), rank=rank)

    def write(self, event: Event, after: float = 0.0, rank: int = 0) -> None:
        self.now += after
        self._append(f"attempt-{self.attempt:04d}-rank-{rank:05d}.jsonl", rank, event)

    def steps(self, first: int, last: int, seconds: float = 1.0, idle: float = 0.0, **changes: Any) -> None:
        for number in range(first, last + 1):
            self.write(step(number, seconds=seconds, **changes), after=idle + seconds)

    def train(self, last: int, **changes: Any) -> None:
        """A start, and the steps 1 to `last`."""
        self.start()
        self.steps(1, last, **changes)

    def finish(self, first: int, last: int, **changes: Any) -> None:
        """The steps from `first` to the last of the run, and its end."""
        self.steps(first, last, **changes)
        self.end("finished", last)

    def end(self, status: str, at: int, after: float = 0.0, reason: str = "", rank: int = 0) -> None:
        self.write(ended(status, at, None, reason=reason), after, rank)

    def fault(
        self, kind: str, after: float = 0.0, victim: int | None = 1, at: int | None = None, index: int | None = None,
        pid: int | None = None, member: int | None = None,
    ) -> None:  # fmt: skip
        """A fault fires: its victim writes it down, or the nemesis where it has none."""
        self.now += after
        path = self.path / "events" / "faults.jsonl"
        number = len(path.read_text().splitlines()) if path.exists() else 0
        event = FaultFired(
            index=number if index is None else index, fault=kind, victim=victim, step=at, phase="before_reduce",
            pid=500 + number if pid is None else pid, member=member,
        )  # fmt: skip
        self._append(path.name, -1 if victim is None else victim, event)

    def _append(self, name: str, rank: int, event: Event) -> None:
        path, attempt = self.path / "events" / name, max(0, self.attempt)
        with contextlib.closing(EventLog(path, attempt, rank, lambda: self.now)) as log:
            log.append(event)

    @property
    def entries(self) -> list[Entry]:
        return read(self.path)

    @property
    def history(self) -> History:
        return History.read(self.path)


def killed_once(path: Path) -> Run:
    """Two seconds of start, 17 steps, a kill, a second until it is noticed, two of start, steps 11 to 60."""
    run = Run(path)
    run.record()
    run.train(10, seconds=0.5)
    run.write(evaluated(10), after=0.25)
    run.steps(11, 12, seconds=0.5)
    run.write(saved(10))
    run.steps(13, 17, seconds=0.5)
    run.fault("sigkill", after=0.25, victim=1, at=18)
    run.start(from_step=10, after=1.0)
    run.write(killed())
    run.steps(11, 60, seconds=0.5)
    run.end("finished", 60, after=0.5)
    return run
