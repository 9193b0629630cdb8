"""The pool: every run of every ladder once, in a directory named by what decides its result. Read from files alone.

    POOL/KEY/config.toml     the whole config: `torchrun … -m trainer train POOL/KEY/config.toml --run POOL/KEY/run`
    POOL/KEY/run             the run directory
    POOL/KEY/log.txt         what its workers printed, start after start
    POOL/KEY/failed.json     why the last scheduler gave it up; gone when it is tried again
    POOL/KEY/failures.json   why it is started again, for the run's own log
    POOL/KEY/lock            held by the scheduler that is at it

There is no other state: a scheduler that is killed leaves nothing that the next one would miss.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from trainer import checkpoint, files
from trainer import config as configs
from trainer.errors import TopropeError
from trainer.faults import plan as faultplan
from trainer.ladder.plan.ladder import PlannedRun
from trainer.log import events

Status = Literal["waiting", "running", "stopped", "finished", "missing"]
"""waiting: not begun. stopped: begun, and nobody is at it. missing: given up, with the reason."""
TAIL_BYTES = 16_384  # an event is well under 1 kB; the last step and the end are among the last few


@dataclass(frozen=True)
class Place:
    """One run's directory of the pool."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def run(self) -> Path:
        return self.directory / "run"

    @property
    def log(self) -> Path:
        return self.directory / "log.txt"

    @property
    def failures(self) -> Path:
        return self.directory / "failures.json"

    @property
    def failed(self) -> Path:
        return self.directory / "failed.json"

    def claim(self) -> IO[str] | None:
        """Make it ours while the returned file is open; None if another scheduler is at it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return hold(self.directory / "lock")

    def write(self, planned: PlannedRun) -> None:
        """The config that this run is started with, whole or not at all. What fails is tried anew."""
        text = f"# {planned.name}, as a ladder planned it. Any start goes on from the newest checkpoint.\n\n"
        files.write(self.config, text + configs.as_toml(planned.config))
        for old in (self.failed, self.failures, self.failures.with_suffix(".final")):
            old.unlink(missing_ok=True)

    def give_up(self, reason: str) -> None:
        files.write(self.failed, json.dumps({"reason": reason}) + "\n")

    def progress(self) -> tuple[int, int]:
        """What a start can add to for good: (step of the newest checkpoint, faults fired)."""
        try:
            saved = checkpoint.committed(self.run)
        except TopropeError:
            saved = []
        return (saved[0].step if saved else -1, len(faultplan.fired(self.run)))


def place(pool: Path, planned: PlannedRun) -> Place:
    return Place(pool / planned.key)


def hold(path: Path) -> IO[str] | None:
    """Lock a file while it is open, made if need be; None if another process holds it."""
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when we die, however we die
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_held(path: Path) -> bool:
    """Whether a process holds this lock."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


# What became of a run, cheaply enough to be asked many times a minute


@dataclass(frozen=True)
class State:
    status: Status
    step: int = 0
    reason: str = ""
    seconds_per_step: float | None = None
    """Median of its newest steps; None where there are none."""
    seconds_per_eval: float | None = None
    """Of all held-out sets; None where none has been scored lately."""


def state(pool: Path, planned: PlannedRun) -> State:
    """From the files as they are now."""
    at = place(pool, planned)
    if not at.directory.exists():
        return State("waiting")
    tails = _tails(at)
    steps = [record for tail in tails for record in tail if record["event"] == "step"]
    times = sorted(record["seconds"] for record in steps)
    scored = {record["set"]: record["seconds"] for tail in tails for record in tail if record["event"] == "eval"}
    speeds = (times[len(times) // 2] if times else None, sum(scored.values()) if scored else None)
    if _ended_well(tails):
        return State("finished", planned.config.budget.steps, "", *speeds)
    step = _newest(tails)
    if is_held(at.directory / "lock") or is_held(at.run / "lock"):
        return State("running", step, "", *speeds)
    if at.failed.exists():
        return State("missing", step, reason_of(at), *speeds)
    return State("stopped" if tails else "waiting", step, "", *speeds)


def has_finished(at: Place) -> bool:
    return _ended_well(_tails(at))


def _ended_well(tails: list[list[dict[str, Any]]]) -> bool:
    return any(record["event"] == "attempt_ended" and record["status"] == "finished" for t in tails for record in t)


def reason_of(at: Place) -> str:
    try:
        return str(json.loads(at.failed.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def _newest(tails: list[list[dict[str, Any]]]) -> int:
    """The step that its newest attempt has come to."""
    for tail in reversed(tails):
        steps = [record["step"] for record in tail if record["event"] == "step"]
        steps = steps or [record["from_step"] for record in tail if record["event"] == "attempt_started"]
        if steps:
            return steps[-1]
    return 0


def _tails(at: Place) -> list[list[dict[str, Any]]]:
    """The last events of rank 0 in each attempt."""
    return [_tail(path) for path in sorted(events.events_directory(at.run).glob("attempt-*-rank-00000.jsonl"))]


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last events of a file, as they were written; nothing of what is torn."""
    try:
        with path.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return list(_decoded(lines[1 if start else 0 : -1]))


def _decoded(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
