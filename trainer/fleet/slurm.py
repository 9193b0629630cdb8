"""Work of a fleet as jobs of Slurm, such as runs: the second backend.

Jobs outlive the scheduler that submitted them: the next one finds them in the queue by their names, which are made of
their directories. Whether a job is there Slurm says; how it ended, a file that its script writes. A job that is gone
without one was lost with its node, or cancelled: the run is started again.

A run is submitted only if nothing says that it has a job: none in the queue, no end that nobody has read yet, no
submission without an answer that may still become a job (launch/slurm.py).

    STORE/KEY/job.sh             the script
    STORE/KEY/submission.json    written before the script is submitted, and when Slurm has told the job's id
    STORE/KEY/exit-status        written by the script at its end; renamed to exit-status.read by the one who reads it
"""

import contextlib
import hashlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer import config as configs
from trainer import files
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, TopropeError
from trainer.fleet.backend import THREADS, WORKER, Task
from trainer.fleet.run_store import StoredRun
from trainer.launch import slurm
from trainer.launch.slurm import SchedulerError, UnansweredError

ASK_SECONDS = 2.0
"""Interval at which Slurm is asked for the queue, once for all jobs."""
RETRY_SECONDS = 5.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """One job's work on its node, and the means to find it again."""

    directory: Path
    """Directory of the job's files; its name in the queue is made of it."""
    name: str
    """For people."""
    command: Sequence[str]
    """Module of Python, with its arguments. It may begin anew at any time, and leaves with 75 to be requeued."""
    cpus: int
    has_finished: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)


def run_of(task: Task) -> Work:
    """Return the work of one run."""
    stored, directory = task.stored, task.stored.directory.absolute()
    return Work(
        directory, task.name, [WORKER, str(directory), task.name, str(task.ranks), "0"],
        task.ranks * configs.load(stored.config).numerics.threads, stored.has_finished, task.environment,
    )  # fmt: skip


class SlurmJobs:
    """The backend: starts a run as a job, or takes over the job that works on it already."""

    def __init__(self, request: slurm.Request) -> None:
        """Raises UsageError if there is no Slurm here, or if it would refuse such jobs."""
        request.check()
        slurm.require()
        self.request = request
        self._names: set[str] = set()
        self._asked_at = float("-inf")
        """When the queue was read that `_names` holds."""
        self._tried_at = float("-inf")

    def __call__(self, task: Task) -> "SlurmJob":
        return self.start(run_of(task))

    def start(self, work: Work) -> "SlurmJob":
        return SlurmJob(self, work)

    def works_on(self, stored: StoredRun) -> bool:
        """True if a job of this run waits or runs."""
        return name_of(stored.directory) in self.names()[0]

    def names(self) -> tuple[set[str], float]:
        """Names of the jobs that wait, run or end just now, and when Slurm was asked for them (monotonic)."""
        if (now := time.monotonic()) - self._tried_at >= ASK_SECONDS:
            self._tried_at = now
            with contextlib.suppress(SchedulerError):  # it is waited for
                self._names = {job.name for job in slurm.queue()}
                self._asked_at = now
        return self._names, self._asked_at


class SlurmJob:
    """A job, with the part of subprocess.Popen that the supervisor uses.

    Submitted at the first poll in which Slurm answers. Neither a signal nor `kill` ends it: it goes on without us.
    """

    pid = 0

    def __init__(self, jobs: SlurmJobs, work: Work) -> None:
        self._jobs, self._work = jobs, work
        self._name = name_of(work.directory)
        self._submission = work.directory / "submission.json"
        self._was_seen = False
        """True if the job was in the queue, or Slurm has told its id."""
        self._tried_at = float("-inf")
        self._asked_since = time.monotonic()
        """Time (monotonic) before which the queue's answers are not about this job."""
        self._absent_since = self._asked_since + slurm.seconds_unsettled(self._submission)
        """Time (monotonic) before which a job that is not in the queue may still come."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The work's exit status, -SIGKILL if the job vanished; None while it waits, runs, or Slurm does not answer."""
        if self.returncode is None:
            names, asked_at = self._jobs.names()
            if asked_at >= self._asked_since and self._name in names:
                self._was_seen = True  # of an earlier scheduler, or submitted while Slurm did not answer
            elif asked_at >= self._absent_since:
                self.returncode = self._end()
                if self.returncode is None:
                    self._submit()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self._name, timeout)
            time.sleep(POLL_SECONDS)
        return status

    def send_signal(self, _number: int) -> None:
        """Leave the job to itself, and count as preempted."""
        if self.returncode is None:
            self.returncode = EXIT_PREEMPTED

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _submit(self) -> None:
        if time.monotonic() - self._tried_at < RETRY_SECONDS:
            return
        work, directory = self._work, self._work.directory.absolute()
        script = self._jobs.request.script(
            "slurm_run.sh",
            {"job-name": self._name, "comment": work.name, "nodes": "1", "cpus-per-task": str(work.cpus)},
            directory / "job-.txt",
            environment={**THREADS, **work.environment},
            directory=str(directory),
            command=work.command,
        )
        files.write(directory / "job.sh", script)
        slurm.note(self._submission)
        unsettled = 0.0
        try:
            slurm.note(self._submission, slurm.sbatch(directory / "job.sh"))
            self._was_seen = True
        except UnansweredError:
            unsettled = slurm.SETTLE_SECONDS
        except TopropeError as error:
            self._submission.unlink()  # nothing was submitted
            if not isinstance(error, SchedulerError):
                raise
        self._tried_at = self._asked_since = time.monotonic()
        self._absent_since = self._asked_since + unsettled

    def _end(self) -> int | None:
        """Return the status of a job that is not in the queue; None if there was no job. Each end is returned once."""
        file = self._work.directory / "exit-status"
        try:
            if not self._submission.exists():  # an end that was read before ends were renamed
                file.unlink(missing_ok=True)
            status = int(file.read_text(encoding="ascii"))
            file.replace(file.with_suffix(".read"))
            return status  # also of a job that ended while nobody watched
        except (OSError, ValueError):
            if self._was_seen:
                return -signal.SIGKILL
            return EXIT_FINISHED if self._work.has_finished() else None


def name_of(directory: Path) -> str:
    """Name in the queue of the job whose files are in a directory."""
    return f"toprope-{hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]}"
