"""All processes of a job on this machine: of a toprope run, by torchrun or `trainer launch`, or of another command."""

import contextlib
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from trainer.launch import processes
from trainer.launch.agent import LAUNCH, TRAINER, Agent
from trainer.launch.namespaces import INTERFACE, Hosts
from trainer.launch.processes import wait_until
from trainer.log import events

# A lost node is noticed after 3 s; a rendezvous round is closed 1 s after the last call.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,join_timeout=60,read_timeout=30"
SPARE_NODES = 2  # may join while all others are there
STORE = (sys.executable, "-m", "trainer.launch.rendezvous")
ARBITER = "trainer.parallel.arbiter"  # its module
STORE_SECONDS = 30  # until the store listens; torch's import takes most of it
PARTING_SECONDS = 10  # until the other agents have left after the first


class Agents:
    """The agents of one job on this machine: `nodes` agents, each with `ranks` workers.

    The exit status of the first agent is the job's. Several agents meet at a c10d store: in the first agent, or with
    `own_store` in a process of its own. They listen on loopback, or each on one of `hosts`. Logs (node-0.txt, …,
    store-0.txt) and temporary files go to `directory`, which is made and must not hold those of another job.
    """

    def __init__(
        self, *, ranks: int, directory: Path, nodes: int, hosts: Hosts | None, environment: Mapping[str, str] | None,
        own_store: bool, warm: bool = False,
    ) -> None:  # fmt: skip
        """`warm` as for Agent."""
        assert nodes > 1 or not (own_store or hosts), "a single agent holds its own store"
        self._ranks, self._first_nodes = ranks, nodes
        self._directory, self._environment, self._own_store = directory, dict(environment or {}), own_store
        self._warm = warm
        self._port = _free_port() if nodes > 1 else 0
        self._stores: list[Agent] = []
        self._growing = threading.Lock()  # faults add nodes from threads of their own
        self.hosts = hosts
        self.nodes: list[Agent] = []

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

    def add_node(self) -> Agent:
        """Start one more agent, which joins the others. Raises ValueError for a cluster of one agent."""
        if self._first_nodes == 1:
            raise ValueError("a job of a single node cannot grow.\n  Start it with two nodes or more.")
        return self._add()

    def start_store(self) -> None:
        """Start the rendezvous store, empty, where the agents expect it. Returns when it listens."""
        host, address, enter = self._place(0)
        self._directory.mkdir(parents=True, exist_ok=True)
        store = Agent(
            [address, str(self._port)], self._directory / f"store-{len(self._stores)}.txt", launch=[*enter, *STORE],
            environment=self._environment, host=host, warm=self._warm,
        )  # fmt: skip
        self._stores.append(store)
        wait_until(lambda: "listens" in store.output or not store.running, STORE_SECONDS)

    @property
    def store(self) -> Agent | None:
        """The newest process of the rendezvous store; None where the first agent holds it."""
        return self._stores[-1] if self._stores else None

    @property
    def running(self) -> bool:
        """True while the first agent lives."""
        return self.nodes[0].running

    @property
    def output(self) -> str:
        """Output of the first agent."""
        return self.nodes[0].output

    def wait(self, timeout: float) -> int | None:
        """Exit status of the first agent, as a shell gives it (128 + signal); None when `timeout` seconds are over."""
        try:
            status = self.nodes[0].process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return status if status >= 0 else 128 - status

    def processes(self) -> list[int]:
        return [pid for agent in self._agents() for pid in agent.processes()]

    def workers(self) -> dict[int, int]:
        """{rank: pid} of the workers of living agents. Needs /proc: else empty."""
        return {rank: pid for node in self.nodes if node.running for rank, pid in node.workers().items()}

    def checkpoints(self) -> list[Path]:
        """The job's checkpoint files as far as they are known from outside, the newest first."""
        return []

    def arbiter(self) -> int | None:
        """Process id of a quorum's arbiter; None if the job has none now."""
        return None

    def spares(self) -> list[int]:
        """Process ids of a quorum's workers that wait to be needed."""
        return []

    def send(self, pid: int, number: int) -> bool:
        """Send a signal to a process if it is one of this cluster's. Returns False if it is not, or is gone."""
        return any(agent.send(pid, number) for agent in self._agents())

    def kill(self) -> None:
        """End every process of every agent with SIGKILL."""
        for agent in self._agents():
            agent.kill()

    def leftovers(self) -> list[str]:
        """List what is left after the run has ended. The other agents get some time to see that it has."""
        wait_until(lambda: not any(node.running for node in self.nodes), PARTING_SECONDS)
        for store in self._stores:
            store.kill()
        return sorted({left for agent in self._agents() for left in agent.leftovers()})

    def _agents(self) -> list[Agent]:
        return [*self.nodes, *self._stores]

    def _add(self) -> Agent:
        with self._growing:
            number = len(self.nodes)
            host, _, enter = self._place(number)
            self._directory.mkdir(parents=True, exist_ok=True)
            variables = self._environment | ({"GLOO_SOCKET_IFNAME": INTERFACE} if self.hosts else {})
            self.nodes.append(self._start(number, self._directory / f"node-{number}.txt", enter, host, variables))
            return self.nodes[-1]

    def _start(
        self, number: int, log: Path, enter: Sequence[str], host: int | None, environment: Mapping[str, str]
    ) -> Agent:
        """Start the agent of a node. `enter` are words before a command that make it run on the node's host."""
        raise NotImplementedError

    def _meeting(self, number: int) -> list[str]:
        """Options of torchrun by which the agent of a node meets those of the others."""
        hosts_store = int(number == 0 and not self._own_store)
        return [
            f"--nnodes=1:{self._first_nodes + SPARE_NODES}", f"--nproc-per-node={self._ranks}", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self._place(0)[1]}:{self._port}", f"--rdzv-id={self._port}",
            f"--rdzv-conf={RENDEZVOUS},is_host={hosts_store}", f"--local-addr={self._place(number)[1]}",
        ]  # fmt: skip

    def _place(self, number: int) -> tuple[int | None, str, list[str]]:
        """Host of a node, its address, and words before a command that make it run there.

        Nodes beyond the last host share it.
        """
        if self.hosts is None:
            return None, "127.0.0.1", []
        host = min(number, len(self.hosts) - 1)
        return host, self.hosts.address(host), self.hosts.command(host)


class Cluster(Agents):
    """The agents of a toprope run.

    A single agent runs with --standalone. `overrides` are KEY=VALUE for --set.
    """

    def __init__(
        self, config: Path, run: Path, overrides: Sequence[str], *, ranks: int, directory: Path, nodes: int = 1,
        restarts: int = 20, hosts: Hosts | None = None, environment: Mapping[str, str] | None = None,
        own_store: bool = False, worker: Sequence[str] = ("trainer", "train"), warm: bool = False,
    ) -> None:  # fmt: skip
        """`worker` is the module, with its first arguments, that each rank runs. `warm` as for Agent."""
        super().__init__(
            ranks=ranks, directory=directory, nodes=nodes, hosts=hosts, environment=environment, own_store=own_store,
            warm=warm,
        )  # fmt: skip
        settings = [part for override in overrides for part in ("--set", override)]
        self._command = ["-m", *worker, str(config), "--run", str(run), *settings]
        self._restarts = restarts

    def _start(
        self, number: int, log: Path, enter: Sequence[str], host: int | None, environment: Mapping[str, str]
    ) -> Agent:
        alone = ["--standalone", f"--nproc-per-node={self._ranks}"]
        meeting = alone if self._first_nodes == 1 else self._meeting(number)
        options = [*meeting, f"--max-restarts={self._restarts}", "--monitor-interval=0.1"]
        return Agent(
            [*options, *self._command], log, launch=[*enter, *LAUNCH], host=host, warm=self._warm,
            environment=environment,
        )  # fmt: skip


class QuorumCluster(Agents):
    """The launcher of a toprope run in quorum mode, with its arbiter and workers, and `spares` more workers.

    `overrides` are KEY=VALUE for --set. A worker's rank is its launcher's place for it.
    """

    def __init__(
        self, config: Path, run: Path, overrides: Sequence[str], *, ranks: int, directory: Path, spares: int = 0,
        environment: Mapping[str, str] | None = None, warm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            ranks=ranks, directory=directory, nodes=1, hosts=None, environment=environment, own_store=False, warm=warm
        )
        settings = [part for override in overrides for part in ("--set", override)]
        size = ["--workers", str(ranks), "--spares", str(spares)]
        self._command = ["launch", str(config), *size, "--run", str(run), *settings]
        self._run = run

    def workers(self) -> dict[int, int]:
        return {rank: pid for rank, pid in super().workers().items() if rank < self._ranks}

    def spares(self) -> list[int]:
        # Whoever is ready first takes part, in whatever place.
        takes_part = {event.pid for _, event in events.select(events.read(self._run), events.AttemptStarted)}
        return [pid for pid in super().workers().values() if pid not in takes_part]

    def arbiter(self) -> int | None:
        return next((pid for pid in self.processes() if ARBITER in processes.command_line(pid)), None)

    def _start(
        self, number: int, log: Path, enter: Sequence[str], host: int | None, environment: Mapping[str, str]
    ) -> Agent:
        return Agent(self._command, log, launch=[*enter, *TRAINER], warm=self._warm, environment=environment)


class ApartCluster(Agents):
    """The launcher of a toprope run whose clusters of islands live apart, each of `of_cluster` of the `ranks`.

    `overrides` are KEY=VALUE for --set.
    """

    def __init__(
        self, config: Path, run: Path, overrides: Sequence[str], *, ranks: int, of_cluster: int, directory: Path,
        environment: Mapping[str, str] | None = None, warm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            ranks=ranks, directory=directory, nodes=1, hosts=None, environment=environment, own_store=False, warm=warm
        )
        settings = [part for override in overrides for part in ("--set", override)]
        self._command = ["launch", str(config), "--islands", str(ranks // of_cluster), "--run", str(run), *settings]

    def _start(
        self, number: int, log: Path, enter: Sequence[str], host: int | None, environment: Mapping[str, str]
    ) -> Agent:
        return Agent(self._command, log, launch=[*enter, *TRAINER], warm=self._warm, environment=environment)


class CommandCluster(Agents):
    """The agents of a command of someone else's, which works in directory `cwd`.

    A single agent is the command as it stands. For several the command is a torchrun, whose options on how its nodes
    meet, and on the number of workers, are replaced. `checkpoints` is a glob of the files that the job saves.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, *, ranks: int, directory: Path, nodes: int = 1,
        hosts: Hosts | None = None, environment: Mapping[str, str] | None = None, own_store: bool = False,
        checkpoints: str = "",
    ) -> None:  # fmt: skip
        super().__init__(
            ranks=ranks, directory=directory, nodes=nodes, hosts=hosts, environment=environment, own_store=own_store
        )
        self._command, self._cwd, self._checkpoints = list(command), cwd, checkpoints

    def checkpoints(self) -> list[Path]:
        sizes: list[tuple[float, Path]] = []
        pattern = self._cwd.absolute() / self._checkpoints
        root = Path(pattern.anchor)
        for path in root.glob(str(pattern.relative_to(root))) if self._checkpoints else ():
            with contextlib.suppress(OSError):  # replaced meanwhile
                found = path.stat()
                if stat.S_ISREG(found.st_mode) and found.st_size:
                    sizes.append((found.st_mtime, path))
        return [path for _, path in sorted(sizes, reverse=True)]

    def _start(
        self, number: int, log: Path, enter: Sequence[str], host: int | None, environment: Mapping[str, str]
    ) -> Agent:
        words = self._command
        if self._first_nodes > 1:
            parts = torchrun_parts(self._command)
            assert parts is not None, "only a torchrun has several nodes"
            words = [*parts.launcher, *self._meeting(number), *parts.options, *parts.program]
        return Agent(
            words, log, launch=enter, host=host, environment=environment, directory=self._cwd, ranks_by_variable=True
        )


@dataclass(frozen=True)
class TorchrunParts:
    """A torchrun command, in parts."""

    launcher: list[str]
    options: list[str]
    """Those of the job, without the two that follow."""
    ranks: str
    """Value of --nproc-per-node; empty if the command does not have it."""
    meeting: list[str]
    """Names of the options that say how the nodes meet, but --standalone."""
    program: list[str]


_LAUNCHERS = {"torch.distributed.run", "torch.distributed.launch", "trainer.launch.torchrun"}
_FLAGS = {"--standalone", "--module", "--no-python", "--run-path", "--use-env", "--virtual-local-rank"}
_MEETING = ("--nnodes", "--rdzv", "--node-rank", "--master", "--local-addr")


def torchrun_parts(command: Sequence[str]) -> TorchrunParts | None:
    """Take a torchrun command apart; None if it is another one."""
    if Path(command[0]).name == "torchrun":
        begin = 1
    elif "-m" in command[:-1] and command[command.index("-m") + 1] in _LAUNCHERS:
        begin = command.index("-m") + 2
    else:
        return None
    options: list[str] = []
    meeting: list[str] = []
    ranks, place = "", begin
    while place < len(command) and command[place].startswith("-") and command[place] != "-m":
        name, equals, value = command[place].partition("=")
        name = name.replace("_", "-")
        words = 1 if equals or name in _FLAGS else 2
        value = value if equals else command[place + 1] if words == 2 and place + 1 < len(command) else ""
        if name == "--module":
            break
        if name == "--nproc-per-node":
            ranks = value
        elif name.startswith(_MEETING):
            meeting.append(name)
        elif name != "--standalone":
            options += command[place : place + words]
        place += words
    return TorchrunParts([*command[:begin]], options, ranks, meeting, [*command[place:]])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
