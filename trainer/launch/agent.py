"""A torchrun agent in the background, with its workers."""

import atexit
import contextlib
import functools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from trainer.checkpoint import memory
from trainer.launch import forkserver, namespaces, processes
from trainer.launch.processes import PROC, unused_shared_memory, wait_until
from trainer.parallel import elastic
from trainer.parallel.elastic import JOB_MARK

LAUNCH = (sys.executable, "-m", "trainer.launch.torchrun")
TRAINER = (sys.executable, "-m", "trainer")
WARM = (*forkserver.PRELOADED, *forkserver.LATER, "torch.distributed.run")
"""Modules that agents and their workers import."""


class Agent:
    """A torchrun agent, or another command, whose processes and files are found again however it ends.

    The agent has a mark in its environment that every process it starts inherits. The processes with the mark are the
    agent's, and no other process is ever sent a signal. Temporary files go to a directory of the agent's own, beside
    the log.

    Without /proc (macOS) the agent's processes are those that descend from it. Workers that outlive it are not found
    then, and ranks are not known.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, *, launch: Sequence[str] = LAUNCH,
        environment: Mapping[str, str] | None = None, directory: Path | None = None, host: int | None = None,
        warm: bool = False, ranks_by_variable: bool = False,
    ) -> None:  # fmt: skip
        """Start `launch` + `arguments` in working directory `directory`, with all output in the file `log`.

        `host` is only kept, for callers that run several. `warm` forks the agent from a process that has imported torch
        already, which pays for callers that start many; it has no effect unless the command is this Python's `-m`. With
        `ranks_by_variable` the workers are those of a program that does not name its processes: the variable RANK,
        which launchers set, tells them.
        """
        self.mark, self.host, self.log = uuid.uuid4().hex, host, log
        self._ranks_by_variable = ranks_by_variable
        self.temporary = log.with_suffix(".tmp")
        self.temporary.mkdir(parents=True)
        self._earlier_segments = unused_shared_memory()
        variables = {JOB_MARK: self.mark, "TMPDIR": str(self.temporary)}
        self._command, self._directory = [*launch, *arguments], directory or Path.cwd()
        self.process = _start(self._command, os.environ | (environment or {}) | variables, directory, log, warm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """True while the agent itself lives."""
        return self.process.poll() is None

    @property
    def output(self) -> str:
        if not self.log.exists():  # a forked process makes it, once it runs
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[int]:
        """All living processes of this agent, the agent first."""
        if PROC.exists():
            found = processes.with_environment(f"{JOB_MARK}={self.mark}")
        else:
            found = processes.descendants(self.process.pid) if self.running else []
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def workers(self) -> dict[int, int]:
        """{rank: pid} of the workers that the agent has now. Needs /proc: else empty."""
        found = {}
        for pid in self.processes():
            if self._ranks_by_variable:
                # What a worker starts itself, to load data for example, inherits the variable.
                rank = processes.environment(pid).get("RANK", "")
                parent = processes.stat(pid)[1:2]
                if rank.isdecimal() and parent and "RANK" not in processes.environment(int(parent[0])):
                    found[int(rank)] = pid
            rank = processes.name(pid).removeprefix(elastic.NAME_PREFIX)
            if rank.isdecimal() and processes.stat(pid)[1:2] == [str(self.process.pid)]:
                found[int(rank)] = pid
        return found

    def connected(self) -> bool:
        """True if the agent has opened a connection; its first is to the rendezvous store. Needs /proc: else True."""
        with contextlib.suppress(OSError):
            links = PROC.glob(f"{self.process.pid}/fd/*")
            return not PROC.exists() or any(str(link.readlink()).startswith("socket:") for link in links)
        return False

    def signal(self, number: int) -> bool:
        """Send the agent itself a signal. Returns False if it is gone."""
        return self.running and self.send(self.process.pid, number)

    def send(self, pid: int, number: int) -> bool:
        """Send a signal to a process if it is one of this agent's. Returns False if it is not, or is gone."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if not PROC.exists():
                return pid in self.processes() and os.kill(pid, number) is None
            # The handle stands for the process, not for its number, which may be given to another one meanwhile.
            handle = os.pidfd_open(pid)
            stack.callback(os.close, handle)
            if processes.environment(pid).get(JOB_MARK) == self.mark:
                signal.pidfd_send_signal(handle, number)
                return True
        return False

    def kill(self) -> None:
        """End every process of this agent with SIGKILL."""
        for _ in range(3):  # a process may start another while we go through the list
            for pid in self.processes():
                # Python's resource tracker removes the semaphores of processes that died, then ends on its own.
                if "multiprocessing.resource_tracker" not in processes.command_line(pid):
                    self.send(pid, signal.SIGKILL)
            if wait_until(lambda: not self.processes(), seconds=2):
                break
        self.process.wait(10)

    def leftovers(self) -> list[str]:
        """List what is left after the agent has ended: processes, temporary files, sockets, shared memory."""
        wait_until(lambda: not self.processes(), seconds=3)
        orphans = [f"process {pid}: {processes.command_line(pid)!r}" for pid in self.processes()]
        # torch makes a directory for its compiler as it is imported, one for all jobs of a user. And an agent that was
        # killed could not remove the failures file that every agent has.
        expected = ("torchinductor_", *([elastic.FAILURES_PREFIX] if self.process.poll() == -signal.SIGKILL else []))
        found = [path for path in sorted(self.temporary.rglob("*")) if not path.name.startswith(expected)]
        # Semaphores of other jobs have a name for an instant, or until the tracker of a killed agent removes them.
        segments = {path for path in unused_shared_memory() - self._earlier_segments if self._may_have_made(path)}
        wait_until(lambda: not segments.intersection(unused_shared_memory()), seconds=5)
        segments &= unused_shared_memory()
        return [*orphans, *(f"file {path}" for path in found), *(f"segment {path}" for path in sorted(segments))]

    def _may_have_made(self, segment: str) -> bool:
        """False for copies of checkpoints of a run that the command does not name: another job keeps them."""
        run = memory.run_of(Path(segment))
        return run is None or any((self._directory / word).resolve() == run for word in self._command)


@functools.cache
def warm_server() -> forkserver.ForkServer | None:
    """This process's own fork server, which has imported what agents and their workers need. None without Linux."""
    server = forkserver.spawn(WARM)
    if server is not None:
        atexit.register(server.close)
    return server


def _start(
    command: Sequence[str], environment: Mapping[str, str], directory: Path | None, log: Path, warm: bool
) -> subprocess.Popen[bytes] | forkserver.Child:
    """Start a command in a session of its own, with empty input and all output in the log."""
    network, words = namespaces.entered(command) if warm else ("", command)
    if warm and list(words[:2]) == [sys.executable, "-m"] and (server := warm_server()) is not None:
        child = server.start(words[2], words[3:], environment, directory=directory, output=log, network=network)
        if child is not None:
            return child
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=directory, env=environment,
            start_new_session=True,
        )  # fmt: skip
