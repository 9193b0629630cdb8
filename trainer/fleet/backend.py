"""Start of a fleet's processes, here on this machine. Another backend implements the same two protocols."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from trainer.fleet.run_store import StoredRun
from trainer.launch import agent, forkserver

WORKER = "trainer.fleet.worker"
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Read when torch is loaded; numerics.threads decides at the start of a run, as in the plain command."""


class Process(Protocol):
    """A started run. subprocess.Popen and forkserver.Child have all of this."""

    pid: int

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        ...

    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Task:
    """One start of a run."""

    stored: StoredRun
    name: str
    """Name of the run in its log and in W&B."""
    ranks: int
    environment: Mapping[str, str]
    """Added to the scheduler's environment: the devices of a slot."""


class Backend(Protocol):
    """Starts runs somewhere. A started run must end when its scheduler is killed."""

    def start(self, task: Task) -> Process: ...


class Local:
    """Starts runs on this machine.

    On Linux they are forked from a process that has imported torch: a new Python process needs seconds for that import,
    too long for a run of a minute. Create the object early: its imports then run beside other work. Elsewhere each run
    is a new Python process.
    """

    def __init__(self, server: forkserver.ForkServer | None = None) -> None:
        self._server = server or agent.warm_server()

    def start(self, task: Task) -> Process:
        arguments = [str(task.stored.directory), task.name, str(task.ranks), str(os.getpid())]
        environment = {**THREADS, **os.environ, **task.environment}
        if self._server is not None and (child := self._server.start(WORKER, arguments, environment)) is not None:
            return child
        # No server, or it has died. A session of its own keeps Ctrl-C from the run: the scheduler asks it to stop.
        return subprocess.Popen(
            [sys.executable, "-m", WORKER, *arguments], env=environment, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
