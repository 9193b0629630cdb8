"""Runs of a fleet as jobs of Slurm: the second backend.

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

from trainer import config as configs
from trainer import files
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, TopropeError
from trainer.fleet.backend import THREADS, Task
from trainer.fleet.run_store import StoredRun
from trainer.launch import slurm
from trainer.launch.slurm import SchedulerError, UnansweredError

ASK_SECONDS = 2.0
"""Interval at which Slurm is asked for the queue, once for all jobs."""
RETRY_SECONDS = 5.0
POLL_SECONDS = 0.2


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
        return SlurmJob(self, task)

    def works_on(self, stored: StoredRun) -> bool:
        """True if a job of this run waits or runs."""
        return name_of(stored) in self.names()[0]

    def names(self) -> tuple[set[str], float]:
        """Names of the jobs that wait, run or end just now, and when Slurm was asked for them (monotonic)."""
        if (now := time.monotonic()) - self._tried_at >= ASK_SECONDS:
            self._tried_at = now
            with contextlib.suppress(SchedulerError):  # it is waited for
                self._names = {job.name for job in slurm.queue()}
                self._asked_at = now
        return self._names, self._asked_at


class SlurmJob:
    """A job of one run, with the part of subprocess.Popen that the supervisor uses.

    Submitted at the first poll in which Slurm answers. Neither a signal nor `kill` ends it: it goes on without us.
    """

    pid = 0

    def __init__(self, jobs: SlurmJobs, task: Task) -> None:
        self._jobs, self._task = jobs, task
        self._name = name_of(task.stored)
        self._submission = task.stored.directory / "submission.json"
        self._was_seen = False
        """True if the job was in the queue, or Slurm has told its id."""
        self._tried_at = float("-inf")
        self._asked_since = time.monotonic()
        """What the queue said before is not about this job."""
        self._absent_since = self._asked_since + slurm.seconds_unsettled(self._submission)
        """What is not in the queue before may still come."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The run's exit status, -SIGKILL if the job vanished; None while it waits, runs, or Slurm does not answer."""
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
        stored, task = self._task.stored, self._task
        directory = stored.directory.absolute()
        script = self._jobs.request.script(
            "slurm_run.sh",
            {
                "job-name": self._name,
                "comment": task.name,
                "nodes": "1",
                "cpus-per-task": str(task.ranks * configs.load(stored.config).numerics.threads),
            },
            directory / "job-.txt",
            environment={**THREADS, **task.environment},
            directory=str(directory),
            name=task.name,
            ranks=task.ranks,
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
        """How a job ended that is not in the queue; None if there was none. Each end is returned once."""
        file = self._task.stored.directory / "exit-status"
        try:
            if not self._submission.exists():  # an end that was read before ends were renamed
                file.unlink(missing_ok=True)
            status = int(file.read_text(encoding="ascii"))
            file.replace(file.with_suffix(".read"))
            return status  # also of a job that ended while nobody watched
        except (OSError, ValueError):
            if self._was_seen:
                return -signal.SIGKILL
            return EXIT_FINISHED if self._task.stored.has_finished() else None


def name_of(stored: StoredRun) -> str:
    """Name of a run's job in the queue."""
    return f"toprope-{hashlib.sha256(str(stored.directory.absolute()).encode()).hexdigest()[:16]}"
