"""Jobs that Python starts: one torchrun agent (Job), or all agents of a run on this machine (Cluster).

Whatever becomes of them, their processes and files are found again, ended and accounted for.
"""

import atexit
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from trainer.launch import forkserver
from trainer.parallel import elastic
from trainer.parallel.elastic import JOB_MARK

if TYPE_CHECKING:
    from trainer.launch.namespaces import Hosts

LAUNCH = (sys.executable, "-m", "trainer.launch.torchrun")
PROC = Path("/proc")
# A node that is gone is known to be after 3 s; a round is closed 1 s after the last call.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,join_timeout=60,read_timeout=30"
SPARE_NODES = 2  # that may join while all others are there
STORE_SECONDS = 30  # torch's import is most of it
PARTING_SECONDS = 10  # for the other agents to leave after the first


@functools.cache
def warm_server() -> forkserver.ForkServer | None:
    """This process's own, for who starts many jobs: it has imported what agents and their workers need."""
    server = forkserver.spawn(["trainer.launch.preload", "torch.distributed.run"])
    if server is not None:
        atexit.register(server.close)
    return server


class Job:
    """One torchrun agent in the background, whose processes and files can be found again whatever becomes of it.

    It has a mark in its environment that every process it starts inherits: those with the mark are its processes, and
    nothing else is ever sent a signal. Its temporary files go to a directory of its own, beside the log. Where there
    is no /proc (macOS) its processes are those that descend from the agent: workers that outlive it are not found,
    and nobody knows which is which rank.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        launch: Sequence[str] = LAUNCH,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        host: int | None = None,
        warm: bool = False,
    ) -> None:
        """Start `launch` + `arguments` in working directory `directory`, with its output in the file `log`.

        `host` is for the caller to remember where it runs. With `warm` an agent (`launch` is LAUNCH) is forked
        from a process that has its imports behind it, which pays for who starts many.
        """
        self.mark, self.host, self.log = uuid.uuid4().hex, host, log
        self.temporary = log.with_suffix(".tmp")
        self.temporary.mkdir(parents=True)
        self._shared_memory = _shared_memory()
        own = {JOB_MARK: self.mark, "TMPDIR": str(self.temporary)}
        self.process = _start([*launch, *arguments], os.environ | (environment or {}) | own, directory, log, warm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """Whether the agent lives."""
        return self.process.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[int]:
        """All living processes of this job, the agent first."""
        found = _descendants(self.process) if not PROC.exists() else _with_environment(f"{JOB_MARK}={self.mark}")
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def workers(self) -> dict[int, int]:
        """{rank: pid} of the workers that the agent has now. Needs /proc: else none."""
        found = {}
        for pid in self.processes():
            rank = _name(pid).removeprefix(elastic.NAME_PREFIX)
            if rank.isdecimal() and _parent(pid) == self.process.pid:
                found[int(rank)] = pid
        return found

    def connected(self) -> bool:
        """Whether the agent has opened a connection: to the rendezvous store, at first. Needs /proc: else True."""
        if not PROC.exists():
            return True
        links = PROC.glob(f"{self.process.pid}/fd/*")
        with contextlib.suppress(OSError):
            return any(str(link.readlink()).startswith("socket:") for link in links)
        return False

    def signal(self, number: int) -> bool:
        """Send the agent a signal; whether it was there to get it."""
        return self.running and self.send(self.process.pid, number)

    def send(self, pid: int, number: int) -> bool:
        """Send a signal to a process if it is one of this job's; whether it was."""
        if not PROC.exists():
            ours = pid in self.processes()
            with contextlib.suppress(ProcessLookupError):
                return ours and os.kill(pid, number) is None
            return False
        try:
            handle = os.pidfd_open(pid)  # if the number goes to another process meanwhile, that one is safe
        except OSError:
            return False
        try:
            if _environment(pid).get(JOB_MARK) != self.mark:
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def kill(self) -> None:
        """End every process of this job, at once and for good."""
        for _ in range(3):
            for pid in self.processes():
                if not _is_tracker(pid):
                    self.send(pid, signal.SIGKILL)
            if _wait_until(lambda: not self.processes(), seconds=2):
                break
        self.process.wait(10)

    def leftovers(self) -> list[str]:
        """What an ended job left behind: processes, temporary files, sockets, shared memory."""
        _wait_until(lambda: not self.processes(), seconds=3)
        orphans = [f"process {pid}: {_command_line(pid)!r}" for pid in self.processes()]
        # torch makes a directory for its compiler as it is imported, one for all jobs of a user. And an agent that was
        # killed could not remove the file that every agent has.
        passed = ("torchinductor_", *([elastic.FAILURES_PREFIX] if self.process.poll() == -signal.SIGKILL else []))
        found = [path for path in sorted(self.temporary.rglob("*")) if not path.name.startswith(passed)]
        files = [f"file {path}" for path in found]
        segments = self._segments()
        # Others' semaphores have a name for an instant, or until the tracker of an agent that was killed removes them.
        _wait_until(lambda: not segments & self._segments(), seconds=5)
        segments &= self._segments()
        return orphans + files + [f"segment {path}" for path in sorted(segments)]

    def _segments(self) -> set[str]:
        """Of shared memory, those that came since the start and that nobody uses."""
        return _shared_memory() - self._shared_memory


class Cluster:
    """The agents of one run on this machine: `nodes` of them, each with `ranks` workers; the first is the job's.

    One agent runs by itself (--standalone). Several meet at a c10d store: in the first agent, or with `own_store` in a
    process of its own. They are on loopback, or each on one of `hosts`. `overrides` are KEY=VALUE for --set. Logs
    (node-0.txt, …, store-0.txt) and temporary files go to `directory`, which is made, and must not hold those of
    another cluster.
    """

    def __init__(
        self,
        config: Path,
        run: Path,
        overrides: Sequence[str],
        *,
        ranks: int,
        nodes: int = 1,
        restarts: int = 20,
        directory: Path,
        hosts: "Hosts | None" = None,
        environment: Mapping[str, str] | None = None,
        own_store: bool = False,
        worker: Sequence[str] = ("trainer", "train"),
        warm: bool = False,
    ) -> None:
        """`worker` is the module, with its first arguments, that each rank runs; `warm` as for Job, for one
        agent alone."""
        assert nodes > 1 or not (own_store or hosts), "one agent by itself has its store in itself"
        settings = [part for override in overrides for part in ("--set", override)]
        self._command = ["-m", *worker, str(config), "--run", str(run), *settings]
        self._ranks, self._first_nodes, self._restarts = ranks, nodes, restarts
        self._directory, self._environment, self._own_store = directory, dict(environment or {}), own_store
        self._port = _free_port() if nodes > 1 else 0
        self._stores: list[Job] = []
        self._growing = threading.Lock()
        # A node that is forked joins, and dies, so fast that torch's agents can be caught between meeting and ranks.
        self._warm = warm and nodes == 1
        self.hosts = hosts
        self.nodes: list[Job] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the store, if it is a process of its own, and the first agents."""
        if self._own_store:
            self.start_store()
        for _ in range(self._first_nodes):
            self._add()

    def add_node(self) -> Job:
        """Start one more agent, which joins the others. Of one agent by itself there can be no second."""
        if self._first_nodes == 1:
            raise ValueError("a job of one node by itself cannot grow.\n  Start it with two nodes or more.")
        return self._add()

    def start_store(self) -> None:
        """Start the rendezvous store, empty, where the agents expect it; returns when it is there."""
        command = ["-c", f"from trainer.launch.torchrun import store; store({self._address(0)!r}, {self._port})"]
        log = self._directory / f"store-{len(self._stores)}.txt"
        self._directory.mkdir(parents=True, exist_ok=True)
        job = Job(
            command, log, launch=[*self._on(0), sys.executable], environment=self._environment, host=self._host(0)
        )
        self._stores.append(job)
        _wait_until(lambda: "listens" in job.output or not job.running, STORE_SECONDS)

    @property
    def store(self) -> Job | None:
        """The process of the rendezvous store, the newest; None where the first agent has it."""
        return self._stores[-1] if self._stores else None

    @property
    def running(self) -> bool:
        """Whether the job goes on: its first agent does."""
        return self.nodes[0].running

    @property
    def output(self) -> str:
        """Of the first agent."""
        return self.nodes[0].output

    def wait(self, timeout: float) -> int | None:
        """The job's exit status, that of the first agent as a shell would say it; None when time is up."""
        try:
            status = self.nodes[0].process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return status if status >= 0 else 128 - status

    def processes(self) -> list[int]:
        return [pid for job in self._jobs() for pid in job.processes()]

    def workers(self) -> dict[int, int]:
        """{rank: pid} of the workers of living agents. Needs /proc: else none."""
        return {rank: pid for node in self.nodes if node.running for rank, pid in node.workers().items()}

    def send(self, pid: int, number: int) -> bool:
        """Send a signal to a process if it is one of this cluster's; whether it was."""
        return any(job.send(pid, number) for job in self._jobs())

    def kill(self) -> None:
        """End every process of every agent, at once and for good."""
        for job in self._jobs():
            job.kill()

    def leftovers(self) -> list[str]:
        """What the ended job left behind. The other agents are given some time to see that it has ended."""
        _wait_until(lambda: not any(node.running for node in self.nodes), PARTING_SECONDS)
        for job in self._stores:
            job.kill()
        return sorted({left for job in self._jobs() for left in job.leftovers()})

    def _jobs(self) -> list[Job]:
        return [*self.nodes, *self._stores]

    def _add(self) -> Job:
        with self._growing:
            number = len(self.nodes)
            self._directory.mkdir(parents=True, exist_ok=True)
            node = Job(
                [*self._options(number), *self._command],
                self._directory / f"node-{number}.txt",
                launch=[*self._on(number), *LAUNCH],
                environment=self._environment | ({"GLOO_SOCKET_IFNAME": self.hosts.interface} if self.hosts else {}),
                host=self._host(number),
                warm=self._warm,
            )
            self.nodes.append(node)
            return node

    def _options(self, number: int) -> list[str]:
        common = [f"--nproc-per-node={self._ranks}", f"--max-restarts={self._restarts}", "--monitor-interval=0.1"]
        if self._first_nodes == 1:
            return ["--standalone", *common]
        hosts_store = int(number == 0 and not self._own_store)
        return [
            f"--nnodes=1:{self._first_nodes + SPARE_NODES}", *common, "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self._address(0)}:{self._port}", f"--rdzv-id={self._port}",
            f"--rdzv-conf={RENDEZVOUS},is_host={hosts_store}", f"--local-addr={self._address(number)}",
        ]  # fmt: skip

    def _host(self, number: int) -> int | None:
        """Nodes beyond the last host share it."""
        return None if self.hosts is None else min(number, len(self.hosts) - 1)

    def _address(self, number: int) -> str:
        host = self._host(number)
        return "127.0.0.1" if self.hosts is None or host is None else self.hosts.address(host)

    def _on(self, number: int) -> list[str]:
        host = self._host(number)
        return [] if self.hosts is None or host is None else self.hosts.command(host)


def _start(
    command: Sequence[str], environment: Mapping[str, str], directory: Path | None, log: Path, warm: bool
) -> subprocess.Popen[bytes] | forkserver.Child:
    """In a session of its own, with nothing to read and all output in the log."""
    if warm and tuple(command[:3]) == LAUNCH and (server := warm_server()) is not None:
        child = server.start(command[2], command[3:], environment, directory=directory, output=log)
        if child is not None:
            return child
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=directory, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def _with_environment(entry: str) -> list[int]:
    found = []
    for path in PROC.glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours
            if entry.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _environment(pid: int) -> dict[str, str]:
    """That a process was started with; empty once it has ended."""
    with contextlib.suppress(OSError):
        entries = (PROC / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "comm").read_text(errors="replace").strip()
    return ""


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int((PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return None


def _descendants(process: subprocess.Popen[bytes] | forkserver.Child) -> list[int]:
    if process.poll() is not None:
        return []
    listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [process.pid]
    for pid in found:
        found += [child for child, parent in parents if parent == pid]
    return found


def _is_tracker(pid: int) -> bool:
    """Python's own helper, which removes the semaphores of processes that died, and then ends by itself."""
    return "multiprocessing.resource_tracker" in _command_line(pid)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def _shared_memory() -> set[str]:
    """Segments that no living process has mapped: the machine is shared, and others' are theirs."""
    segments = {str(path) for path in Path("/dev/shm").glob("*")}
    if not segments:
        return segments
    mapped = ""
    for path in PROC.glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += "\n".join(line for line in path.read_text().splitlines() if "/dev/shm/" in line)
    return {segment for segment in segments if segment not in mapped}
