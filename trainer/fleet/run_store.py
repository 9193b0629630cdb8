"""Store of runs: each run once, in a directory named by a digest of what decides its result (its key).

    STORE/KEY/config.toml     the whole config: `torchrun … -m trainer train STORE/KEY/config.toml --run STORE/KEY/run`
    STORE/KEY/run             the run directory
    STORE/KEY/log.txt         output of its workers, start after start
    STORE/KEY/failed.json     reason why the last scheduler gave the run up; removed when the run is tried again
    STORE/KEY/failures.json   exit of its last process, for the run's own log
    STORE/KEY/lock            held by the scheduler that supervises the run

The files are the only state: a scheduler may be killed at any time, and the next one reads where it stopped.
"""

import contextlib
import fcntl
import json
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from trainer import checkpoint, files
from trainer import config as configs
from trainer.config import Config
from trainer.errors import RunDirectoryError, TopropeError, of_system
from trainer.faults import plan as faultplan
from trainer.log import events

RunStatus = Literal["waiting", "running", "stopped", "finished", "missing"]
"""waiting: not begun. stopped: begun, but no process runs it. missing: given up, with a reason."""
START_MARK = "== "
"""First characters of the line that each start of a run prints to its log first."""
PROGRESS = {"attempt_started": "from_step", "step": "step"}
"""Events that say how far a run is, with the key of the step."""
LAST_LINES = 12
TAIL_BYTES = 16_384  # an event is well under 1 kB; the last step and the end are among the last few


@dataclass(frozen=True)
class RunState:
    """Progress of a run, read from its files; cheap enough to be read many times a minute."""

    status: RunStatus
    step: int = 0
    reason: str = ""
    """Reason why the run is missing."""
    seconds_per_step: float | None = None
    """Median of its newest steps; None where there are none."""
    seconds_per_eval: float | None = None
    """Sum over all held-out sets; None where none has been scored lately."""


class StoredRun:
    """Directory of one run in the store, and the files in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config, self.run, self.log = directory / "config.toml", directory / "run", directory / "log.txt"
        self.failures, self.failed = directory / "failures.json", directory / "failed.json"

    def claim(self) -> FileLock | None:
        """Lock the run for this scheduler, until the lock is released; None if another scheduler holds it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return hold(self.directory / "lock")

    def prepare(self, config: Config, name: str) -> None:
        """Write the config that the run is started with, and remove the records of earlier failures."""
        head = f"# {name}, as a ladder planned it. Any start resumes from the newest checkpoint.\n\n"
        files.write(self.config, head + configs.as_toml(config))
        for old in (self.failed, self.failures, self.failures.with_suffix(".final")):
            old.unlink(missing_ok=True)

    def give_up(self, reason: str) -> None:
        files.write(self.failed, json.dumps({"reason": reason}) + "\n")

    def progress(self) -> tuple[int, int]:
        """Return (step of the newest checkpoint, number of faults fired): both only grow from start to start."""
        try:
            saved = checkpoint.committed(self.run)
        except TopropeError:
            saved = []
        return (saved[0].step if saved else -1, len(faultplan.fired(self.run)))

    def last_output(self) -> str:
        """Return the end of the newest start's output: its error if it is one of ours, else its last lines."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "It printed nothing."
        printed = text.rpartition(f"\n{START_MARK}")[2].strip().splitlines()
        errors = [number for number, line in enumerate(printed) if re.match(r"\w+Error: ", line)]
        return "\n".join(printed[errors[-1] :] if errors else printed[-LAST_LINES:])

    def has_finished(self) -> bool:
        return _has_finished(_newest_records(self.run))

    def read_state(self, steps: int) -> RunState:
        """Read the state of this run of `steps` steps from its files."""
        if not self.directory.exists():
            return RunState("waiting")
        records = _newest_records(self.run)
        seconds = [record["seconds"] for record in records if record["event"] == "step"]
        evals = {record["set"]: record["seconds"] for record in records if record["event"] == "eval"}
        speeds = (statistics.median_high(seconds) if seconds else None, sum(evals.values()) if evals else None)
        if _has_finished(records):
            return RunState("finished", steps, "", *speeds)
        status: RunStatus = "stopped" if records else "waiting"
        reason = ""
        # The second lock is that of the run itself, which the plain `train` command holds without a scheduler.
        if is_held(self.directory / "lock") or is_held(self.run / "lock"):
            status = "running"
        elif self.failed.exists():
            status, reason = "missing", "unknown"
            with contextlib.suppress(OSError, ValueError, KeyError):
                reason = str(files.read_object(self.failed)["reason"])
        # An attempt that has not finished a step yet is at the step from which it resumed.
        steps_done = [record[PROGRESS[record["event"]]] for record in records if record["event"] in PROGRESS]
        return RunState(status, steps_done[-1] if steps_done else 0, reason, *speeds)


def hold(path: Path) -> FileLock | None:
    """Lock a file, created if it is missing, until the lock is released; None if another process holds it."""
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)  # the kernel releases it when this process dies, for whatever reason
    except Timeout:
        return None
    except OSError as error:
        rule, remedy = "It keeps two schedulers apart.", "Give an --out that can be written and locked."
        raise RunDirectoryError(of_system(error, f"{path} cannot be locked", rule, remedy)) from None
    return lock


def is_held(path: Path) -> bool:
    """True if a process holds the lock on this file."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as lock:
        try:
            # Shared: two readers at once must not take each other for a holder. FileLock has no shared mode.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _newest_records(run: Path) -> list[dict[str, Any]]:
    """The last events that rank 0 logged in each attempt of a run, oldest first, without torn lines."""
    records: list[dict[str, Any]] = []
    for path in sorted(events.events_directory(run).glob("attempt-*-rank-00000.jsonl")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            # Only the end is read: the scheduler asks every second, and logs grow to many megabytes.
            start = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
            file.seek(start)
            # The first line is cut where reading began in the middle; the last one may still be being written.
            for line in file.read().split(b"\n")[1 if start else 0 : -1]:
                with contextlib.suppress(ValueError):
                    records.append(files.parse_object(line))
    return records


def _has_finished(records: list[dict[str, Any]]) -> bool:
    return any(record["event"] == "attempt_ended" and record["status"] == "finished" for record in records)
