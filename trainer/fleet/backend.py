"""Start of a fleet's processes, here on this machine."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from trainer.fleet.run_store import StoredRun
from trainer.launch import agent, forkserver

WORKER = "trainer.fleet.worker"
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Read when torch is loaded; numerics.threads decides at the start of a run, as in the plain command."""


class Process(Protocol):
    """A started run: the part of subprocess.Popen that callers use."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

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


Backend = Callable[[Task], Process]
"""Starts runs somewhere. A run here must end when its scheduler is killed; one in a queue is found again there."""


class Local:
    """The backend of this machine.

    On Linux runs are forked from a process that has imported torch: a new Python process needs seconds for that import,
    too long for a run of a minute. Create the object early: its imports then run beside other work. Elsewhere each run
    is a new Python process.
    """

    def __init__(self, server: forkserver.ForkServer | None = None) -> None:
        self._server = server or forkserver.fork_in_child(agent.WARM) or agent.warm_server()

    def __call__(self, task: Task) -> Process:
        arguments = [str(task.stored.directory), task.name, str(task.ranks), str(os.getpid())]
        environment = {**THREADS, **os.environ, **task.environment}
        # Another package than the server's cannot be forked from it.
        server = self._server if "PYTHONPATH" not in task.environment else None
        if server is not None and (child := server.start(WORKER, arguments, environment)) is not None:
            return child
        # No server, or it has died. A session of its own keeps Ctrl-C from the run: the scheduler asks it to stop.
        command = [sys.executable, "-m", WORKER, *arguments]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
