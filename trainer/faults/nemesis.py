"""Fires the faults of a plan that come from outside: a thread beside torchrun, for faults that no rank can make itself.

It follows the progress of the job (of a toprope run: its event log), notes each fault in RUN/events/faults.jsonl before
it acts, and signals only processes of the cluster it was given. Each fault acts in a thread of its own, and what lasts
is undone at its end or at `stop`.
"""

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainer.faults import plan as plans
from trainer.faults.plan import PlannedFault
from trainer.log import rundir
from trainer.log.events import Follower
from trainer.log.history import Attempt

if TYPE_CHECKING:
    from trainer.launch.agent import Agent
    from trainer.launch.cluster import Agents
    from trainer.launch.namespaces import Hosts

POLL_SECONDS = 0.02
SETTLE_SECONDS = 5.0  # after which a fault that lasts must be undone when the nemesis stops
NEMESIS = -1  # rank in the log


class Outside:
    """The cluster as faults from outside see it, and their common ways to wait and to undo."""

    def __init__(self, cluster: "Agents") -> None:
        self.cluster = cluster
        self.stopping = threading.Event()
        """Set when everything that lasts must be undone."""

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the nemesis stops; returns True if it stops."""
        return self.stopping.wait(seconds)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, the end of the job, or the end of the nemesis."""
        while self.cluster.running and not condition() and not self.wait(POLL_SECONDS):
            pass

    def living_nodes(self) -> "list[Agent]":
        return [node for node in self.cluster.nodes if node.running]

    def kill_node(self, number: int) -> None:
        """Kill a node with all its workers; below 0 the last one that lives."""
        if living := self.living_nodes():
            (living[-1] if number < 0 else self.cluster.nodes[number]).kill()

    def last_host(self) -> "tuple[Hosts, int]":
        """(hosts, number of the last living node's host). Raises ValueError if there is none."""
        hosts, living = self.cluster.hosts, self.living_nodes()
        if hosts is None or not living or living[-1].host is None:
            raise ValueError("no node is left on a host of its own")
        return hosts, living[-1].host

    def store(self) -> "Agent":
        """The process of the rendezvous store."""
        assert self.cluster.store is not None
        return self.cluster.store

    def arbiter(self) -> int:
        """Process id of a quorum's arbiter. Raises ValueError if there is none now."""
        pid = self.cluster.arbiter()
        if pid is None:
            raise ValueError("the job has no arbiter now")
        return pid

    def freeze(self, node: "Agent", seconds: float) -> None:
        """Stop a process for so long."""
        node.signal(signal.SIGSTOP)
        try:
            self.wait(seconds)
        finally:
            node.signal(signal.SIGCONT)


class Progress(Protocol):
    """Progress of a job, as someone beside it can tell."""

    def poll(self) -> bool:
        """Look again; False while no fault may fire yet. Raises OSError while the files cannot be read."""
        ...

    def newest_attempt(self) -> int | None:
        """Number of the newest attempt; None before the first."""
        ...

    def reached(self, attempt: int | None) -> int | None:
        """Steps completed in this attempt, or in any if it is None; None before any rank is ready."""
        ...

    def workers(self) -> Mapping[int, int]:
        """{rank: pid} of all workers that have told of themselves, living or not."""
        ...

    def world_size(self) -> int | None:
        """Number of ranks of the newest attempt; None if it is unknown."""
        ...

    def attempt_of(self, rank: int | None, pid: int | None) -> int:
        """The attempt of a worker, which may not have told anything yet; the newest attempt if `rank` is None."""
        ...


class LoggedProgress:
    """The progress of a toprope run, by its event log."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._follower = Follower(run, "attempt-*-rank-*.jsonl")
        self._attempts: dict[int, Attempt] = {}

    def poll(self) -> bool:
        if not rundir.config_path(self._run).exists():
            return False  # a file there would make a run refuse the directory
        for entry in self._follower.poll():
            self._attempts.setdefault(entry.attempt, Attempt(entry.attempt)).observe(entry)
        return True

    def newest_attempt(self) -> int | None:
        return max(self._attempts, default=None)

    def reached(self, attempt: int | None) -> int | None:
        steps = (known.last_step for n, known in self._attempts.items() if attempt in (None, n))
        return max((step for step in steps if step is not None), default=None)

    def workers(self) -> Mapping[int, int]:
        attempts = [self._attempts[number] for number in sorted(self._attempts)]
        return {rank: event.pid for attempt in attempts for rank, (_, event) in attempt.starts.items()}

    def world_size(self) -> int | None:
        starts = [self._attempts[number].start for number in sorted(self._attempts)]
        return next((start[1].world_size for start in reversed(starts) if start is not None), None)

    def attempt_of(self, rank: int | None, pid: int | None) -> int:
        newest = max(self._attempts, default=0)
        if rank is None:
            return newest
        last = max((number for number, attempt in self._attempts.items() if rank in attempt.starts), default=-1)
        if last >= 0 and self._attempts[last].starts[rank][1].pid == pid:
            return last
        return newest + (last == newest)  # a process that has not written yet belongs to the attempt that comes next


class Nemesis:
    """Fires the faults of a plan that come from outside, while `cluster` does the run in directory `run`.

    `started` is the Unix time at which the run was first launched: `at_seconds` counts from it. What has fired
    according to the run's record does not fire again, so each launch of a run gets a new nemesis with the same plan.
    `progress` tells how far the job has come; by default the run's event log does.
    """

    def __init__(
        self, plan: Sequence[PlannedFault], run: Path, cluster: "Agents", started: float,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        fired = {event.index for _, event in plans.fired(run)}
        self._waiting = [fault for fault in plan if fault.from_outside and fault.index not in fired]
        self._run, self._cluster, self._started = run, cluster, started
        self._progress: Progress = progress or LoggedProgress(run)
        self._outside = Outside(cluster)
        self._watching = threading.Thread(target=self._watch, name="toprope-nemesis", daemon=True)
        self._acting: list[threading.Thread] = []
        self.problems: list[str] = []
        """Faults that could not be made or undone, each with the reason."""

    def start(self) -> None:
        self._watching.start()

    def stop(self) -> None:
        """Fire nothing more, and undo what lasts: stopped processes continue, links are up. Bounded in time."""
        self._outside.stopping.set()
        for thread in [self._watching, *self._acting]:
            thread.join(SETTLE_SECONDS)
            if thread.is_alive():
                self.problems.append(f"{thread.name} does not end")

    def _watch(self) -> None:
        while self._waiting and not self._outside.wait(POLL_SECONDS):
            try:
                if not self._progress.poll():
                    continue
                for fault in [fault for fault in self._waiting if self._is_due(fault)]:
                    self._fire(fault)
            except OSError:
                continue  # the run directory is being removed

    def _is_due(self, fault: PlannedFault) -> bool:
        if fault.attempt is not None and fault.attempt != self._progress.newest_attempt():
            return False
        if fault.at_seconds is not None:
            return time.time() >= self._started + fault.at_seconds
        assert fault.at_step is not None
        reached = self._progress.reached(fault.attempt)
        return reached is not None and reached >= fault.at_step - 1

    def _fire(self, fault: PlannedFault) -> None:
        """Fire a fault that is due, unless the ranks that it hits do not live yet."""
        kind = fault.kind
        if obstacle := kind.obstacle_outside(fault, self._cluster):
            self._waiting.remove(fault)
            self.problems.append(f"{fault} cannot be made: {obstacle}")
            return
        victims = self._victims(fault) if kind.on_rank else {}
        if kind.on_rank and not victims:
            return  # it stays waiting, and is due again at the next poll
        self._waiting.remove(fault)
        # On record before it acts: whatever the fault ends must find it there.
        for victim, pid in victims.items() if kind.on_rank and not kind.hits_agent else [(None, None)]:
            attempt, member = self._progress.attempt_of(victim, pid), None
            if fault.mode == "quorum":  # a worker is in the log by its number, and joins the attempt that goes on
                attempt = self._progress.newest_attempt() or 0
                # The log of member 0 is that of all, which any member may have begun.
                numbers = [number for number, known in self._progress.workers().items() if known == pid]
                member = max(numbers, default=None)
            reached = self._progress.reached(attempt)
            step = None if reached is None else reached + 1
            about = {"victim": victim, "step": step, "member": member}
            plans.record(self._run, fault, attempt, NEMESIS, phase=None, **about)
        thread = threading.Thread(target=self._act, args=(fault, victims), name=f"toprope-{kind.name}", daemon=True)
        self._acting.append(thread)
        thread.start()

    def _act(self, fault: PlannedFault, victims: Mapping[int, int]) -> None:
        try:
            fault.kind.fire_from_outside(fault, self._outside, victims)
        except (OSError, ValueError) as error:
            self.problems.append(f"{fault}: {error}")

    def _victims(self, fault: PlannedFault) -> dict[int, int]:
        """{rank: pid} of the ranks that a fault hits; empty while not all of them live."""
        living = self._cluster.processes()
        told = {rank: pid for rank, pid in self._progress.workers().items() if pid in living}
        workers = self._cluster.workers() or told
        ranks = fault.victims(self._progress.world_size() or max(len(workers), 1))
        return {rank: workers[rank] for rank in ranks} if workers.keys() >= set(ranks) else {}
