"""Runs of a fleet as jobs of Slurm: the second backend.

Jobs outlive the scheduler that submitted them: the next one finds them in the queue by their names, which are made of
their directories. Whether a job is there Slurm says; how it ended, a file that its script writes. A job that is gone
without one was lost with its node, or cancelled: the run is started again.

    STORE/KEY/job.sh         the script
    STORE/KEY/exit-status    written by the script at its end
"""

import contextlib
import hashlib
import signal
import subprocess
import time

from trainer import config as configs
from trainer import files
from trainer.errors import EXIT_PREEMPTED
from trainer.fleet.backend import THREADS, Task
from trainer.fleet.run_store import StoredRun
from trainer.launch import slurm
from trainer.launch.slurm import SchedulerError

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
        return self.in_queue(name_of(stored), since=self._asked_at) is True

    def in_queue(self, name: str, since: float) -> bool | None:
        """True if a job of that name waits, runs or ends just now; None if Slurm has not answered since `since`."""
        if (now := time.monotonic()) - self._tried_at >= ASK_SECONDS:
            self._tried_at = now
            with contextlib.suppress(SchedulerError):  # it is waited for
                self._names = slurm.names()
                self._asked_at = now
        return name in self._names if self._asked_at >= since else None


class SlurmJob:
    """A job of one run, with the part of subprocess.Popen that the supervisor uses.

    Submitted at the first poll in which Slurm answers. Neither a signal nor `kill` ends it: it goes on without us.
    """

    pid = 0

    def __init__(self, jobs: SlurmJobs, task: Task) -> None:
        self._jobs, self._task = jobs, task
        self._name = name_of(task.stored)
        self._submitted_at: float | None = None
        self._tried_at = float("-inf")
        self._began = time.monotonic()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The run's exit status, -SIGKILL if the job vanished; None while it waits, runs, or Slurm does not answer."""
        if self.returncode is None:
            since = self._began if self._submitted_at is None else self._submitted_at
            found = self._jobs.in_queue(self._name, since)
            if self._submitted_at is None:
                if found:  # of an earlier scheduler, or submitted while Slurm did not answer
                    self._submitted_at = since
                elif found is False:
                    self._submit()
            elif found is False:
                self.returncode = self._exit_status()
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
        (directory / "exit-status").unlink(missing_ok=True)
        with contextlib.suppress(SchedulerError):
            slurm.sbatch(directory / "job.sh")
            self._submitted_at = time.monotonic()
        self._tried_at = self._began = time.monotonic()  # the queue is read anew: Slurm may have taken it unanswered

    def _exit_status(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self._task.stored.directory / "exit-status").read_text(encoding="ascii"))
        return -signal.SIGKILL


def name_of(stored: StoredRun) -> str:
    """Name of a run's job in the queue."""
    return f"toprope-{hashlib.sha256(str(stored.directory.absolute()).encode()).hexdigest()[:16]}"
