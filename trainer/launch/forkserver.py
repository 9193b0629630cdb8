"""Starts processes by forking one that has imported torch already: in tenths of a second, not in seconds.

    caller ── forks (while it has no threads) or spawns ──▶ server: imports modules, then waits for requests
    caller ── (arguments, environment, …) ──▶ server ── forks twice ──▶ child: runs `-m MODULE ARGUMENTS`

torchrun starts its workers in this way, a chaos campaign its agents, and a ladder its runs. The process between server
and child ends at once, and the caller adopts the child (as its "subreaper"): it is the child's parent, waits for it and
signals it, as if it had started it in the ordinary way. A child has imported modules and nothing else: before the fork
nothing is computed, no thread runs and no CUDA context exists.

Linux only. Without a server, or once it is gone, the caller must start its processes in the ordinary way.
"""

import atexit
import ctypes
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from trainer import provenance, signals
from trainer.log import rundir
from trainer.parallel import elastic
from trainer.show import terminal

PRELOADED = (
    "multiprocessing.synchronize", "random", "numpy.ma", "numpy.random", "pydantic.type_adapter", "rich.console",
    "torch.distributed.checkpoint", "torch.profiler", "torch.utils.serialization", "trainer.checkpoint.loading",
    "trainer.checkpoint.saving", "trainer.cli", "trainer.member",
)  # fmt: skip
"""All that a run imports on its way; a fork server loads it, so that each fork has it."""
LATER = ("torch._dynamo",)
"""Modules that only sharded and compiled runs import, in a second each: loaded after the first children have started.
Each start after a death then has them."""
IDLE_SECONDS = 2.0
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h: this process adopts descendants whose own parent has ended
CLONE_NEWNET = 0x40000000  # linux/sched.h
POLL_SECONDS = 0.01
UNMARKED = "0" * elastic.MARK_LENGTH
_is_child = False
"""True in a child of a server."""
_mark_address = 0
"""In a server that `spawn` has started, and in its children: where the mark stands that /proc/PID/environ shows."""


class Request(NamedTuple):
    """A child to be started."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    directory: Path
    output: Path | None
    """File for stdout, and for stderr if `errors` is None. None: the server's stdout and stderr."""
    errors: Path | None
    network: str
    """File of the network namespace that it enters; empty for none."""


class Child:
    """A child of this process that the server forked, with the part of subprocess.Popen that callers use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._polling = threading.Lock()  # waitpid returns the exit status only once

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with self._polling:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_SECONDS)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The caller's end of the server."""

    _asking = threading.Lock()  # one for all servers: while one has a child adopted, none may end the adoption

    def __init__(self, requests: "Connection[Any, Any]", spawned: "subprocess.Popen[bytes] | None" = None) -> None:
        self._requests = requests
        self._spawned = spawned

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], *, directory: Path | None = None,
        output: Path | None = None, errors: Path | None = None, network: str = "",
    ) -> Child | None:  # fmt: skip
        """Start a child that runs `-m module arguments` in a session of its own. Returns None if the server is gone.

        It works in `directory` (default: the caller's). stdout and stderr go to the file `output`, or stderr to the
        file `errors`. `network` is the file of a network namespace that it enters, which only root may. PYTHONPATH and
        other variables that an interpreter reads as it starts are those of the server.
        """
        request = Request(module, list(arguments), dict(environment), directory or Path.cwd(), output, errors, network)
        with self._asking:
            try:
                _adopt_orphans(True)
                self._requests.send(request)
                return Child(self._requests.recv())
            except (OSError, EOFError):
                return None
            finally:
                _adopt_orphans(False)  # else we had to wait for the children of workers that die

    def close(self) -> None:
        """End the server. Its children continue to run."""
        self._requests.close()
        if self._spawned is not None:
            self._spawned.wait()


def fork(modules: Sequence[str]) -> ForkServer | None:
    """Fork a server that imports `modules`. This process will be the parent of the server's children.

    Returns None without Linux, and if this process has threads: a fork copies the locks that they hold, but not the
    threads. In the children this call never returns.
    """
    if sys.platform != "linux" or len(list(Path("/proc/self/task").iterdir())) > 1:
        return None
    caller_end, server_end = Pipe()
    caller = os.getpid()
    if os.fork():
        server_end.close()
        return ForkServer(caller_end)
    caller_end.close()
    signals.reset()
    # Ctrl-C reaches this process too, and Slurm sends its notice to all processes of a job. The caller heeds them.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals.ASKING}
    _run(_serve(server_end, caller, modules, before))


def fork_in_child(modules: Sequence[str]) -> ForkServer | None:
    """In a child of a server, fork a server of its own: it has the imports already. Returns None elsewhere.

    For the beginning of a child: the server, and so its children, keep the files and locks that this process has open.
    """
    return fork(modules) if _is_child else None


def spawn(modules: Sequence[str]) -> ForkServer | None:
    """Start a server as a new process, for callers that have threads. Returns None without Linux."""
    if sys.platform != "linux":
        return None
    caller_end, server_end = Pipe()
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read as torch is loaded, and torchrun's default
    program = f"from trainer.launch import forkserver; forkserver.serve({server_end.fileno()}, {list(modules)!r})"
    with server_end:
        server = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[server_end.fileno()],
            env=threads | os.environ | {elastic.JOB_MARK: UNMARKED}, start_new_session=True,
        )  # fmt: skip
    return ForkServer(caller_end, server)


def serve(descriptor: int, modules: Sequence[str]) -> NoReturn:
    """Run the process that `spawn` starts."""
    global _mark_address  # noqa: PLW0603 - a fact about the process
    caller = os.getppid()
    # Processes are found by the mark in /proc/PID/environ. A fork shows its server's, so it is overwritten in place, in
    # the memory that exec has filled and os.environ leaves alone.
    begin, end = map(int, Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[47:49])
    mark = f"{elastic.JOB_MARK}="
    variable = begin + ctypes.string_at(begin, end - begin).index(f"{mark}{UNMARKED}\0".encode())
    _mark_address = variable + len(mark)
    _run(_serve(Connection(descriptor), caller, modules))


def _adopt_orphans(adopt: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _serve(
    requests: "Connection[Any, Any]",
    caller: int,
    modules: Sequence[str],
    handlers: Mapping[signal.Signals, Any] | None = None,
) -> Request:
    """Serve until the caller is gone; the server ends here. In each child this returns the child's request.

    A child gets these signal handlers before its caller knows its pid, and so before any signal for it.
    """
    _load(modules)
    # Each fork remembers them: they are the code and the libraries that it runs, whatever the files hold by then.
    provenance.code()
    rundir.versions()
    later: list[str] = []
    while True:
        try:
            if later and not requests.poll(IDLE_SECONDS):
                _load(later)
            request = requests.recv()
        except (OSError, EOFError):
            os._exit(0)
        later = [module for module in LATER if "torch" in sys.modules and module not in sys.modules]
        pid_end, child_end = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            os.setsid()  # before our pid is known: torchrun sends its signals to a worker's whole process group
            for number, handler in (handlers or {}).items():
                signal.signal(number, handler)
            os.write(child_end, str(os.getpid()).encode())
            requests.close()
            os.close(pid_end)
            os.close(child_end)
            while os.getppid() != caller:  # workers end themselves when their parent changes
                if not Path(f"/proc/{caller}").exists():
                    os._exit(1)
                time.sleep(0.001)
            return request
        os.close(child_end)
        os.waitpid(between, 0)  # from here on the child is the caller's
        requests.send(int(os.read(pid_end, 32)))
        os.close(pid_end)


def _load(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    # To look at what is there would copy its memory in each fork, which costs more than to train a step: garbage is not
    # looked for there, and at its end a fork does not undo what torch registered as it was imported.
    gc.freeze()
    for finalizer in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        finalizer.atexit = False


def _run(request: Request) -> NoReturn:
    """Do what `python -u -m module arguments` does in the environment of the request."""
    global _is_child  # noqa: PLW0603 - a fact about the process
    _is_child = True
    os.environ.clear()
    os.environ.update(request.environment)
    if _mark_address:
        ctypes.memmove(_mark_address, request.environment.get(elastic.JOB_MARK, UNMARKED).encode(), len(UNMARKED))
    tempfile.tempdir = None  # the server may have cached its own
    os.chdir(request.directory)
    for path, descriptors in ((request.output, (1, 2)), (request.errors, (2,))):
        if path is not None:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            for descriptor in descriptors:
                os.dup2(file, descriptor)
            os.close(file)
    if request.network:
        namespace = os.open(request.network, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), request.network)
        os.close(namespace)
    if "RANK" in os.environ:
        elastic.name_process()
    terminal.take(unbuffered=True)
    if (command_line := sys.modules.get("trainer.cli")) is not None:
        setattr(command_line, "PROCESS_STARTED", time.time())  # noqa: B010 - it measures how long a start takes
    sys.path.insert(0, str(Path.cwd()))
    sys.argv = [request.module, *request.arguments]
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
        if not isinstance(status, int):  # a message for people
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    # As an interpreter does at its end: wait for threads, run the exit handlers, flush.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)  # an ordinary exit takes all modules down one by one, which costs a second
