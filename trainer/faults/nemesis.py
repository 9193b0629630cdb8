"""The outside hand: a thread beside torchrun that makes what no rank can do to itself.

It follows the run's event log, notes each fault in events/faults.jsonl before it acts, and signals only processes of
the cluster it was given. A fault that lasts is made in a thread of its own, and undone at its end or at `stop`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.faults import plan as plans
from trainer.faults.plan import PlannedFault
from trainer.log import rundir
from trainer.log.events import EventLog, FaultFired, Follower
from trainer.log.history import Attempt

if TYPE_CHECKING:
    from trainer.launch.namespaces import Hosts

POLL_SECONDS = 0.02
PERIOD_SECONDS = 0.2  # of a straggler's stops: far below any limit of a step
SETTLE_SECONDS = 5.0  # after which a fault that lasts must be undone when the nemesis stops
JOINING_SECONDS = 0.3  # from an agent's connection to the store until it waits for the next round
NEMESIS = -1  # rank in the log
SIGNALS = {
    "sigkill": signal.SIGKILL, "sigsegv": signal.SIGSEGV, "sigabrt": signal.SIGABRT, "sigterm": signal.SIGTERM,
    "stopped": signal.SIGSTOP,
}  # fmt: skip


class Node(Protocol):
    """A torchrun agent and its workers."""

    host: int | None

    @property
    def running(self) -> bool: ...
    def processes(self) -> list[int]: ...
    def workers(self) -> dict[int, int]: ...
    def signal(self, number: int) -> bool: ...
    def kill(self) -> None: ...
    def connected(self) -> bool: ...


class Cluster(Protocol):
    """The agents of one run. Signals reach nothing but its processes."""

    hosts: "Hosts | None"

    @property
    def nodes(self) -> Sequence[Node]: ...
    @property
    def store(self) -> Node | None: ...
    @property
    def running(self) -> bool: ...
    def workers(self) -> Mapping[int, int]: ...
    def processes(self) -> list[int]: ...
    def send(self, pid: int, number: int) -> bool: ...
    def add_node(self) -> Node: ...
    def start_store(self) -> None: ...


class Nemesis:
    """Makes those faults of a plan that come from outside, while `cluster` does the run in directory `run`.

    `started` is the Unix time at which the run was first launched: `at_seconds` counts from it. What the run's record
    says has fired does not fire again, so each launch of the same run gets a nemesis of its own, and the same plan.
    """

    def __init__(self, plan: Sequence[PlannedFault], run: Path, cluster: Cluster, started: float) -> None:
        outside = [fault for fault in plan if fault.by_nemesis]
        self._waiting = plans.not_fired(outside, plans.fired(run))
        self._run, self._cluster, self._started = run, cluster, started
        self._progress = _RunProgress(run)
        self._stopping = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="toprope-nemesis", daemon=True)
        self._acting: list[threading.Thread] = []
        self.problems: list[str] = []
        """What could not be made, and why; or could not be undone."""

    def start(self) -> None:
        self._watching.start()

    def stop(self) -> None:
        """Fire nothing more, and undo what lasts: stopped processes go on, links are up. Bounded in time."""
        self._stopping.set()
        for thread in [self._watching, *self._acting]:
            thread.join(SETTLE_SECONDS)
            if thread.is_alive():
                self.problems.append(f"{thread.name} does not end")

    def _watch(self) -> None:
        while self._waiting and not self._stopping.wait(POLL_SECONDS):
            if not rundir.config_path(self._run).exists():
                continue  # a file there would make it a directory that no run is started in
            try:
                self._progress.poll()
                for fault in [fault for fault in self._waiting if self._due(fault)]:
                    self._make(fault)
            except OSError:
                continue  # the run directory is going away

    def _due(self, fault: PlannedFault) -> bool:
        seen = self._progress
        if fault.attempt is not None and fault.attempt != seen.attempt:
            return False
        if fault.at_seconds is not None:
            return time.time() >= self._started + fault.at_seconds
        assert fault.at_step is not None
        reached = seen.reached if fault.attempt is None else seen.reached_in(fault.attempt)
        return reached is not None and reached >= fault.at_step - 1

    def _make(self, fault: PlannedFault) -> None:
        """Fire it now, or leave it waiting for whom it is to hit."""
        name = fault.kind.name
        missing = self._missing(fault)
        if missing:
            self._waiting.remove(fault)
            self.problems.append(f"{fault} cannot be made: {missing}")
            return
        act: Callable[[], None]
        victims: dict[int, int] = {}
        if name in SIGNALS or name == "straggler":
            victims = self._victims(fault)
            if not victims:
                return
            act = lambda: self._hit(fault, victims)  # noqa: E731
            hit: Sequence[int | None] = list(victims)
        elif name == "agent_killed":
            node = self._node_of(fault)
            if node is None:
                return
            act, hit = (lambda: (node.signal(signal.SIGKILL), None)[1]), [None]
        else:
            act, hit = (lambda: _ACTS[name](self, fault.settings)), [None]
        self._waiting.remove(fault)
        for victim in hit:
            self._record(fault, victim, None if victim is None else victims[victim])
        thread = threading.Thread(target=self._act, args=(fault, act), name=f"toprope-{name}", daemon=True)
        self._acting.append(thread)
        thread.start()

    def _missing(self, fault: PlannedFault) -> str:
        name, cluster = fault.kind.name, self._cluster
        if name in _NEEDS_HOSTS and cluster.hosts is None:
            return "its nodes are not on hosts of their own"
        if name in _NEEDS_STORE and cluster.store is None:
            return "its rendezvous store is no process of its own"
        if fault.settings.get("node", -1) >= len(cluster.nodes):
            return f"the job has {len(cluster.nodes)} nodes"
        return ""

    def _record(self, fault: PlannedFault, victim: int | None, pid: int | None) -> None:
        attempt = self._progress.attempt_of(victim, pid)
        reached = self._progress.reached_in(attempt)
        event = FaultFired(
            index=fault.index,
            fault=fault.kind.name,
            victim=victim,
            step=None if reached is None else reached + 1,
            phase=None,
            pid=os.getpid(),
        )
        with contextlib.closing(EventLog(plans.log_path(self._run), attempt, NEMESIS)) as log:
            log.append(event)

    def _act(self, fault: PlannedFault, act: Callable[[], None]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:
            self.problems.append(f"{fault}: {error}")

    # Ranks

    def _victims(self, fault: PlannedFault) -> dict[int, int]:
        """{rank: pid} of those it is to hit; empty while not all of them live."""
        workers = self._cluster.workers() or self._progress.living(self._cluster.processes())
        ranks = fault.victims(self._progress.world_size or max(len(workers), 1))
        return {rank: workers[rank] for rank in ranks} if workers.keys() >= set(ranks) else {}

    def _hit(self, fault: PlannedFault, victims: Mapping[int, int]) -> None:
        if fault.kind.name in SIGNALS:
            for pid in victims.values():
                self._cluster.send(pid, SIGNALS[fault.kind.name])
        else:
            self._straggle(list(victims.values()), **fault.settings)

    def _straggle(self, pids: Sequence[int], seconds: float, duty: float) -> None:
        stopped, until = PERIOD_SECONDS * duty, time.monotonic() + seconds
        try:
            while time.monotonic() < until and not self._stopping.is_set():
                living = [pid for pid in pids if self._cluster.send(pid, signal.SIGSTOP)]
                self._stopping.wait(stopped)
                for pid in living:
                    self._cluster.send(pid, signal.SIGCONT)
                if not living:
                    return
                self._stopping.wait(PERIOD_SECONDS - stopped)
        finally:
            for pid in pids:
                self._cluster.send(pid, signal.SIGCONT)

    # Nodes

    def _living(self) -> list[Node]:
        return [node for node in self._cluster.nodes if node.running]

    def _node_of(self, fault: PlannedFault) -> Node | None:
        """The node of the rank that it names."""
        victims = self._victims(fault)
        return next((node for node in self._living() if set(victims.values()) & set(node.processes())), None)

    def _kill_node(self, settings: Mapping[str, Any]) -> None:
        living, number = self._living(), settings.get("node", -1)
        if living:
            (living[-1] if number < 0 else self._cluster.nodes[number]).kill()

    def _join(self, _settings: Mapping[str, Any]) -> None:
        self._cluster.add_node()

    def _join_and_die(self, settings: Mapping[str, Any]) -> None:
        for _ in range(settings["times"]):
            if self._stopping.is_set() or not self._cluster.running:
                return
            node = self._cluster.add_node()
            while self._cluster.running and node.running and not node.workers() and not self._stopping.wait(0.1):
                pass  # it has joined when it starts workers
            self._stopping.wait(settings["seconds"])
            node.kill()

    def _join_slowly(self, settings: Mapping[str, Any]) -> None:
        node = self._cluster.add_node()
        while self._cluster.running and not node.connected() and not self._stopping.wait(POLL_SECONDS):
            pass
        self._stopping.wait(JOINING_SECONDS)
        self._freeze(node, settings["seconds"])

    def _freeze(self, node: Node, seconds: float) -> None:
        try:
            node.signal(signal.SIGSTOP)
            self._stopping.wait(seconds)
        finally:
            node.signal(signal.SIGCONT)

    # Links

    def _last_host(self) -> "tuple[Hosts, int]":
        hosts, living = self._cluster.hosts, self._living()
        if hosts is None or not living or living[-1].host is None:
            raise ValueError("no node is left on a host of its own")
        return hosts, living[-1].host

    def _partition(self, settings: Mapping[str, Any]) -> None:
        hosts, host = self._last_host()
        try:
            hosts.down(host)
            self._stopping.wait(settings["seconds"])
        finally:
            hosts.up(host)

    def _lose_one_way(self, settings: Mapping[str, Any]) -> None:
        hosts, host = self._last_host()
        try:
            hosts.drop_outgoing(host)
            self._stopping.wait(settings["seconds"])
        finally:
            hosts.restore_outgoing(host)

    def _flap(self, settings: Mapping[str, Any]) -> None:
        for _ in range(settings["times"]):
            self._partition(settings)
            if self._stopping.wait(settings["seconds"]):
                return

    def _slow_down(self, settings: Mapping[str, Any]) -> None:
        hosts, host = self._last_host()
        try:
            hosts.slow(host, settings["milliseconds"])
            self._stopping.wait(settings["seconds"])
        finally:
            hosts.restore_speed(host)

    # The rendezvous store

    def _kill_store(self, _settings: Mapping[str, Any]) -> None:
        assert self._cluster.store is not None
        self._cluster.store.kill()

    def _freeze_store(self, settings: Mapping[str, Any]) -> None:
        assert self._cluster.store is not None
        self._freeze(self._cluster.store, settings["seconds"])

    def _restart_store(self, settings: Mapping[str, Any]) -> None:
        self._kill_store(settings)
        self._cluster.start_store()


_NEEDS_HOSTS = ("partition", "one_way_loss", "link_flap", "slow_link")
_NEEDS_STORE = ("store_killed", "store_unreachable", "store_restarted")
_ACTS: Mapping[str, Callable[[Nemesis, Mapping[str, Any]], None]] = {
    "node_killed": Nemesis._kill_node,
    "node_leaves": Nemesis._kill_node,
    "node_joins": Nemesis._join,
    "node_flaps": Nemesis._join_and_die,
    "slow_joiner": Nemesis._join_slowly,
    "partition": Nemesis._partition,
    "one_way_loss": Nemesis._lose_one_way,
    "link_flap": Nemesis._flap,
    "slow_link": Nemesis._slow_down,
    "store_killed": Nemesis._kill_store,
    "store_unreachable": Nemesis._freeze_store,
    "store_restarted": Nemesis._restart_store,
}
NEEDS_STORE = frozenset(_NEEDS_STORE)
"""Kinds for which the cluster's rendezvous store must be a process of its own."""


class _RunProgress:
    """How far the run has come, by its event log."""

    def __init__(self, run: Path) -> None:
        self._follower = Follower(run, "attempt-*-rank-*.jsonl")
        self._attempts: dict[int, Attempt] = {}

    def poll(self) -> None:
        for entry in self._follower.poll():
            self._attempts.setdefault(entry.attempt, Attempt(entry.attempt)).observe(entry)

    @property
    def attempt(self) -> int | None:
        """Number of the newest attempt; None before the first has written anything."""
        return max(self._attempts, default=None)

    @property
    def reached(self) -> int | None:
        """Steps completed, in whatever attempt; None before any is ready."""
        steps = (attempt.last_step for attempt in self._attempts.values())
        return max((step for step in steps if step is not None), default=None)

    def reached_in(self, attempt: int) -> int | None:
        """Steps completed by the newest step of an attempt; None until it is ready."""
        return self._attempts[attempt].last_step if attempt in self._attempts else None

    @property
    def world_size(self) -> int | None:
        """World size of the newest attempt that was ready."""
        ready = [number for number, attempt in self._attempts.items() if attempt.start is not None]
        return self._attempts[max(ready)].world_size if ready else None

    def attempt_of(self, rank: int | None, pid: int | None) -> int:
        """The attempt of a worker, who may not have written anything yet; the newest attempt if `rank` is None."""
        newest = self.attempt or 0
        if rank is None:
            return newest
        last = max((number for number, attempt in self._attempts.items() if rank in attempt.starts), default=-1)
        if last >= 0 and self._attempts[last].starts[rank][1].pid == pid:
            return last
        return newest + (last == newest)  # a process that has not written yet belongs to the attempt that comes next

    def living(self, processes: Sequence[int]) -> dict[int, int]:
        """{rank: pid} of the ranks whose newest process is one of these."""
        newest: dict[int, int] = {}
        for number in sorted(self._attempts):
            newest |= {rank: event.pid for rank, (_, event) in self._attempts[number].starts.items()}
        return {rank: pid for rank, pid in newest.items() if pid in processes}
