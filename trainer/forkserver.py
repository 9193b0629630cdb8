"""Workers forked from a process that has its imports behind it: a start costs tenths of a second, not seconds.

    agent ── forks, before it has threads ──▶ server: imports what workers need, then waits for requests
    agent ── (arguments, environment) ──▶ server ── forks twice ──▶ worker: runs `-m MODULE ARGUMENTS`

The process between server and worker ends at once, so that the worker becomes a child of the agent (its "subreaper"):
the agent waits for it, signals it and is its parent, as if it had started it in the ordinary way. A worker begins with
modules and nothing else: no computation is done before the fork, no thread is running and no CUDA context exists.

Linux only. Where there is no server any more, or a process has threads, the caller starts workers in the ordinary way.
"""

import ctypes
import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from trainer import elastic

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: who becomes the parent of descendants whose own parent has ended
POLL_SECONDS = 0.01

Request = tuple[str, list[str], dict[str, str]]
"""Module, arguments and environment of a worker."""


class Worker:
    """A child of ours that somebody else forked: as much of subprocess.Popen as torchrun uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout)
            time.sleep(POLL_SECONDS)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The agent's end of the server."""

    def __init__(self, requests: "Connection[Any, Any]") -> None:
        self._requests = requests

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Worker | None:
        """A worker that runs `-m module arguments`, in a session of its own; None if the server is gone."""
        try:
            _adopt_orphans(True)
            self._requests.send((module, list(arguments), dict(environment)))
            return Worker(self._requests.recv())
        except (OSError, EOFError):
            return None
        finally:
            _adopt_orphans(False)  # those that dying workers leave are not ours to wait for


def fork(modules: Sequence[str]) -> ForkServer | None:
    """Fork a server that imports `modules`; this process will be the parent of all workers that it forks.

    None where that is not safe: without Linux, or if this process has threads.
    In every worker this call never returns: it raises the SystemExit, or the exception, that the worker's module ends
    with. So nothing may stand around it that must not happen in a worker.
    """
    if sys.platform != "linux" or len(list(Path("/proc/self/task").iterdir())) > 1:
        return None
    ours, theirs = Pipe()
    agent = os.getpid()
    if os.fork():
        theirs.close()
        return ForkServer(ours)
    ours.close()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which tells its workers
    request = _serve(theirs, agent, modules)
    signal.signal(signal.SIGINT, interrupt)
    _run(*request)


def _adopt_orphans(adopt: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _serve(requests: "Connection[Any, Any]", agent: int, modules: Sequence[str]) -> Request:
    """The server's life: it ends here with the agent. In each worker this returns what the worker is to run."""
    for module in modules:
        importlib.import_module(module)
    while True:
        try:
            request = requests.recv()
        except (OSError, EOFError):
            os._exit(0)
        heard, told = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            os.setsid()  # before anybody knows of us: torchrun sends its signals to a worker's whole group
            os.write(told, str(os.getpid()).encode())
            requests.close()
            os.close(heard)
            os.close(told)
            _wait_for_parent(agent)
            return request
        os.close(told)
        os.waitpid(between, 0)  # from here on the worker is the agent's child
        requests.send(int(os.read(heard, 32)))
        os.close(heard)


def _wait_for_parent(agent: int) -> None:
    while os.getppid() != agent:
        if not Path(f"/proc/{agent}").exists():
            os._exit(1)
        time.sleep(0.001)


def _run(module: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Be what `python -u -m module arguments` is in this environment."""
    os.environ.clear()
    os.environ.update(environment)
    elastic.name_process()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(write_through=True)
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise SystemExit(0)
